"""`take`: what is there, in order, to one taker each; envelopes; and the wait for more."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Callable, MutableMapping
from functools import partial
from typing import Any

import pytest

from tests.support.interrupts import signalled_when
from tests.support.ring_owners import acting_for
from tests.support.rows import row
from tests.support.waiting import is_asleep, wait_until
from tests.unit.ring.conftest import MakeRing
from ucxx_transport.errors import ConfigError, ProtocolError, SlotError
from ucxx_transport.machine import Owner
from ucxx_transport.ring import ReadLease, SharedRingBuffer, SlotState, transitions
from ucxx_transport.ring.layout import TAKERS_WORD
from ucxx_transport.schema.episode_record import EpisodeRecord, RewardSummary, record_envelope
from ucxx_transport.schema.wire_form import pack

LONG_S = 600.0


def payloads(leases: list[ReadLease]) -> list[bytes]:
    return [bytes(lease.buffer) for lease in leases]


def consume(leases: list[ReadLease]) -> None:
    for lease in leases:
        assert lease.mark_consumed()


def write(ring: SharedRingBuffer, *numbers: int) -> None:
    for number in numbers:
        ring.write_raw(bytes([number]) * number)


def test_what_is_there_is_taken_in_the_order_of_the_writes_or_backwards(make_ring: MakeRing) -> None:
    rows: list[tuple[bool, int, int | None, list[int]]] = [
        (False, 2, None, [1, 2]),
        (True, 2, None, [4, 3]),
        (False, 99, None, [1, 2, 3, 4]),
        (True, 99, None, [4, 3, 2, 1]),
        (False, 99, 3, [1, 2]),
        (False, 99, 6, [1, 2, 3]),
        (True, 99, 8, [4, 3]),
    ]
    for newest, most, max_bytes, expected in rows:
        with row(newest=newest, most=most, max_bytes=max_bytes):
            ring = make_ring(slots=5)
            write(ring, 9, 1, 2)
            consume(ring.take(1))  # so that the order of the slots is not that of the writes
            write(ring, 3, 4)
            leases = ring.take(most, max_bytes=max_bytes, newest=newest)
            assert [lease.nbytes for lease in leases] == expected
            assert payloads(leases) == [bytes([number]) * number for number in expected]
            assert ring.statistics().reading == len(expected)
            consume(leases)


def test_nothing_to_take_is_an_empty_list_and_leaves_no_hold(ring: SharedRingBuffer) -> None:
    assert ring.take(64) == []
    held = ring.reserve()
    assert ring.take(64) == []
    held.abort()
    assert ring.reclaim_dead() == 0
    assert ring.statistics().acquired == 0


def test_a_first_payload_above_max_bytes_is_an_error_that_says_its_size(ring: SharedRingBuffer) -> None:
    write(ring, 7, 1)
    with pytest.raises(ConfigError) as caught:
        ring.take(2, max_bytes=6)
    assert (caught.value.facts["field"], caught.value.facts["nbytes"]) == ("max_bytes", 7)
    assert ring.statistics().ready == 2
    consume(ring.take(2, max_bytes=8))


def test_numbers_that_ask_for_nothing_are_refused(ring: SharedRingBuffer) -> None:
    rows: list[tuple[dict[str, Any], str]] = [
        ({"max_payloads": 0}, "max_payloads"),
        ({"max_payloads": 1, "max_bytes": -1}, "max_bytes"),
        ({"max_payloads": 1, "reader": -1}, "reader"),
        ({"max_payloads": 1, "reader": 2**63}, "reader"),
    ]
    for arguments, field in rows:
        with row(arguments=arguments), pytest.raises(ConfigError) as caught:
            ring.take(**arguments)
        assert caught.value.facts["field"] == field
    for wait_s in (-1.0, float("nan")):
        with row(wait_s=wait_s), pytest.raises(ConfigError):
            ring.wait_for_ready(wait_s)


def test_a_taken_payload_is_given_to_no_other_taker_until_it_is_given_back(make_ring: MakeRing) -> None:
    ring = make_ring(slots=4)
    write(ring, 1, 2, 3)
    with SharedRingBuffer.attach(ring.name) as other:
        first = ring.take(1, reader=1)
        assert payloads(other.take(1, reader=2)) == [b"\2\2"]  # and dropped: given back
        assert [lease.nbytes for lease in other.take(9, reader=2)] == [2, 3]
        assert first[0].release_reading()
        assert [lease.nbytes for lease in ring.take(9, reader=1)] == [1, 2, 3]


def test_takers_in_many_threads_share_the_payloads_out(make_ring: MakeRing) -> None:
    ring = make_ring(slots=64, on_full="block")
    handles = [SharedRingBuffer.attach(ring.name) for _ in range(3)]
    number = 3000
    had: list[list[int]] = [[] for _ in handles]
    done = threading.Event()

    def run(handle: SharedRingBuffer, mine: list[int], reader: int) -> None:
        while not done.is_set() or handle.get_ready_count():
            for turn, lease in enumerate(handle.take(7, newest=reader == 2, reader=reader)):
                value = int.from_bytes(lease.buffer, "little")
                if turn == 6:
                    assert lease.release_reading()
                else:
                    mine.append(value)
                    assert lease.mark_consumed()
            handle.wait_for_ready(0.01, reader=reader)

    threads = [
        threading.Thread(target=run, args=(handle, mine, index))
        for index, (handle, mine) in enumerate(zip(handles, had, strict=True))
    ]
    for thread in threads:
        thread.start()
    for value in range(number):
        ring.write_raw(value.to_bytes(8, "little"))
    done.set()
    for thread in threads:
        thread.join()
    assert sorted(itertools.chain.from_iterable(had)) == list(range(number))
    for handle in handles:
        handle.close()


# several readers


def test_each_reader_of_a_shared_ring_takes_every_payload_once_while_others_read_it(make_ring: MakeRing) -> None:
    ring = make_ring(slots=8, readers=2)
    write(ring, 1, 2, 3)
    first = ring.take(2, reader=1)
    assert [lease.nbytes for lease in first] == [1, 2]
    second = ring.take(9, reader=2)
    assert [lease.nbytes for lease in second] == [1, 2, 3]
    assert [lease.nbytes for lease in ring.take(9, reader=3)] == [3]  # and given back
    assert [lease.nbytes for lease in ring.take(9, reader=1)] == [3]
    consume(second)
    assert [lease.nbytes for lease in ring.take(9, newest=True, reader=1)] == [3]
    assert ring.take(9, reader=2) == []
    consume(first)
    assert ring.statistics().ready == 1


def test_a_reader_far_ahead_of_the_others_begins_behind_what_it_has_had(make_ring: MakeRing) -> None:
    ring = make_ring(slots=64, readers=2)
    had: dict[int, list[int]] = {1: [], 2: []}
    choose = random.Random(7)
    for number in range(1, 400):
        value = number.to_bytes(4, "little")
        if ring.get_ready_count() < 60:
            ring.write_raw(value)
        for reader, every in ((1, 1), (2, 7)):
            if number % every == 0:
                for lease in ring.take(3 * every, newest=choose.random() < 0.2, reader=reader):
                    if choose.random() < 0.2:
                        assert lease.release_reading()
                    else:
                        had[reader].append(int.from_bytes(lease.buffer, "little"))
                        assert lease.mark_consumed()
    for reader, values in had.items():
        while leases := ring.take(64, reader=reader):
            values.extend(int.from_bytes(lease.buffer, "little") for lease in leases)
            consume(leases)
    assert sorted(had[1]) == sorted(had[2])
    assert len(set(had[1])) == len(had[1]) == ring.statistics().committed
    assert ring.slot_states() == [SlotState.FREE] * 64


def test_what_a_take_of_the_newest_leaves_is_taken_later_in_either_order(make_ring: MakeRing) -> None:
    for newest, expected in ((False, [1, 2, 3, 5]), (True, [5, 3, 2, 1])):
        with row(newest=newest):
            ring = make_ring(slots=8, readers=2)
            write(ring, 1, 2, 3, 4)
            held = ring.take(1, newest=True, reader=1)
            assert [lease.nbytes for lease in held] == [4]
            write(ring, 5)
            held += ring.take(9, newest=newest, reader=1)
            assert [lease.nbytes for lease in held[1:]] == expected
            assert ring.take(9, newest=newest, reader=1) == []
            write(ring, 6)
            held += ring.take(9, newest=newest, reader=1)
            assert [lease.nbytes for lease in held[5:]] == [6]


def test_an_unnamed_reader_is_not_given_what_it_holds(make_ring: MakeRing) -> None:
    ring = make_ring(readers=2)
    write(ring, 1)
    held = ring.take(9)
    assert ring.take(9) == []
    consume(held)
    consume(ring.take(9))  # each of its reads counts
    assert ring.take(9) == []
    assert ring.statistics().freed == 1


def test_a_payload_with_as_many_attempts_as_it_carries_is_passed_over_and_taken_later(make_ring: MakeRing) -> None:
    ring = make_ring(readers=3)
    write(ring, 1, 2)
    ref = ring.ready_refs()[0]
    crowd = [ring.acquire(ref, reader=1) for _ in range(8)]
    (held,) = ring.take(9, reader=2)
    assert held.nbytes == 2
    assert crowd.pop().mark_consumed()
    assert [lease.nbytes for lease in ring.take(9, reader=2)] == [1]


# envelopes


def test_a_taken_payload_says_what_its_writer_said_of_it_and_when(make_ring: MakeRing) -> None:
    rows: list[tuple[int, dict[str, Any]]] = [
        (1024, {}),
        (1024, {"policy_version": 3, "tags": ["a", None, True], "nested": {"x": 1.5}}),
        (64, {"text": "x" * 54}),
        (1, {"text": "x" * 54}),
        (1024, {"text": "x" * 1013}),
    ]
    for room, meta in rows:
        with row(room=room, meta=meta):
            ring = make_ring(envelope_bytes=room)
            before = time.time_ns()
            written = [ring.write_raw(b"one", meta=meta), ring.write_raw(b"two")]
            with ring.reserve(3, meta=meta) as lease:
                lease.buffer[:] = b"abc"
            written.append(lease.ref)
            taken = ring.take(9)
            assert [lease.record for lease in taken] == [meta or None, None, meta or None]
            assert taken[0].envelope == (pack(meta) if meta else b"")
            assert [ring.reference(lease) for lease in taken] == written
            assert before <= taken[0].commit_time_ns <= taken[1].commit_time_ns <= time.time_ns()
            with ring.acquire(written[0]) as again:
                assert (again.record, again.commit_time_ns) == (taken[0].record, taken[0].commit_time_ns)
            assert ring.statistics().envelopes_left_out == 0


def test_an_envelope_that_is_too_large_is_left_out_counted_and_logged_once(
    make_ring: MakeRing, log_events: list[MutableMapping[str, Any]]
) -> None:
    ring = make_ring(envelope_bytes=64, slot_bytes=64, slots=3)
    large = {"text": "x" * 60}
    refs = [ring.write_raw(bytes([number]) * 64, meta=large) for number in range(3)]
    taken = ring.take(9)
    assert [ref.meta for ref in refs] == [large] * 3
    assert [(lease.envelope, lease.record, ring.reference(lease).meta) for lease in taken] == [(b"", None, {})] * 3
    assert payloads(taken) == [bytes([number]) * 64 for number in range(3)]
    assert ring.statistics().envelopes_left_out == 3
    assert [event["event"] for event in log_events] == ["envelope_left_out"]


def test_a_ring_without_envelopes_counts_none_as_left_out(make_ring: MakeRing) -> None:
    ring = make_ring(envelope_bytes=0)
    ring.write_raw(b"payload", meta={"a": 1})
    (lease,) = ring.take(1)
    assert (lease.envelope, lease.record, payloads([lease])) == (b"", None, [b"payload"])
    assert ring.statistics().envelopes_left_out == 0


def test_the_whole_record_of_a_payload_is_taken_with_it(ring: SharedRingBuffer) -> None:
    for meta in ({}, {"seed": 7}):
        with row(meta=meta):
            facts: dict[str, Any] = {
                "worker_id": "worker-0",
                "sequence": 7,
                "episode_length": 3,
                "rewards": RewardSummary(total=3.0, mean=1.0, least=0.0, most=2.0),
                "policy_version": -1,
            }
            ref = ring.write_raw(b"payload", meta=meta, envelope=record_envelope(**facts, meta=meta))
            (lease,) = ring.take(1)
            assert lease.record is not None
            assert ring.reference(lease) == ref
            record = EpisodeRecord(**facts, ref=ref)
            assert EpisodeRecord.from_envelope(lease.record, ring.reference(lease)) == record
            assert EpisodeRecord.from_dict({**lease.record, "ref": ref.to_dict()}) == record
            assert lease.mark_consumed()


def test_an_envelope_that_is_no_mapping_of_plain_values_is_refused_by_who_reads_it(ring: SharedRingBuffer) -> None:
    rows: list[bytes] = [
        b"\xc1",
        b"\x01",
        b"\x90",
        b"\x81\x01\x02",
        b"\x81\xa1a\xc4\x01x",
        b"\x81\xa1a\xcb\x7f\xf0" + bytes(6),
        b"\x81\xa1a" * 20 + b"\xc0",
        b"\x82\xaeucxx_transport\x01\xa3ref\x05",
    ]
    for envelope in rows:
        with row(envelope=envelope):
            ring.write_raw(b"payload", envelope=envelope)
            (lease,) = ring.take(1)
            assert lease.envelope == envelope
            with pytest.raises(ProtocolError):
                ring.reference(lease)
            assert lease.mark_consumed()


def test_a_lease_that_has_ended_or_is_another_ring_s_has_no_reference(make_ring: MakeRing) -> None:
    ring, other = make_ring(), make_ring()
    ring.write_raw(b"payload")
    (lease,) = ring.take(1)
    with pytest.raises(SlotError, match="another ring"):
        other.reference(lease)
    assert lease.mark_consumed()
    for use in (lambda: ring.reference(lease), lambda: lease.envelope, lambda: lease.record):
        with pytest.raises(SlotError, match="has ended"):
            use()


# waiting


@pytest.fixture
def _never_looks_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A taker that is not woken sleeps until long after the test has failed."""
    monkeypatch.setattr(transitions, "LOOK_EVERY_S", LONG_S)


