"""RingSource: what a ring offers, and what an ended epoch leaves in it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ucxx_transport.config import RingConfig
from ucxx_transport.ring import SharedRingBuffer, SlotState
from ucxx_transport.ring.layout import AWAITED
from ucxx_transport.ring.segment import host_id
from ucxx_transport.server import RingSource


@pytest.fixture
def ring() -> Iterator[SharedRingBuffer]:
    with SharedRingBuffer.create(RingConfig(slots=4, slot_bytes=64, prefault=False)) as made:
        yield made


@pytest.fixture
def source(ring: SharedRingBuffer) -> RingSource:
    return RingSource(ring)


def is_awaited(ring: SharedRingBuffer) -> bool:
    return ring.server_words[AWAITED] != 0


def test_the_offer_is_the_ring_and_the_address_that_it_has_now(ring: SharedRingBuffer, source: RingSource) -> None:
    offer = source.offer()
    assert (offer.ring_id, offer.ring_name, offer.host_id) == (ring.ring_id, ring.name, host_id())
    assert (offer.host, offer.ports) == (None, ())
    ring.publish_address("10.0.0.1", [5001, 5002])
    assert (source.offer().host, source.offer().ports) == ("10.0.0.1", (5001, 5002))


def test_it_is_awaited_from_the_hold_to_the_binding(ring: SharedRingBuffer, source: RingSource) -> None:
    assert not is_awaited(ring)
    source.hold()
    assert is_awaited(ring)
    source.bind()
    assert not is_awaited(ring)
    source.hold()
    source.release()
    assert not is_awaited(ring)


def test_the_binding_is_one_word_beside_those_of_the_ports(ring: SharedRingBuffer, source: RingSource) -> None:
    before = list(ring.server_words)
    source.hold()
    changed = [at for at, (old, new) in enumerate(zip(before, ring.server_words, strict=True)) if old != new]
    assert changed == [AWAITED]


def test_what_was_written_before_the_first_epoch_belongs_to_it(ring: SharedRingBuffer, source: RingSource) -> None:
    ref = ring.write_raw(b"early")
    source.hold()
    other = ring.write_raw(b"while it waits")
    source.bind()
    source.discard_old()
    assert [ring.slot_state(one.slot) for one in (ref, other)] == [SlotState.READY] * 2


def test_a_new_epoch_begins_without_what_was_written_in_the_old_one(ring: SharedRingBuffer, source: RingSource) -> None:
    source.hold()
    source.bind()
    old = [ring.write_raw(b"old") for _ in range(2)]
    source.hold()
    new = ring.write_raw(b"since")
    source.bind()
    assert [ring.slot_state(one.slot) for one in old] == [SlotState.FREE] * 2
    assert ring.slot_state(new.slot) is SlotState.READY


def test_what_is_being_read_of_an_old_epoch_goes_when_it_is_given_back(
    ring: SharedRingBuffer, source: RingSource
) -> None:
    source.hold()
    source.bind()
    old = ring.write_raw(b"old")
    lease = ring.acquire(old)
    source.hold()
    source.bind()
    source.discard_old()
    assert bytes(lease.buffer) == b"old"
    assert lease.release_reading()
    assert ring.slot_state(old.slot) is SlotState.READY
    source.discard_old()
    assert ring.slot_state(old.slot) is SlotState.FREE


def test_once_nothing_is_left_nothing_more_is_discarded(ring: SharedRingBuffer, source: RingSource) -> None:
    source.hold()
    source.bind()
    source.hold()
    source.bind()
    ref = ring.write_raw(b"new")
    source.discard_old()
    assert ring.slot_state(ref.slot) is SlotState.READY


def test_it_is_healthy_as_long_as_the_ring_is_open(ring: SharedRingBuffer, source: RingSource) -> None:
    assert source.is_healthy(1.0)
    ring.close()
    assert not source.is_healthy(1.0)


def test_a_closed_ring_can_still_be_held_and_released(ring: SharedRingBuffer, source: RingSource) -> None:
    ring.close()
    source.hold()
    source.release()
