from __future__ import annotations

import pytest

from tests.unit.ring.conftest import MakeRing
from ucxx_transport.errors import SlotError, StaleSlotError
from ucxx_transport.ring import SharedRingBuffer, SlotState

FREE, WRITING, READY, READING = SlotState.FREE, SlotState.WRITING, SlotState.READY, SlotState.READING


def test_only_writes_up_to_the_sequence_are_dropped(ring: SharedRingBuffer) -> None:
    assert ring.write_sequence == 0
    old = [ring.write_raw(b"old") for _ in range(2)]
    sequence = ring.write_sequence
    new = ring.write_raw(b"new")
    assert (sequence, ring.write_sequence) == (2, 3)
    assert ring.discard_until(sequence) == 0
    assert [ring.slot_state(ref.slot) for ref in (*old, new)] == [FREE, FREE, READY]
    for ref in old:
        with pytest.raises(StaleSlotError):
            ring.read(ref)
    assert ring.read(new)["data"].tobytes() == b"new"


def test_before_the_first_write_there_is_nothing_to_drop(ring: SharedRingBuffer) -> None:
    ref = ring.write_raw(b"payload")
    assert ring.discard_until(0) == 0
    assert ring.slot_state(ref.slot) is READY


def test_what_is_being_read_stays_and_is_reported(ring: SharedRingBuffer) -> None:
    refs = [ring.write_raw(b"payload") for _ in range(2)]
    with ring.acquire(refs[0]) as lease:
        assert ring.discard_until(ring.write_sequence) == 1
        assert [ring.slot_state(ref.slot) for ref in refs] == [READING, FREE]
        assert bytes(lease.buffer) == b"payload"
    assert ring.slot_state(refs[0].slot) is READY
    assert ring.discard_until(ring.write_sequence) == 0
    assert ring.slot_state(refs[0].slot) is FREE


def test_what_is_being_written_is_a_later_write_once_it_is_complete(ring: SharedRingBuffer) -> None:
    old = ring.write_raw(b"old")
    sequence = ring.write_sequence
    with ring.reserve() as slot:
        assert ring.write_sequence == sequence
        assert ring.discard_until(sequence) == 0
        assert [ring.slot_state(one.slot) for one in (old, slot)] == [FREE, WRITING]
        ref = slot.commit(0)
    assert ring.discard_until(sequence) == 0
    assert ring.slot_state(ref.slot) is READY  # nobody was told of it before
    assert ring.discard_until(ring.write_sequence) == 0
    assert ring.slot_state(ref.slot) is FREE


def test_a_slot_that_was_written_again_is_a_new_write(make_ring: MakeRing) -> None:
    ring = make_ring(slots=1)
    ring.write_raw(b"old")
    sequence = ring.write_sequence
    ref = ring.write_raw(b"new")
    assert ring.discard_until(sequence) == 0
    assert ring.read(ref)["data"].tobytes() == b"new"


def test_a_payload_that_several_are_to_read_is_dropped_whole(make_ring: MakeRing) -> None:
    ring = make_ring(readers=2)
    ref = ring.write_raw(b"payload")
    with ring.acquire(ref, reader=1) as lease:
        assert lease.mark_consumed()
    assert ring.discard_until(ring.write_sequence) == 0
    assert ring.slot_state(ref.slot) is FREE


def test_a_closed_ring_has_nothing_to_drop(ring: SharedRingBuffer) -> None:
    ring.close()
    with pytest.raises(SlotError, match="closed"):
        ring.discard_until(1)
    with pytest.raises(SlotError, match="closed"):
        _ = ring.write_sequence