def awaits_a_payload(ring: SharedRingBuffer, thread_id: int) -> bool:
    """Whether a thread sleeps on the count of READY slots: it has said so, and runs nothing."""
    return bool(ring.mapping.view("u8")[TAKERS_WORD]) and is_asleep(thread_id)


def commit(ring: SharedRingBuffer, lease: ReadLease | None) -> None:
    assert lease is None
    ring.write_raw(b"payload")


def give_back(ring: SharedRingBuffer, lease: ReadLease | None) -> None:
    assert lease is not None
    assert lease.release_reading()
    assert ring.get_ready_count() == 1


@pytest.mark.usefixtures("_never_looks_again")
def test_a_waiting_taker_is_woken_by_a_commit_and_by_a_payload_given_back(make_ring: MakeRing) -> None:
    rows: list[Callable[[SharedRingBuffer, ReadLease | None], None]] = [commit, give_back]
    for wake in rows:
        with row(wake=wake.__name__):
            ring = make_ring()
            lease = None
            if wake is give_back:
                ring.write_raw(b"payload")
                (lease,) = ring.take(1)
            taken: list[ReadLease] = []
            thread = threading.Thread(target=take_or_wait, args=(ring, taken))
            thread.start()
            assert thread.native_id is not None
            wait_until(partial(awaits_a_payload, ring, thread.native_id))
            wake(ring, lease)
            thread.join()
            assert payloads(taken) == [b"payload"]


