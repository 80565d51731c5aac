"""What a sample of `perf` counts for."""

from __future__ import annotations

from bench.core.profile import PARTS, part_of

KERNEL = "([kernel.kallsyms])"
STACKS = {
    "python": "4a1 _PyEval_EvalFrameDefault (/usr/bin/python3.11)\n7f1 [unknown] ([unknown])",
    "ucx": "7f2 ucp_worker_progress (/venv/site-packages/libucx/lib/libucp.so.0.0.0)",
    "copies": "7f3 __memmove_avx512_unaligned_erms (/usr/lib/x86_64-linux-gnu/libc.so.6)",
    "sockets": f"f1 copy_user {KERNEL}\nf2 tcp_sendmsg {KERNEL}\nf3 __x64_sys_sendto {KERNEL}\n7f send (libc.so.6)",
    "waits": f"f1 finish_task_switch.isra.0 {KERNEL}\nf2 schedule {KERNEL}\nf3 __x64_sys_sched_yield {KERNEL}",
    "kernel": f"f1 clear_page {KERNEL}\nf2 asm_exc_page_fault {KERNEL}\n7f3 sched_yield_of_ours (/usr/bin/python3.11)",
}


def test_sample_counts_for_what_it_was_found_in_and_in_the_kernel_for_what_called_it() -> None:
    assert tuple(STACKS) == PARTS
    assert {part: part_of(stack) for part, stack in STACKS.items()} == {part: part for part in PARTS}
