"""Holds of dead processes, of forgotten calls, of forked children. The dead are played by owners told not to live."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from tests.support.ring_owners import acting_for
from tests.unit.ring.conftest import MakeRing
from ucxx_transport.config import RingConfig
from ucxx_transport.errors import SlotError
from ucxx_transport.machine import Owner
from ucxx_transport.ring import SharedRingBuffer, SlotState
from ucxx_transport.ring.layout import MUTEX_BYTE
from ucxx_transport.ring.transitions import Transitions, Words

A, B = Owner(2**22 + 1, 1), Owner(2**22 + 2, 1)
"""Above every real pid (proc(5): at most 2**22)."""


class Cast:
    """Handles on one ring that act for owners who live and die as told."""

    def __init__(self, stack: ExitStack) -> None:
        self.living = {A, B}
        self._stack = stack

    def alive(self, pid: int, start: int) -> bool:
        return Owner(pid, start) in self.living

    def create(self, owner: Owner, **settings: Any) -> SharedRingBuffer:
        config = RingConfig(**{"slots": 4, "slot_bytes": 64, **settings})
        return self._stack.enter_context(acting_for(SharedRingBuffer.create(config), owner, self.alive))

    def attach(self, ring: SharedRingBuffer, owner: Owner) -> SharedRingBuffer:
        return self._stack.enter_context(acting_for(SharedRingBuffer.attach(ring.name), owner, self.alive))


@pytest.fixture
def cast_of() -> Iterator[Cast]:
    with ExitStack() as stack:
        yield Cast(stack)


def test_a_dead_writer_s_slot_is_free_again_and_a_living_one_s_is_not(cast_of: Cast) -> None:
    ring = cast_of.create(A)
    other = cast_of.attach(ring, B)
    dead, living = other.reserve(), ring.reserve()
    assert ring.reclaim_dead() == 0
    cast_of.living.discard(B)
    assert ring.reclaim_dead() == 1
    assert ring.slot_state(dead.slot) is SlotState.FREE
    assert ring.slot_state(living.slot) is SlotState.WRITING
    assert ring.statistics().reclaimed_writes == 1
    with pytest.raises(SlotError, match="nothing was committed"):
        dead.commit(1)
    assert not dead.abort()
    living.abort()


def test_a_dead_reader_s_attempt_is_released_and_a_living_one_s_goes_on(cast_of: Cast) -> None:
    ring = cast_of.create(A)
    other = cast_of.attach(ring, B)
    ref = ring.write_raw(b"payload")
    dead, living = other.acquire(ref), ring.acquire(ref)
    cast_of.living.discard(B)
    assert ring.reclaim_dead() == 1
    assert ring.slot_state(ref.slot) is SlotState.READING
    assert living.release_reading()
    assert ring.slot_state(ref.slot) is SlotState.READY
    assert not dead.mark_consumed()
    found = ring.statistics()
    assert (found.reclaimed_reads, found.late_finalise) == (1, 1)
    assert ring.read(ref)["data"].tobytes() == b"payload"


def test_what_a_reader_consumed_before_it_died_stays_consumed(cast_of: Cast) -> None:
    ring = cast_of.create(A, readers=2)
    other = cast_of.attach(ring, B)
    ref = ring.write_raw(b"payload")
    assert other.acquire(ref, reader=1).mark_consumed()
    unfinished = other.acquire(ref, reader=2)
    cast_of.living.discard(B)
    assert ring.reclaim_dead() == 1
    assert not unfinished.mark_consumed()
    assert ring.slot_state(ref.slot) is SlotState.READY
    ring.read(ref, reader=3)
    assert ring.slot_state(ref.slot) is SlotState.FREE


@pytest.mark.parametrize("on_full", ["overwrite", "raise", "block"])
def test_a_full_ring_takes_back_what_the_dead_hold_before_it_refuses(cast_of: Cast, on_full: str) -> None:
    """The predecessor's: one stuck reader stopped all writes, and 91 of 400 killed writers left WRITING for ever."""
    ring = cast_of.create(A, slots=2, on_full=on_full)
    other = cast_of.attach(ring, B)
    held = [other.reserve() for _ in range(2)]
    cast_of.living.discard(B)
    assert ring.write_raw(b"fine").slot in (0, 1)
    assert len(held) == 2


