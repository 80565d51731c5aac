"""Where the CPU time of both ends goes while reads are timed, and how often their threads are switched.

`perf` samples the processes of both ends, by a timer, only while an order to read is carried out. Each sample counts
for what it was found in:

| figure  | the sample was found in                                                                            |
|---------|----------------------------------------------------------------------------------------------------|
| python  | the interpreter, extension modules, this package's own C                                           |
| ucx     | UCX, ucxx's binding, and NIXL's libraries                                                          |
| copies  | the C library: memcpy, locks, clocks, allocation                                                   |
| sockets | the kernel: reading, writing and what that brings along, the other end's receive on loopback too   |
| waits   | the kernel: sleeping, waking, yielding, and looking what is ready                                  |
| kernel  | the kernel: page faults, interrupts, everything else                                               |

All as µs of CPU a read: a share of what the process has used. Samples take time themselves, so figures of a run with a
profile are for comparing its parts, not with those of a run without.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from bench.core.cpu_time import tree_switches
from bench.core.figures import SkippedError

__all__ = ["ENDS", "PARTS", "Sampler", "part_of"]

ENDS: Final = ("reader", "source")
PARTS: Final = ("python", "ucx", "copies", "sockets", "waits", "kernel")

SAMPLES_A_SECOND: Final = 4000
STOP_TIMEOUT_S: Final = 60.0
_ACKNOWLEDGED_BYTES: Final = 16

_LIBRARIES: Final = (
    ("ucx", ("libuc", "libnixl", "libplugin", "arr.", "libucxx", "ucxx/", "nixl")),
    ("copies", ("libc.so", "libc-", "libpthread", "[vdso]", "libm.so")),
)
_CALLS: Final = (
    ("waits", ("sched_yield", "futex", "epoll", "sys_poll", "sys_ppoll", "nanosleep", "sys_select", "eventfd")),
    ("sockets", ("sys_send", "sys_recv", "sys_read", "sys_write", "tcp_", "sock_")),
)
"""By a part of a library's path, or of the name of one of the kernel's functions that the sample was called from."""


class Sampler:
    """Samples both ends while it is `on`; then says where their time went.

    Args:
        pids: the processes of each end.

    Raises:
        SkippedError: there is no `perf`, or it may not look into these processes.
    """

    def __init__(self, pids: Mapping[str, tuple[int, ...]]) -> None:
        if shutil.which("perf") is None:
            raise SkippedError("a profile needs Linux's `perf` (package linux-perf or linux-tools)")
        self._pids = pids
        self._switches = {end: [0, 0] for end in pids}
        self._open = ExitStack()
        folder = Path(self._open.enter_context(TemporaryDirectory(prefix="bench-perf-")))
        for name in ("control", "acknowledge"):
            os.mkfifo(folder / name)
        self._data, control = folder / "samples", f"fifo:{folder / 'control'},{folder / 'acknowledge'}"
        of_whom = ",".join(str(pid) for several in pids.values() for pid in several)
        command = [*("perf", "record", "--quiet", "-D", "-1", "--control", control, "-e", "cpu-clock", "-g")]
        command += ["-F", str(SAMPLES_A_SECOND), "-p", of_whom, "-o", str(self._data)]
        self._perf = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        self._control = os.open(folder / "control", os.O_RDWR)
        self._answers = os.open(folder / "acknowledge", os.O_RDWR)

    def _say(self, word: str) -> None:
        os.write(self._control, f"{word}\n".encode())
        while True:
            ready = self._perf.poll() is None
            if not ready:
                assert self._perf.stderr is not None
                raise SkippedError(f"perf: {self._perf.stderr.read().strip()}")
            if os.read(self._answers, _ACKNOWLEDGED_BYTES):
                return

    @contextmanager
    def on(self) -> Iterator[None]:
        """While reads are timed."""
        before = {end: tree_switches(pids) for end, pids in self._pids.items()}
        self._say("enable")
        yield
        self._say("disable")
        for end, pids in self._pids.items():
            for which, (now, then) in enumerate(zip(tree_switches(pids), before[end], strict=True)):
                self._switches[end][which] += now - then

    def figures(self, reads: int, cpu_us: Mapping[str, float]) -> dict[str, float]:
        """Stop; µs a read of each part of each end, whose CPU time a read that is, and switches a read."""
        self._perf.send_signal(signal.SIGINT)
        self._perf.wait(STOP_TIMEOUT_S)
        script = ["perf", "script", "-i", str(self._data), "-F", "pid,ip,sym,dso"]
        said = subprocess.run(script, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True).stdout
        self._open.close()
        for descriptor in (self._control, self._answers):
            os.close(descriptor)
        end_of = {pid: end for end, pids in self._pids.items() for pid in pids}
        counts: dict[str, Counter[str]] = {end: Counter() for end in self._pids}
        for sample in said.split("\n\n"):
            pid, _, frames = sample.strip().partition("\n")
            if pid and (end := end_of.get(int(pid))) is not None:
                counts[end][part_of(frames)] += 1
        figures: dict[str, float] = {}
        for end, found in counts.items():
            whole = max(1, found.total())
            figures |= {f"{end}_{part}_us": found[part] / whole * cpu_us[end] for part in PARTS}
            slept, preempted = self._switches[end]
            figures |= {f"{end}_sleeps": slept / reads, f"{end}_preempted": preempted / reads}
        return figures


def part_of(frames: str) -> str:
    """What a sample was found in, by its stack, innermost first."""
    innermost = frames.partition("\n")[0]
    if "[kernel" in innermost:
        stack = "\n".join(line for line in frames.split("\n") if "[kernel" in line)
        return next((part for part, names in _CALLS if any(name in stack for name in names)), "kernel")
    return next((part for part, names in _LIBRARIES if any(name in innermost for name in names)), "python")
