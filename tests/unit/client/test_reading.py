"""A read from end to end over the in-memory link: delivered, or the right error, and everything given back."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.support.exchange_rig import open_rig
from tests.support.rows import row
from ucxx_transport.client import Payload
from ucxx_transport.client.connections import SHORTAGE_S
from ucxx_transport.config import RingConfig
from ucxx_transport.errors import ConfigError, ProtocolError, StaleSlotError
from ucxx_transport.ring import SharedRingBuffer, SlotState
from ucxx_transport.schema import Schema, TensorSpec

EPISODE = bytes(range(256)) * 16


def test_a_payload_arrives_whole_and_its_slot_is_free() -> None:
    with open_rig() as rig:
        ref = rig.write(EPISODE)
        with rig.client().read(ref) as payload:
            assert bytes(payload.buffer) == EPISODE
            assert payload.transport == "ucx"
            assert payload.ref == ref
        rig.settle()
        assert rig.ring.slot_state(ref.slot) is SlotState.FREE
        statistics = rig.statistics(1)
        assert (statistics.requests, statistics.delivered, statistics.bytes_sent) == (1, 1, len(EPISODE))


def test_payloads_of_any_size_arrive() -> None:
    rows: list[int] = [0, 1, 7, 8, 63, 64, 1023, 1024, 1025, 8191, 8192, 65536]
    for nbytes in rows:
        with row(nbytes=nbytes), open_rig(ports=1) as rig:
            content = np.random.default_rng(nbytes).bytes(nbytes)
            with rig.client().read(rig.write(content)) as payload:
                assert bytes(payload.buffer) == content


def test_arrays_arrive_under_the_schema_of_the_ring() -> None:
    schema = Schema([TensorSpec("obs", (100, 4), "float32", varlen=True), TensorSpec("done", (3,), "bool")])
    with open_rig(ring=RingConfig(slots=2, schema=schema, prefault=False, checksum=True)) as rig:
        client = rig.client()
        for rows in (100, 7, 0):
            obs = np.random.default_rng(rows).random((rows, 4), dtype=np.float32)
            done = np.array([True, False, True])
            with client.read(rig.ring.write({"obs": obs, "done": done})) as payload:
                arrays = payload.arrays
                assert isinstance(arrays, dict)
                np.testing.assert_array_equal(np.asarray(arrays["obs"]), obs)
                np.testing.assert_array_equal(np.asarray(arrays["done"]), done)


def test_what_other_hosts_are_asked_for_leaves_before_anything_is_read_here() -> None:
    with open_rig(ports=1) as rig, SharedRingBuffer.create(RingConfig(slots=1, slot_bytes=64)) as near:
        client = rig.client(local="auto")
        far = [replace(rig.write(EPISODE), host_id="elsewhere") for _ in range(2)]
        client.consume(far[0])
        under_way: list[int] = []

        def taken(_: int, payload: Payload) -> Payload:
            under_way.append(sum(len(one.attempts) for one in client.core.reads.connections.known.values()))
            return payload

        job = client.core.begin((near.write_raw(b"near"), far[1]), on_payload=taken)
        assert under_way == [1]
        assert [getattr(one, "transport", None) for one in client.outcomes(job)] == ["view", "ucx"]


def test_overlapping_reads_take_the_ports_in_turn() -> None:
    with open_rig(ports=2) as rig:
        client = rig.client()
        for _ in range(10):
            jobs = [client.core.begin((rig.write(EPISODE),)) for _ in range(4)]
            assert all(isinstance(outcome, Payload) for outcome in client.outcomes(*jobs))
        assert [rig.statistics(port).delivered for port in (1, 2)] == [20, 20]


def test_a_group_is_spread_over_the_ports_when_it_is_of_many_or_of_much() -> None:
    rows: list[tuple[int, int, list[int]]] = [
        (4, 4096, [4, 0]),
        (8, 4096, [4, 4]),
        (9, 4096, [5, 4]),
        (2, 1 << 20, [1, 1]),
        (1, 1 << 20, [1, 0]),
    ]
    for count, nbytes, shares in rows:
        with (
            row(count=count, nbytes=nbytes),
            open_rig(ports=2, ring=RingConfig(slots=16, slot_bytes=1 << 20, prefault=False)) as rig,
        ):
            rig.client().consume(*(rig.write(bytes(nbytes)) for _ in range(count)))
            assert [rig.statistics(port).delivered for port in (1, 2)] == shares


def test_small_payloads_of_a_batch_share_messages() -> None:
    with open_rig(ports=1, ring=RingConfig(slots=64, slot_bytes=64 << 10, prefault=False)) as rig:
        client = rig.client()
        sizes = [0, 1, 7, 100, 4096, 4096, 30_000, 32 << 10, 60_000, 10, 20, 64 << 10, 5]
        contents = [np.random.default_rng(size).bytes(size) for size in sizes]
        outcomes = client.read_many([rig.write(content) for content in contents])
        assert [bytes(outcome.buffer) for outcome in outcomes if isinstance(outcome, Payload)] == contents
        assert rig.statistics(1).packed > len(sizes) // 2


def test_one_payload_of_a_shared_message_that_is_gone_costs_the_others_nothing() -> None:
    with open_rig(ports=1, ring=RingConfig(slots=8, slot_bytes=4096, prefault=False)) as rig:
        client = rig.client()
        refs = [rig.write(bytes([number]) * 500) for number in range(4)]
        rig.ring.discard(refs[1])
        outcomes = client.read_many(refs)
        assert [type(outcome) for outcome in outcomes] == [Payload, StaleSlotError, Payload, Payload]
        for number in (0, 2, 3):
            outcome = outcomes[number]
            assert isinstance(outcome, Payload)
            assert bytes(outcome.buffer) == bytes([number]) * 500
        assert client.counts.connections == 1


def test_a_held_payload_of_a_shared_message_keeps_its_bytes() -> None:
    with open_rig(ports=1, ring=RingConfig(slots=8, slot_bytes=4096, prefault=False)) as rig:
        client = rig.client()
        outcomes = client.read_many([rig.write(bytes([number]) * 500) for number in range(4)])
        kept = outcomes.pop()
        outcomes.clear()
        for number in range(4, 20):
            client.consume(*(rig.write(bytes([number]) * 500) for _ in range(4)))
        assert isinstance(kept, Payload)
        assert bytes(kept.buffer) == bytes([3]) * 500
        assert client.counts.lent_buffers == 1


def test_a_shortage_of_descriptors_lowers_the_number_of_connections_for_a_while() -> None:
    with open_rig(ports=2, ring=RingConfig(slots=16, slot_bytes=64, prefault=False)) as rig:
        client = rig.client()
        connections = client.core.reads.connections
        counts = []
        for is_short, passed_s in ((False, 0.0), (True, 0.0), (False, SHORTAGE_S)):
            if is_short:
                connections.short()
            rig.advance(passed_s)
            client.consume(*(rig.write(b"one of so many that both ports are asked") for _ in range(8)))
            counts.append(len(connections.known))
        assert counts == [2, 1, 2]


def test_many_payloads_one_after_the_other_use_one_connection() -> None:
    with open_rig(ports=2) as rig:
        client = rig.client()
        for number in range(40):
            content = bytes([number]) * (100 + number)
            with client.read(rig.write(content)) as payload:
                assert bytes(payload.buffer) == content
        rig.settle()
        assert client.counts.connections == 1
        assert [rig.statistics(port).delivered for port in (1, 2)] == [40, 0]
        assert rig.ring.slot_states() == [SlotState.FREE] * 4


def test_what_the_caller_provides_is_filled_and_the_pool_left_alone() -> None:
    with open_rig() as rig:
        client, into = rig.client(), bytearray(5000)
        payload = client.read(rig.write(EPISODE), into=into)
        assert into[: len(EPISODE)] == EPISODE
        assert client.counts.lent_buffers == 0
        assert bytes(payload.buffer) == EPISODE


def test_an_unfit_buffer_is_refused_before_anything_is_asked_for() -> None:
    with open_rig() as rig:
        ref = rig.write(EPISODE)
        with pytest.raises(ConfigError, match="writable"):
            rig.client().read(ref, into=bytearray(10))
        assert rig.requests() == 0
        assert rig.ring.slot_state(ref.slot) is SlotState.READY


def test_an_overwritten_payload_is_stale_never_another_one() -> None:
    with open_rig() as rig:
        client = rig.client()
        ref = rig.write(b"old")
        newer = [rig.write(b"new") for _ in range(4)]
        with pytest.raises(StaleSlotError):
            client.read(ref)
        for other in newer:
            with client.read(other) as payload:
                assert bytes(payload.buffer) == b"new"


def test_stale_is_asked_for_once_and_never_retried() -> None:
    with open_rig(ports=4) as rig:
        client = rig.client(read_attempts=5)
        ref = rig.write(EPISODE)
        rig.ring.discard(ref)
        with pytest.raises(StaleSlotError):
            client.read(ref)
        statistics = client.counts
        assert rig.requests() == 1
        assert (statistics.stale, statistics.retries, statistics.rotations, statistics.quarantined) == (1, 0, 0, 0)


def test_a_payload_of_an_earlier_ring_is_stale() -> None:
    with open_rig() as rig:
        ref = replace(rig.write(EPISODE), ring_id=b"before".ljust(16, b"-"))
        with pytest.raises(StaleSlotError):
            rig.client().read(ref)
        assert rig.requests() == 0, "the ring was not even asked"


def test_a_payload_of_an_earlier_ring_that_is_read_first_costs_no_other_payload_of_its_schema() -> None:
    schema = Schema([TensorSpec("done", (3,), "bool")])
    with open_rig(ring=RingConfig(slots=4, schema=schema, prefault=False)) as rig:
        client = rig.client()
        for _ in range(2):
            ref = rig.ring.write({"done": np.array([True, False, True])})
            old = replace(ref, ring_id=b"before".ljust(16, b"-"))
            outcomes = client.read_many([old, ref])
            assert isinstance(outcomes[0], StaleSlotError)
            assert isinstance(outcomes[1], Payload)
            outcomes[1].release()


def test_a_slot_out_of_range_is_an_error_and_no_reason_to_distrust_a_port() -> None:
    rows: list[int] = [4, 5, 1 << 31, (1 << 32) - 1]
    for slot in rows:
        with row(slot=slot), open_rig() as rig:
            client = rig.client()
            ref = rig.write(EPISODE)
            with pytest.raises(ProtocolError):
                client.read(replace(ref, slot=slot))
            assert client.counts.quarantined == 0
            with client.read(ref) as payload:
                assert bytes(payload.buffer) == EPISODE


def test_a_reference_that_lies_about_the_length_gets_nothing_and_costs_nothing() -> None:
    rows: list[int] = [0, 1, 4095, 4097, 1 << 20]
    for nbytes in rows:
        with row(nbytes=nbytes), open_rig() as rig:
            client = rig.client()
            ref = rig.write(EPISODE)
            with pytest.raises(ProtocolError, match="4096 bytes"):
                client.read(replace(ref, nbytes=nbytes))
            rig.settle()
            assert rig.ring.slot_state(ref.slot) is SlotState.READY
            assert client.counts.quarantined == 0
            with client.read(ref) as payload:
                assert bytes(payload.buffer) == EPISODE


def test_a_payload_delivered_once_is_a_duplicate_for_this_client_without_asking_anybody() -> None:
    with open_rig(ring=RingConfig(slots=4, slot_bytes=8192, prefault=False, readers=2)) as rig:
        client = rig.client()
        ref = rig.write(EPISODE)
        client.consume(ref)
        asked = rig.requests()
        with pytest.raises(StaleSlotError, match="already received"):
            client.read(ref)
        assert rig.requests() == asked
        assert client.counts.duplicates == 1


def test_every_reader_of_several_gets_the_payload_once() -> None:
    with open_rig(ring=RingConfig(slots=4, slot_bytes=8192, prefault=False, readers=2)) as rig:
        ref = rig.write(EPISODE)
        for client in (rig.client(), rig.client()):
            assert rig.ring.slot_state(ref.slot) is SlotState.READY
            with client.read(ref) as payload:
                assert bytes(payload.buffer) == EPISODE
            rig.settle()
        assert rig.ring.slot_state(ref.slot) is SlotState.FREE


def test_two_reads_of_one_payload_at_once_deliver_it_once() -> None:
    with open_rig() as rig:
        client = rig.client()
        ref = rig.write(EPISODE)
        outcomes = client.outcomes(*(client.core.begin((ref,)) for _ in range(4)))
        delivered = [outcome for outcome in outcomes if not isinstance(outcome, BaseException)]
        assert len(delivered) == 1
        assert isinstance(delivered[0], Payload)
        assert bytes(delivered[0].buffer) == EPISODE
        assert all(isinstance(outcome, StaleSlotError) for outcome in outcomes if outcome not in delivered)
        rig.settle()
        assert rig.ring.slot_state(ref.slot) is SlotState.FREE


def test_a_reference_without_an_address_says_what_to_do() -> None:
    with open_rig() as rig:
        ref = replace(rig.write(EPISODE), host=None, ports=())
        with pytest.raises(ConfigError, match="UCXXServer"):
            rig.client().read(ref)


def test_a_payload_larger_than_allowed_is_refused_before_memory_is_taken() -> None:
    with open_rig() as rig:
        client = rig.client(max_payload_bytes=1000)
        with pytest.raises(ConfigError, match="max_payload_bytes"):
            client.read(rig.write(EPISODE))
        assert rig.requests() == 0


def test_one_bad_slot_does_not_cost_the_batch() -> None:
    with open_rig() as rig:
        client = rig.client()
        refs = [rig.write(bytes([number]) * 100) for number in range(4)]
        rig.ring.discard(refs[1])
        refs[3] = replace(refs[3], slot=99)
        outcomes = client.read_many(refs)
        assert [type(outcome).__name__ for outcome in outcomes] == [
            "Payload",
            "StaleSlotError",
            "Payload",
            "ProtocolError",
        ]


def test_closing_takes_leave_so_that_no_end_is_lost() -> None:
    with open_rig() as rig:
        client = rig.client()
        ref = rig.write(EPISODE)
        payload = client.read(ref)
        client.close()
        assert rig.ring.slot_state(ref.slot) is SlotState.FREE
        assert bytes(payload.buffer) == EPISODE, "payloads outlive their client"
        client.close()
        with pytest.raises(ConfigError, match="closed"):
            client.read(rig.write(EPISODE))