@pytest.mark.parametrize("on_full", ["overwrite", "raise", "block"])
def test_a_writer_gets_the_slot_that_another_process_took_back_from_the_dead_first(cast_of: Cast, on_full: str) -> None:
    ring = cast_of.create(A, slots=1, on_full=on_full)
    held = cast_of.attach(ring, B).reserve()

    def alive(pid: int, start: int) -> bool:
        assert Owner(pid, start) == B
        cast_of.living.discard(B)
        ring.reclaim_dead()
        return False

    with acting_for(SharedRingBuffer.attach(ring.name), A, alive) as slower:
        assert slower.write_raw(b"fine", deadline_s=30).slot == held.slot
    assert ring.statistics().full == 0


def test_a_waiting_writer_notices_a_death_while_it_waits(cast_of: Cast) -> None:
    ring = cast_of.create(A, slots=1, on_full="block")
    other = cast_of.attach(ring, B)
    held = other.reserve()
    looks = iter([True, True])

    def alive(pid: int, start: int) -> bool:
        del pid, start
        return next(looks, False)

    with acting_for(SharedRingBuffer.attach(ring.name), A, alive) as waiting:
        assert waiting.write_raw(b"fine", deadline_s=30).slot == held.slot


def test_a_forked_child_cannot_end_what_it_inherited(make_ring: MakeRing) -> None:
    ring = make_ring(slots=3)
    ref = ring.write_raw(b"payload")
    reading, writing, detached = ring.acquire(ref), ring.reserve(), ring.acquire(ref).hand_over()

    def child() -> bool:
        outcomes = [reading.mark_consumed(), reading.release_reading(), writing.abort()]
        try:
            writing.commit()
        except SlotError:
            outcomes.append(False)
        del globals_of_child["detached"]
        own = ring.acquire(ref)
        return not any(outcomes) and own.release_reading() and not ring.unlink()

    globals_of_child = {"detached": detached}
    del detached
    assert in_forked_child(child)
    assert [state.name for state in ring.slot_states()] == ["READING", "WRITING", "FREE"]
    assert reading.mark_consumed()
    writing.commit(1)
    globals_of_child.clear()
    assert [state.name for state in ring.slot_states()] == ["FREE", "READY", "FREE"]


def test_a_forked_child_s_holds_are_taken_back_when_it_dies(make_ring: MakeRing) -> None:
    ring = make_ring(slots=3)
    ref = ring.write_raw(b"payload")
    kept: list[object] = []

    def child() -> bool:
        kept.extend([ring.acquire(ref), ring.reserve()])
        os._exit(0)  # as by a kill: nothing is given back

    assert in_forked_child(child)
    assert [state.name for state in ring.slot_states()] == ["READING", "WRITING", "FREE"]
    assert ring.reclaim_dead() == 2
    assert [state.name for state in ring.slot_states()] == ["READY", "FREE", "FREE"]


def test_a_handle_of_another_process_does_not_reclaim_the_living(make_ring: MakeRing) -> None:
    ring = make_ring()
    held, writing = ring.acquire(ring.write_raw(b"payload")), ring.reserve()
    assert in_forked_child(lambda: ring.reclaim_dead() == 0)
    assert held.mark_consumed()
    writing.abort()


def test_two_handles_of_one_process_do_not_reclaim_each_other(ring: SharedRingBuffer) -> None:
    with SharedRingBuffer.attach(ring.name) as other:
        held, writing = other.acquire(ring.write_raw(b"payload")), ring.reserve()
        assert ring.reclaim_dead() == other.reclaim_dead() == 0
        assert held.mark_consumed()
        writing.abort()


def in_forked_child(work: Callable[[], bool]) -> bool:
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(0 if work() else 1)
        finally:
            os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_views_that_go_while_the_lock_is_held_wait_for_it_once_and_are_settled_later(
    cast_of: Cast, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float | None] = []
    finalise = Transitions.finalise

    def noted(transitions: Transitions, words: Words, reason: int, wait_s: float | None = None) -> bool:
        waits.append(wait_s)
        return finalise(transitions, words, reason, wait_s)

    monkeypatch.setattr(Transitions, "finalise", noted)
    ring = cast_of.create(A, slots=20)
    views = [ring.acquire(ring.write_raw(b"x")).hand_over() for _ in range(20)]
    libc, mutex = ctypes.CDLL(None), ring.mapping.ctypes.data + MUTEX_BYTE
    assert libc.pthread_mutex_lock(ctypes.c_void_p(mutex)) == 0
    views.clear()
    assert waits[0]
    assert waits[1:] == [0.0] * 19
    assert libc.pthread_mutex_unlock(ctypes.c_void_p(mutex)) == 0
    assert ring.slot_states() == [SlotState.READING] * 20
    ring.write_raw(b"y")
    assert ring.slot_states().count(SlotState.FREE) == 19
