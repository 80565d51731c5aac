"""What was delivered once is a duplicate for ever."""

from __future__ import annotations

import pytest

from tests.unit.client.references import reference
from ucxx_transport.client.delivered import DeliveredNames
from ucxx_transport.errors import StaleSlotError


def test_a_payload_is_refused_only_after_its_delivery() -> None:
    names = DeliveredNames(max_rings=4)
    names.check(reference())
    names.check(reference())
    names.add(reference())
    with pytest.raises(StaleSlotError, match="already received") as caught:
        names.check(reference())
    assert caught.value.facts["delivered"] == 8


def test_a_newer_generation_of_the_slot_is_another_payload() -> None:
    names = DeliveredNames(max_rings=4)
    names.add(reference(generation=8))
    names.check(reference(generation=9))


def test_an_older_generation_is_gone_once_a_newer_was_delivered() -> None:
    names = DeliveredNames(max_rings=4)
    names.add(reference(generation=8))
    with pytest.raises(StaleSlotError):
        names.check(reference(generation=7))


def test_slots_and_rings_do_not_answer_for_each_other() -> None:
    names = DeliveredNames(max_rings=4)
    names.add(reference(slot=3))
    names.check(reference(slot=4))
    names.check(reference(ring_id=b"S" * 16))


def test_the_ring_longest_unused_is_forgotten_first() -> None:
    names = DeliveredNames(max_rings=2)
    names.add(reference(ring_id=b"1" * 16))
    names.add(reference(ring_id=b"2" * 16))
    names.add(reference(ring_id=b"1" * 16, slot=9))
    names.add(reference(ring_id=b"3" * 16))
    names.check(reference(ring_id=b"2" * 16))
    with pytest.raises(StaleSlotError):
        names.check(reference(ring_id=b"1" * 16))
