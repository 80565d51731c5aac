"""What was delivered once is a duplicate for ever."""

from __future__ import annotations

import threading

import pytest

from tests.support.payloads import ref_to
from ucxx_transport.client.payload import Deduplicator
from ucxx_transport.errors import StaleSlotError


def test_a_payload_is_refused_only_after_its_delivery() -> None:
    names = Deduplicator(max_rings=4)
    names.check(ref_to())
    names.check(ref_to())
    names.claim(ref_to())
    with pytest.raises(StaleSlotError, match="already received") as caught:
        names.check(ref_to())
    assert caught.value.facts["delivered"] == 8


def test_of_many_threads_that_claim_a_payload_one_gets_it() -> None:
    names = Deduplicator(max_rings=4)
    got: list[int] = []
    start = threading.Barrier(4)

    def work() -> None:
        start.wait()
        for generation in range(1, 500):
            try:
                names.claim(ref_to(generation=generation))
            except StaleSlotError:
                continue
            got.append(generation)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == len(set(got))
    assert 499 in got


def test_a_newer_generation_of_the_slot_is_another_payload() -> None:
    names = Deduplicator(max_rings=4)
    names.claim(ref_to(generation=8))
    names.check(ref_to(generation=9))


def test_an_older_generation_is_gone_once_a_newer_was_delivered() -> None:
    names = Deduplicator(max_rings=4)
    names.claim(ref_to(generation=8))
    with pytest.raises(StaleSlotError):
        names.check(ref_to(generation=7))


def test_slots_and_rings_do_not_answer_for_each_other() -> None:
    names = Deduplicator(max_rings=4)
    names.claim(ref_to(slot=3))
    names.check(ref_to(slot=4))
    names.check(ref_to(ring_id=b"S" * 16))


def test_the_ring_longest_unused_is_forgotten_first() -> None:
    names = Deduplicator(max_rings=2)
    names.claim(ref_to(ring_id=b"1" * 16))
    names.claim(ref_to(ring_id=b"2" * 16))
    names.claim(ref_to(ring_id=b"1" * 16, slot=9))
    names.claim(ref_to(ring_id=b"3" * 16))
    names.check(ref_to(ring_id=b"2" * 16))
    with pytest.raises(StaleSlotError):
        names.check(ref_to(ring_id=b"1" * 16))