def take_or_wait(ring: SharedRingBuffer, taken: list[ReadLease]) -> None:
    while not taken:
        taken.extend(ring.take(1))
        if not taken:
            assert ring.wait_for_ready(LONG_S)


@pytest.mark.usefixtures("_never_looks_again")
def test_a_taker_is_woken_when_a_payload_that_others_still_read_is_given_back(make_ring: MakeRing) -> None:
    ring = make_ring(readers=2)
    ring.write_raw(b"payload")
    held = [ring.take(1, reader=reader)[0] for reader in (1, 2)]
    assert ring.take(1, reader=3) == []
    assert not ring.wait_for_ready(0, reader=3)
    assert held[0].release_reading()
    assert ring.wait_for_ready(0, reader=3)
    assert payloads(ring.take(1, reader=3)) == [b"payload"]


def test_a_wait_without_anything_new_ends_in_time_and_what_a_take_left_ends_it_at_once(ring: SharedRingBuffer) -> None:
    assert not ring.wait_for_ready(0)
    assert ring.take(1) == []
    assert not ring.wait_for_ready(0.001)
    write(ring, 1, 2)
    assert ring.wait_for_ready(LONG_S)
    consume(ring.take(1))
    assert ring.wait_for_ready(LONG_S)
    consume(ring.take(9))
    assert not ring.wait_for_ready(0)


def test_payloads_of_a_dead_taker_end_the_wait_of_another(make_ring: MakeRing) -> None:
    ring = make_ring()
    write(ring, 1, 2)
    dead = Owner(2**22 + 1, 1)
    with acting_for(SharedRingBuffer.attach(ring.name), dead) as other:
        held = other.take(2)
        assert len(held) == 2
        assert ring.take(2) == []
        assert ring.wait_for_ready(LONG_S)
        assert [lease.nbytes for lease in ring.take(2)] == [1, 2]


def test_an_interrupt_ends_a_wait_at_once(ring: SharedRingBuffer) -> None:
    main = threading.get_native_id()
    assert ring.take(1) == []

    with pytest.raises(KeyboardInterrupt), signalled_when(lambda: awaits_a_payload(ring, main)):
        ring.wait_for_ready(LONG_S)
    write(ring, 1)
    assert ring.wait_for_ready(LONG_S)
