"""KeyboardInterrupt at every bytecode at which CPython can raise it, in every call of the ring."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator

import pytest

from tests.support.interrupts import every_point
from tests.unit.ring.conftest import MakeRing
from ucxx_transport.config import RingConfig
from ucxx_transport.ring import SharedRingBuffer, SlotState
from ucxx_transport.ring.segment import list_segments


def write(ring: SharedRingBuffer) -> None:
    ring.write_raw(b"payload", meta={"n": 1})


def reserve_and_commit(ring: SharedRingBuffer) -> None:
    with ring.reserve() as lease:
        lease.buffer[:3] = b"abc"


def reserve_and_abort(ring: SharedRingBuffer) -> None:
    ring.reserve().abort()


def reserve_and_forget(ring: SharedRingBuffer) -> None:
    ring.reserve()


def acquire_and_consume(ring: SharedRingBuffer) -> None:
    with ring.acquire(ring.ready_refs()[0]) as lease:
        lease.mark_consumed()


def acquire_and_release(ring: SharedRingBuffer) -> None:
    with ring.acquire(ring.ready_refs()[0]):
        pass


def acquire_and_hand_over(ring: SharedRingBuffer) -> None:
    ring.acquire(ring.ready_refs()[0]).hand_over()


def read(ring: SharedRingBuffer) -> None:
    ring.read(ring.ready_refs()[0])


def discard(ring: SharedRingBuffer) -> None:
    ring.discard(ring.ready_refs()[0])


def publish(ring: SharedRingBuffer) -> None:
    ring.publish_address("host", [1, 2])
    ring.address()


def reclaim(ring: SharedRingBuffer) -> None:
    ring.reclaim_dead()
    ring.statistics()


@pytest.fixture
def quick_collections() -> Iterator[None]:
    """A collection looks at what the test made, not at all that pytest has: 2 ms instead of 50."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def forgetful_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupt within a finaliser cannot be raised: CPython reports it and keeps nothing of it; pytest does."""
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)


@pytest.mark.usefixtures("quick_collections", "forgetful_hook")
@pytest.mark.parametrize(
    "call",
    [
        write,
        reserve_and_commit,
        reserve_and_abort,
        reserve_and_forget,
        acquire_and_consume,
        acquire_and_release,
        acquire_and_hand_over,
        read,
        discard,
        publish,
        reclaim,
    ],
)
def test_an_interrupt_at_any_bytecode_wedges_nothing(
    make_ring: MakeRing, call: Callable[[SharedRingBuffer], None]
) -> None:
    ring = make_ring(slots=3)
    with SharedRingBuffer.attach(ring.name) as other:
        points = 0

        def prepared() -> None:
            call(ring)

        for slot in range(2):
            ring.write_raw(bytes([slot]))
        for where in every_point(prepared, ("ucxx_transport/ring/",)):
            points += 1
            gc.collect()
            ring.reclaim_dead()
            states = other.slot_states()
            assert not {SlotState.WRITING, SlotState.READING} & set(states), where
            # the lock is free, the headers make sense, and the ring works in another process's eyes
            assert other.read(other.write_raw(b"next"))["data"].tobytes() == b"next", where
            for ref in other.ready_refs():
                assert other.discard(ref), where
            for slot in range(2):
                other.write_raw(bytes([slot]))
        assert points > 5
        assert other.statistics().lock_recoveries == 0


@pytest.mark.may_leave(
    "descriptors", reason="an interrupt between os.open and the store of its result loses the number"
)
@pytest.mark.usefixtures("quick_collections", "forgetful_hook")
def test_an_interrupt_at_any_bytecode_of_a_creation_leaves_no_segment() -> None:
    def create() -> None:
        SharedRingBuffer.create(RingConfig(slots=1, slot_bytes=8, name="interrupted", prefault=False)).close()

    points = 0
    for where in every_point(create, ("ring/segment.py", "ring/shared_ring_buffer.py", "ring/handle.py")):
        points += 1
        gc.collect()
        assert not list_segments(), where
    assert points > 20
