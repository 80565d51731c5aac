from __future__ import annotations

import gc
import itertools
import os
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tests.support.waiting import wait_until
from ucxx_transport.errors import DeadlineExceededError
from ucxx_transport.ring.layout import HEADER_WORDS, IN_TRANSITION_WORD
from ucxx_transport.ring.locking import ReenteredError, SegmentLock, initialise_mutex

WAIT_S = 20.0


class Section:
    """A mutex in plain memory, and the lock over it."""

    def __init__(self, clock: Callable[[], float] | None = None) -> None:
        self.words = memoryview(bytearray(HEADER_WORDS * 8 + 64)).cast("B")
        # bytearrays are aligned to 16 bytes only, and a mutex wants no more
        self.words = self.words[: HEADER_WORDS * 8].cast("Q")
        self.repairs: list[int] = []
        initialise_mutex(self.words)
        self.lock = self.another(clock)

    def another(self, clock: Callable[[], float] | None = None) -> SegmentLock:
        """A second handle on the same mutex."""
        extra = {} if clock is None else {"clock": clock}
        return SegmentLock(self.words, key=b"section", repair=self._repair, **extra)

    def _repair(self, deaths: int) -> None:
        self.repairs.append(deaths)
        self.words[IN_TRANSITION_WORD] = 0


def test_a_section_returns_what_its_body_returns_and_passes_its_error_on() -> None:
    section = Section()
    assert section.lock.run(WAIT_S, lambda a, b: a + b, 1, 2) == 3
    with pytest.raises(ZeroDivisionError):
        section.lock.run(WAIT_S, lambda: 1 // 0)
    assert section.lock.run(WAIT_S, lambda: section.lock.holder_thread_id) == threading.get_native_id()
    assert section.lock.holder_thread_id == 0
    assert section.repairs == []


def test_sections_of_several_threads_never_overlap() -> None:
    section = Section()
    counter = [0]

    def bump() -> None:
        for _ in range(2000):
            section.lock.run(WAIT_S, add)

    def add() -> None:
        before = counter[0]
        for _ in range(3):
            pass
        counter[0] = before + 1

    threads = [threading.Thread(target=bump) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counter == [8000]


@contextmanager
def held(section: Section) -> Iterator[None]:
    """Another thread sits in the section."""
    entered, leave = threading.Event(), threading.Event()

    def sit() -> None:
        entered.set()
        leave.wait()

    thread = threading.Thread(target=lambda: section.lock.run(WAIT_S, sit))
    thread.start()
    entered.wait()
    try:
        yield
    finally:
        leave.set()
        thread.join()


def test_a_wait_for_a_holder_that_does_not_get_on_ends_in_an_error_that_names_it() -> None:
    ticks = itertools.count()
    section = Section(clock=lambda: next(ticks) / 10)
    with held(section), pytest.raises(DeadlineExceededError) as caught:
        section.lock.run(0.5, int)
    assert caught.value.facts["waited_s"] == 0.5
    assert caught.value.facts["holder_thread_id"] not in (0, threading.get_native_id())
    assert section.lock.run(0.5, int) == 0


def test_a_section_within_a_section_is_refused_and_the_outer_one_goes_on() -> None:
    section = Section()
    other = section.another()
    outcomes: list[str] = []

    def body() -> str:
        for lock in (section.lock, other):
            with pytest.raises(ReenteredError):
                lock.run(WAIT_S, outcomes.append, "inner ran")
        assert section.lock.holder_thread_id == threading.get_native_id()
        return "outer ran"

    assert section.lock.run(WAIT_S, body) == "outer ran"
    assert outcomes == []
    assert section.lock.holder_thread_id == 0


def test_a_finaliser_inside_the_section_is_refused_not_deadlocked() -> None:
    section = Section()
    outcomes: list[str] = []

    class Node:
        def __init__(self) -> None:
            self.me = self

    def finalise(_: object) -> None:
        try:
            section.lock.run(WAIT_S, outcomes.append, "ran")
        except ReenteredError:
            outcomes.append("refused")

    guard = weakref.ref(Node(), finalise)
    section.lock.run(WAIT_S, gc.collect)
    assert outcomes == ["refused"]
    assert guard() is None


def test_a_signal_handler_inside_the_section_is_refused_not_deadlocked() -> None:
    section = Section()
    outcomes: list[str] = []

    def handler(signum: int, frame: object) -> None:
        del signum, frame
        with pytest.raises(ReenteredError):
            section.lock.run(WAIT_S, outcomes.append, "ran")
        outcomes.append("refused")

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        section.lock.run(WAIT_S, signal.raise_signal, signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert outcomes == ["refused"]


def test_a_transition_that_was_cut_off_is_repaired_by_the_next_section() -> None:
    section = Section()

    def begin() -> None:
        section.words[IN_TRANSITION_WORD] = 1
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        section.lock.run(WAIT_S, begin)
    assert section.lock.run(WAIT_S, lambda: list(section.repairs)) == [0]
    assert section.lock.run(WAIT_S, lambda: list(section.repairs)) == [0]


def test_a_repair_that_is_cut_off_is_done_again() -> None:
    section = Section()
    section.words[IN_TRANSITION_WORD] = 1
    attempts: list[int] = []

    def repair(deaths: int) -> None:
        attempts.append(deaths)
        if len(attempts) == 1:
            raise KeyboardInterrupt
        section.words[IN_TRANSITION_WORD] = 0

    lock = SegmentLock(section.words, key=b"section", repair=repair)
    with pytest.raises(KeyboardInterrupt):
        lock.run(WAIT_S, int)
    assert lock.holder_thread_id == 0
    assert lock.run(WAIT_S, int) == 0
    assert attempts == [0, 0]


def test_the_lock_of_a_thread_that_died_with_it_is_taken_over() -> None:
    """A thread killed inside the section, as the kernel sees it; processes are killed in the end-to-end tests."""
    section = Section()
    # Python cannot end a thread without unwinding it, so it is done below Python, by the call that ends a C thread.
    ended = threading.Event()

    def die() -> None:
        import ctypes

        ended.set()
        ctypes.CDLL(None).syscall(60, 0)

    pid = os.fork()
    if pid == 0:
        # in a child, since the interpreter never learns that this thread is gone
        thread = threading.Thread(target=lambda: section.lock.run(WAIT_S, die), daemon=True)
        thread.start()
        ended.wait()
        wait_until(lambda: not os.path.exists(f"/proc/self/task/{thread.native_id}"))
        section.words[IN_TRANSITION_WORD] = 1
        seen = section.lock.run(WAIT_S, lambda: list(section.repairs))
        os._exit(0 if seen == [1] and section.lock.holder_thread_id == 0 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
