"""A read from end to end over the in-memory link: delivered, or the right error, and everything given back."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from tests.support.exchange_rig import open_rig
from tests.support.rows import row
from tests.support.virtual_time import settle
from ucxx_transport.config import RingConfig
from ucxx_transport.errors import ConfigError, ProtocolError, StaleSlotError
from ucxx_transport.ring import SlotState
from ucxx_transport.schema import Schema, TensorSpec

pytestmark = pytest.mark.anyio

EPISODE = bytes(range(256)) * 16


async def test_a_payload_arrives_whole_and_its_slot_is_free() -> None:
    async with open_rig() as rig:
        ref = rig.write(EPISODE)
        with await rig.client().read(ref) as payload:
            assert bytes(payload.buffer) == EPISODE
            assert payload.transport == "ucx"
            assert payload.ref == ref
        await settle()
        assert rig.ring.slot_state(ref.slot) is SlotState.FREE
        statistics = rig.statistics(1)
        assert (statistics.requests, statistics.delivered, statistics.bytes_sent) == (1, 1, len(EPISODE))


async def test_payloads_of_any_size_arrive() -> None:
    rows: list[int] = [0, 1, 7, 8, 63, 64, 1023, 1024, 1025, 8191, 8192, 65536]
    for nbytes in rows:
        with row(nbytes=nbytes):
            async with open_rig(ports=1) as rig:
                content = np.random.default_rng(nbytes).bytes(nbytes)
                with await rig.client().read(rig.write(content)) as payload:
                    assert bytes(payload.buffer) == content


async def test_arrays_arrive_under_the_schema_of_the_ring() -> None:
    schema = Schema([TensorSpec("obs", (100, 4), "float32", varlen=True), TensorSpec("done", (3,), "bool")])
    async with open_rig(ring=RingConfig(slots=2, schema=schema, prefault=False, checksum=True)) as rig:
        client = rig.client()
        for rows in (100, 7, 0):
            obs = np.random.default_rng(rows).random((rows, 4), dtype=np.float32)
            done = np.array([True, False, True])
            with await client.read(rig.ring.write({"obs": obs, "done": done})) as payload:
                arrays = payload.arrays
                assert isinstance(arrays, dict)
                np.testing.assert_array_equal(np.asarray(arrays["obs"]), obs)
                np.testing.assert_array_equal(np.asarray(arrays["done"]), done)


async def test_overlapping_reads_take_the_ports_in_turn() -> None:
    async with open_rig(ports=2) as rig:
        client = rig.client()
        for _ in range(10):
            await client.read_many([rig.write(EPISODE) for _ in range(4)])
        await settle()
        assert [rig.statistics(port).delivered for port in (1, 2)] == [20, 20]


async def test_many_payloads_one_after_the_other_use_one_connection() -> None:
    async with open_rig(ports=2) as rig:
        client = rig.client()
        for number in range(40):
            content = bytes([number]) * (100 + number)
            with await client.read(rig.write(content)) as payload:
                assert bytes(payload.buffer) == content
        await settle()
        assert client.statistics().connections == 1
        assert [rig.statistics(port).delivered for port in (1, 2)] == [40, 0]
        assert rig.ring.slot_states() == [SlotState.FREE] * 4


async def test_what_the_caller_provides_is_filled_and_the_pool_left_alone() -> None:
    async with open_rig() as rig:
        client, into = rig.client(), bytearray(5000)
        payload = await client.read(rig.write(EPISODE), into=into)
        assert into[: len(EPISODE)] == EPISODE
        assert client.statistics().lent_buffers == 0
        assert bytes(payload.buffer) == EPISODE


async def test_an_unfit_buffer_is_refused_before_anything_is_asked_for() -> None:
    async with open_rig() as rig:
        ref = rig.write(EPISODE)
        with pytest.raises(ConfigError, match="writable"):
            await rig.client().read(ref, into=bytearray(10))
        assert rig.requests() == 0
        assert rig.ring.slot_state(ref.slot) is SlotState.READY


async def test_an_overwritten_payload_is_stale_never_another_one() -> None:
    async with open_rig() as rig:
        client = rig.client()
        ref = rig.write(b"old")
        newer = [rig.write(b"new") for _ in range(4)]
        with pytest.raises(StaleSlotError):
            await client.read(ref)
        for other in newer:
            with await client.read(other) as payload:
                assert bytes(payload.buffer) == b"new"


async def test_stale_is_asked_for_once_and_never_retried() -> None:
    async with open_rig(ports=4) as rig:
        client = rig.client(read_attempts=5)
        ref = rig.write(EPISODE)
        rig.ring.discard(ref)
        with pytest.raises(StaleSlotError):
            await client.read(ref)
        statistics = client.statistics()
        assert rig.requests() == 1
        assert (statistics.stale, statistics.retries, statistics.rotations, statistics.quarantined) == (1, 0, 0, 0)


async def test_a_payload_of_an_earlier_ring_is_stale() -> None:
    async with open_rig() as rig:
        ref = replace(rig.write(EPISODE), ring_id=b"before".ljust(16, b"-"))
        with pytest.raises(StaleSlotError):
            await rig.client().read(ref)
        assert rig.requests() == 0, "the ring was not even asked"


async def test_a_slot_out_of_range_is_an_error_and_no_reason_to_distrust_a_port() -> None:
    rows: list[int] = [4, 5, 1 << 31, (1 << 32) - 1]
    for slot in rows:
        with row(slot=slot):
            async with open_rig() as rig:
                client = rig.client()
                ref = rig.write(EPISODE)
                with pytest.raises(ProtocolError):
                    await client.read(replace(ref, slot=slot))
                assert client.statistics().quarantined == 0
                with await client.read(ref) as payload:
                    assert bytes(payload.buffer) == EPISODE


async def test_a_reference_that_lies_about_the_length_gets_nothing_and_costs_nothing() -> None:
    rows: list[int] = [0, 1, 4095, 4097, 1 << 20]
    for nbytes in rows:
        with row(nbytes=nbytes):
            async with open_rig() as rig:
                client = rig.client()
                ref = rig.write(EPISODE)
                with pytest.raises(ProtocolError, match="4096 bytes"):
                    await client.read(replace(ref, nbytes=nbytes))
                await settle()
                assert rig.ring.slot_state(ref.slot) is SlotState.READY
                assert client.statistics().quarantined == 0
                with await client.read(ref) as payload:
                    assert bytes(payload.buffer) == EPISODE


async def test_a_payload_delivered_once_is_a_duplicate_for_this_client_without_asking_anybody() -> None:
    async with open_rig(ring=RingConfig(slots=4, slot_bytes=8192, prefault=False, readers=2)) as rig:
        client = rig.client()
        ref = rig.write(EPISODE)
        (await client.read(ref)).release()
        asked = rig.requests()
        with pytest.raises(StaleSlotError, match="already received"):
            await client.read(ref)
        assert rig.requests() == asked
        assert client.statistics().duplicates == 1


async def test_every_reader_of_several_gets_the_payload_once() -> None:
    async with open_rig(ring=RingConfig(slots=4, slot_bytes=8192, prefault=False, readers=2)) as rig:
        ref = rig.write(EPISODE)
        for client in (rig.client(), rig.client()):
            assert rig.ring.slot_state(ref.slot) is SlotState.READY
            with await client.read(ref) as payload:
                assert bytes(payload.buffer) == EPISODE
            await settle()
        assert rig.ring.slot_state(ref.slot) is SlotState.FREE


async def test_two_reads_of_one_payload_at_once_deliver_it_once() -> None:
    async with open_rig() as rig:
        client = rig.client()
        ref = rig.write(EPISODE)
        outcomes = await asyncio.gather(*(client.read(ref) for _ in range(4)), return_exceptions=True)
        delivered = [outcome for outcome in outcomes if not isinstance(outcome, BaseException)]
        assert len(delivered) == 1
        assert bytes(delivered[0].buffer) == EPISODE
        assert all(isinstance(outcome, StaleSlotError) for outcome in outcomes if outcome not in delivered)
        await settle()
        assert rig.ring.slot_state(ref.slot) is SlotState.FREE


async def test_a_reference_without_an_address_says_what_to_do() -> None:
    async with open_rig() as rig:
        ref = replace(rig.write(EPISODE), host=None, ports=())
        with pytest.raises(ConfigError, match="UCXXServer"):
            await rig.client().read(ref)


async def test_a_payload_larger_than_allowed_is_refused_before_memory_is_taken() -> None:
    async with open_rig() as rig:
        client = rig.client(max_payload_bytes=1000)
        with pytest.raises(ConfigError, match="max_payload_bytes"):
            await client.read(rig.write(EPISODE))
        assert rig.requests() == 0


async def test_one_bad_slot_does_not_cost_the_batch() -> None:
    async with open_rig() as rig:
        client = rig.client()
        refs = [rig.write(bytes([number]) * 100) for number in range(4)]
        rig.ring.discard(refs[1])
        refs[3] = replace(refs[3], slot=99)
        outcomes = await client.read_many(refs)
        assert [type(outcome).__name__ for outcome in outcomes] == [
            "Payload",
            "StaleSlotError",
            "Payload",
            "ProtocolError",
        ]


async def test_closing_takes_leave_so_that_no_acknowledgement_is_lost() -> None:
    async with open_rig() as rig:
        client = rig.client()
        ref = rig.write(EPISODE)
        payload = await client.read(ref)
        await client.aclose()
        assert rig.ring.slot_state(ref.slot) is SlotState.FREE
        assert bytes(payload.buffer) == EPISODE, "payloads outlive their client"
        await client.aclose()
        with pytest.raises(ConfigError, match="closed"):
            await client.read(rig.write(EPISODE))
