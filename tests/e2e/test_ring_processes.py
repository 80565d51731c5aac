"""One ring, several real processes: nothing lost, duplicated or torn, and a process that dies takes nothing with it."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest

from tests.e2e.programs import content
from tests.support.exhaustive import exhaustive
from tests.support.stopping import stop_process
from tests.support.waiting import wait_until
from ucxx_transport.config import RingConfig
from ucxx_transport.errors import ConfigError, DeadlineExceededError
from ucxx_transport.ring import ReadLease, SharedRingBuffer, SlotState
from ucxx_transport.ring.segment import list_segments, segment_path

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = "tests.e2e.programs.ring_roles"


class Actor:
    """A process in a role. Killed at the end of the block, if it still runs."""

    def __init__(self, role: str, *arguments: object, options: tuple[str, ...] = (), fds: tuple[int, ...] = ()) -> None:
        self.process = subprocess.Popen(
            [sys.executable, *options, "-m", PROGRAM, role, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            pass_fds=fds,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.process.kill()
        self.process.communicate()

    def hear(self) -> object:
        """The next thing it says."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise AssertionError(f"it ended: {self.process.communicate()[1]}")
        return json.loads(line)

    def go_on(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def send(self, signal_number: int) -> None:
        os.kill(self.process.pid, signal_number)

    def end(self) -> tuple[int, str]:
        """Exit code and standard error, once it has ended by itself."""
        _, errors = self.process.communicate(timeout=60)
        return self.process.returncode, errors


@contextmanager
def ring_of(**settings: Any) -> Iterator[SharedRingBuffer]:
    with SharedRingBuffer.create(RingConfig(**{"slots": 8, "slot_bytes": 4096, **settings})) as ring:
        yield ring
    assert not segment_path(ring.name).exists()


def in_use(ring: SharedRingBuffer) -> set[SlotState]:
    return {SlotState.WRITING, SlotState.READING} & set(ring.slot_states())


@pytest.mark.parametrize("payloads", [500, exhaustive(13_000)])
def test_two_processes_hammer_one_ring_and_nothing_is_lost_duplicated_or_torn(payloads: int) -> None:
    """Each process passes on that many, at 8 transitions a payload."""
    with ring_of(on_full="raise", slot_bytes=512) as ring, ExitStack() as stack:
        to_second, to_first = os.pipe(), os.pipe()
        first = stack.enter_context(
            Actor("hammer", ring.name, 0, payloads, to_first[0], to_second[1], fds=(to_first[0], to_second[1]))
        )
        second = stack.enter_context(
            Actor("hammer", ring.name, 1, payloads, to_second[0], to_first[1], fds=(to_second[0], to_first[1]))
        )
        for fd in (*to_second, *to_first):
            os.close(fd)
        for actor in (first, second):
            assert actor.hear() == "ready"
        for actor in (first, second):
            actor.go_on()
        for actor in (first, second):
            assert actor.hear() == {"written": payloads, "read": payloads, "in_order": True, "problems": []}
            assert actor.end() == (0, "")
        found = ring.statistics()
    assert (found.free, found.committed, found.consumed, found.freed) == (8, *[2 * payloads] * 3)
    assert found.acquired == found.consumed + found.released
    assert found.written + found.committed + found.acquired + found.consumed + found.released >= 15 * payloads
    assert found.stale == 2 * payloads / 20
    assert (found.overwritten, found.aborted, found.late_finalise, found.lock_recoveries) == (0, 0, 0, 0)


def test_processes_killed_at_any_moment_take_nothing_with_them() -> None:
    seed = 20260
    choice = random.Random(seed)
    cycles = 12
    with ring_of(slots=32) as ring, ExitStack() as stack:
        cast = [enlist(stack, ring, seed) for _ in range(2)]
        for cycle in range(cycles):
            cast.append(enlist(stack, ring, seed + cycle))
            victims = cast.pop(0)
            for victim in victims:
                assert victim.hear() == "ready"
            end = time.monotonic() + choice.uniform(0.0, 0.15)
            served = 0
            while time.monotonic() < end or served < 20:
                served += one_payload_through(ring, cycle)
            for victim in choice.sample(victims, len(victims)):
                victim.send(signal.SIGKILL)
                victim.process.wait()
                one_payload_through(ring, cycle)
            for victim in victims:
                victim.__exit__()
        for victims in cast:
            for victim in victims:
                victim.__exit__()
        ring.reclaim_dead()
        assert not in_use(ring), f"seed {seed}"
        for ref in ring.ready_refs():
            payload = ring.read(ref)["data"]
            name = content.name_of(payload)
            assert isinstance(name, tuple)
            assert content.mismatch(payload, *name) == ""
        found = ring.statistics()
        assert found.free == 32
        assert found.reclaimed_writes + found.reclaimed_reads >= 1
        # every payload went somewhere: one kill may count one step too many, never one too few
        assert found.freed + found.overwritten + found.discarded >= found.committed - 2 * cycles
        assert found.acquired - 2 * cycles <= found.consumed + found.released + found.reclaimed_reads


def enlist(stack: ExitStack, ring: SharedRingBuffer, seed: int) -> list[Actor]:
    return [
        stack.enter_context(Actor("victim_writer", ring.name, seed)),
        stack.enter_context(Actor("victim_reader", ring.name, seed)),
    ]


def one_payload_through(ring: SharedRingBuffer, sequence: int) -> int:
    """Write and read beside the victims; what they took or overwrote meanwhile is 0, anything wrong is an error."""
    ref = ring.write_raw(content.make(3, sequence, 1024))
    try:
        payload = ring.read(ref)["data"]
    except Exception as error:
        if type(error).__name__ != "StaleSlotError":
            raise
        return 0
    assert content.mismatch(payload, 3, sequence) == ""
    return 1


def test_what_a_killed_taker_had_taken_is_taken_by_another() -> None:
    how_many = 3
    with ring_of() as ring, Actor("take_and_stay", ring.name, how_many) as taker:
        for number in range(how_many + 2):
            ring.write_raw(content.make(0, number, 512), meta={"number": number})
        taker.go_on()
        assert taker.hear() == list(range(how_many))
        with ring.take(9)[0] as other:
            assert other.record == {"number": how_many}
        taker.send(signal.SIGKILL)
        taker.process.wait()
        assert [lease.record for lease in take_all(ring)] == [{"number": number} for number in range(how_many + 2)]


def test_a_writer_learns_which_process_keeps_arrays_on_which_host_since_when_and_what_helps() -> None:
    with ring_of(slots=4, on_full="block", readers=2, block_timeout_s=0.01) as ring:
        refs = [ring.write_raw(b"x") for _ in range(4)]
        before_s = time.monotonic()
        with Actor("keep_arrays", ring.name, *[ref.to_bytes().hex() for ref in refs[:3]]) as trainer:
            assert trainer.hear() == ring.name
            after_s = time.monotonic()
            with pytest.raises(DeadlineExceededError) as caught:
                ring.write_raw(b"y")
            least_s = time.monotonic() - after_s
            (holder,) = ring.holders()
            most_s = time.monotonic() - before_s
            assert (holder.pid, holder.slots) == (trainer.process.pid, 3)
            assert least_s <= holder.held_s <= most_s
            held_s = caught.value.facts["held_s"]
            assert isinstance(held_s, float)
            assert 0 < held_s <= holder.held_s
            assert re.search(
                rf"of 4 on host {os.uname().nodename}: pid {trainer.process.pid} \(python[\d.]*\), "
                rf"reader [0-9a-f]+, holds 3, the longest for {held_s:.1f} s; 1 waits for a first reader\. "
                r"What helps: .*clone them, or read with local='copy'; .*more ring\.slots",
                caught.value.message,
            )
            assert caught.value.facts["holders"] == (trainer.process.pid,)
        assert ring.reclaim_dead() == 3
        assert ring.holders() == []


def take_all(ring: SharedRingBuffer) -> list[ReadLease]:
    """Everything in the ring, and what the dead had of it, in the order of the writes."""
    kept: list[ReadLease] = []
    while ring.statistics().committed > len(kept):
        kept += ring.take(9)
        ring.wait_for_ready(1.0)
    return sorted(kept, key=lambda lease: lease.commit_time_ns)


@pytest.mark.parametrize("how", ["between transitions", "in transition"])
def test_the_lock_of_a_killed_process_is_taken_over(how: str) -> None:
    with ring_of() as ring, Actor("sit_in_section", ring.name, how) as holder:
        ref = ring.write_raw(b"before")
        assert holder.hear() == "ready"
        holder.send(signal.SIGKILL)
        holder.process.wait()
        assert ring.read(ref)["data"].tobytes() == b"before"
        assert ring.read(ring.write_raw(b"after"))["data"].tobytes() == b"after"
        found = ring.statistics()
        assert (found.lock_recoveries, found.repaired_slots) == (1, how == "in transition")


def test_a_stopped_holder_of_the_lock_costs_a_bounded_wait_and_nothing_else() -> None:
    with ring_of(lock_timeout_s=0.2) as ring, Actor("sit_in_section", ring.name, "between transitions") as holder:
        ref = ring.write_raw(b"before")
        assert holder.hear() == "ready"
        stop_process(holder.process.pid)
        for call in (
            lambda: ring.read(ref),
            lambda: ring.write_raw(b"x"),
            lambda: ring.write_raw(b"x", deadline_s=0.01),
        ):
            with pytest.raises(DeadlineExceededError) as caught:
                call()
            assert caught.value.facts["holder_thread_id"] == holder.process.pid
        holder.send(signal.SIGCONT)
        holder.go_on()
        assert holder.hear() == "left"
        assert ring.read(ref)["data"].tobytes() == b"before"
        assert holder.end() == (0, "")
        assert ring.statistics().lock_recoveries == 0


def test_a_lease_dropped_while_the_lock_is_stuck_ends_when_the_lock_is_free_again() -> None:
    with ring_of(lock_timeout_s=0.2) as ring, Actor("sit_in_section", ring.name, "between transitions") as holder:
        array = ring.acquire(ring.write_raw(b"payload")).hand_over()
        assert holder.hear() == "ready"
        stop_process(holder.process.pid)
        del array
        assert in_use(ring) == {SlotState.READING}
        holder.send(signal.SIGCONT)
        holder.go_on()
        assert holder.hear() == "left"
        ring.write_raw(b"any transition does what was left to do")
        assert not in_use(ring)
        assert ring.statistics().consumed == 1


@pytest.mark.parametrize("options", [(), ("-X", "dev", "-W", "error")])
def test_a_reader_that_attaches_and_exits_leaves_the_ring_alone(options: tuple[str, ...]) -> None:
    with ring_of() as ring:
        for _ in range(2):
            ref = ring.write_raw(b"payload")
            with Actor("read_and_leave", ring.name, ref.to_bytes().hex(), options=options) as reader:
                assert reader.hear() == b"payload".hex()
                assert reader.end() == (0, "")
        assert ring.slot_states() == [SlotState.FREE] * 8
        SharedRingBuffer.attach(ring.name).close()


def test_signals_at_any_moment_wedge_nothing() -> None:
    with ring_of(slots=4, slot_bytes=64) as ring:
        with Actor("interrupted", ring.name, 5, 1500) as actor:
            assert actor.hear() == "ready"
            states = actor.hear()
            assert isinstance(states, list)
            assert not {"WRITING", "READING"} & set(states)
            assert actor.end()[0] == 0
        # as others see it, and without anybody having died with the lock
        assert not in_use(ring)
        assert ring.statistics().lock_recoveries == 0
        for ref in ring.ready_refs():
            assert content.mismatch(np.asarray(ring.read(ref)["data"]), 9, 1) == ""


def python(
    program: str, *, options: tuple[str, ...] = ("-X", "dev", "-W", "error")
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *options, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
        timeout=60,
    )


MAKE = """
import multiprocessing, os, signal, sys
from ucxx_transport.config import RingConfig
from ucxx_transport.ring import SharedRingBuffer
def make(*_):
    global ring
    ring = SharedRingBuffer.create(RingConfig(slots=2, slot_bytes=100))
    print(ring.name, flush=True)
"""


@pytest.mark.parametrize(
    ("ending", "code"),
    [
        ("make()", 0),
        ("make(); sys.exit(3)", 3),
        ("make(); raise SystemExit", 0),
        ("make()\nif os.fork() == 0: sys.exit()\nos.wait()\nSharedRingBuffer.attach(ring.name)", 0),
        ("process = multiprocessing.get_context('fork').Process(target=make); process.start(); process.join()", 0),
        ("make(); lease = ring.reserve(); kept = ring.acquire(ring.write_raw(b'x')).hand_over()", 0),
        ("make(); signal.raise_signal(signal.SIGINT)", -signal.SIGINT),
    ],
)
def test_a_creator_that_ends_by_itself_leaves_no_segment(ending: str, code: int) -> None:
    done = python(MAKE + ending)
    assert done.returncode == code, done.stderr
    name = done.stdout.splitlines()[0]
    assert not segment_path(name).exists()
    if code != -signal.SIGINT:
        assert done.stderr == ""


def test_what_a_killed_creator_leaves_is_swept_even_while_a_forked_child_of_it_lives() -> None:
    program = MAKE + (
        "make()\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    os.close(1); os.close(2); sys.stdin.read(); os._exit(0)\n"
        "print(child, flush=True); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        name, child = (process.stdout.readline().strip() for _ in range(2))
        assert process.wait() == -signal.SIGKILL
        assert [info.creator_alive for info in list_segments() if info.name == name] == [False]
        with ring_of(name=name) as ring:
            assert ring.slot_states() == [SlotState.FREE] * 8
        process.stdin.close()
        wait_until(lambda: not Path(f"/proc/{child}").exists(), what="the child ends")


def test_a_ring_that_a_file_size_limit_forbids_fails_cleanly() -> None:
    """`posix_fallocate` failing half-way stands for a /dev/shm that fills up in the middle of a creation."""
    done = python(
        """
        import resource
        from ucxx_transport.config import RingConfig
        from ucxx_transport.errors import ConfigError
        from ucxx_transport.ring import SharedRingBuffer
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        try:
            SharedRingBuffer.create(RingConfig(slots=2, slot_bytes=1 << 20))
        except ConfigError as error:
            print(error.facts["needed_bytes"] > 2 << 20, "lower ring.slots" in error.message)
        """
    )
    assert (done.stdout, done.stderr) == ("True True\n", "")


def test_a_name_is_one_creator_s_among_processes() -> None:
    with ring_of(name=f"taken-{os.getpid()}") as ring:
        done = python(
            f"""
            from ucxx_transport.config import RingConfig
            from ucxx_transport.ring import SharedRingBuffer
            SharedRingBuffer.create(RingConfig(slots=2, slot_bytes=100, name={ring.name!r}))
            """
        )
        assert done.returncode == 1
        assert ConfigError.__name__ in done.stderr
        assert "in use" in done.stderr
        assert ring.read(ring.write_raw(b"alive"))["data"].tobytes() == b"alive"
