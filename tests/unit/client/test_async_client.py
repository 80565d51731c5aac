"""The asyncio client: the reads of the blocking one, in an event loop that goes on meanwhile."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from tests.support.port_beside import port_beside
from ucxx_transport.client import Payload
from ucxx_transport.errors import ConfigError, DeadlineExceededError, PeerLostError, StaleSlotError
from ucxx_transport.ring import SharedRingBuffer, SlotState
from ucxx_transport.testing import Hold

EPISODE = bytes(range(256)) * 16


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - what another thread does sets no event of this loop
            await asyncio.sleep(0.0005)


async def until_free(ring: SharedRingBuffer, slot: int) -> None:
    await until(lambda: ring.slot_state(slot) is SlotState.FREE)


def test_a_read_returns_its_payload_and_frees_its_slot() -> None:
    async def main() -> None:
        with port_beside() as rig:
            async with rig.async_client() as client:
                for nbytes in (0, 1, 4096, 60_000):
                    ref = rig.ring.write_raw(bytes(nbytes))
                    with await client.read(ref) as payload:
                        assert bytes(payload.buffer) == bytes(nbytes)
                    await until_free(rig.ring, ref.slot)

    asyncio.run(main())


def test_reads_beside_each_other_and_batches_come_in_order() -> None:
    async def main() -> None:
        with port_beside() as rig:
            async with rig.async_client() as client:
                refs = [rig.ring.write_raw(bytes([number]) * 1000) for number in range(8)]
                payloads = await asyncio.gather(*(client.read(ref) for ref in refs))
                assert [bytes(payload.buffer)[:1] for payload in payloads] == [bytes([number]) for number in range(8)]
                refs = [rig.ring.write_raw(bytes([number]) * 1000) for number in range(8)]
                rig.ring.discard(refs[3])
                outcomes = await client.read_many(refs)
                assert [type(outcome) for outcome in outcomes] == [Payload] * 3 + [StaleSlotError] + [Payload] * 4

    asyncio.run(main())


def test_into_a_buffer_of_the_caller() -> None:
    async def main() -> None:
        with port_beside() as rig:
            async with rig.async_client() as client:
                into = bytearray(5000)
                payload = await client.read(rig.ring.write_raw(EPISODE), into=into)
                assert into[: len(EPISODE)] == EPISODE == bytes(payload.buffer)
                assert client.statistics().lent_buffers == 0

    asyncio.run(main())


def test_the_loop_goes_on_while_an_answer_is_awaited() -> None:
    async def main() -> None:
        with port_beside() as rig:
            async with rig.async_client() as client:
                (await client.read(rig.ring.write_raw(EPISODE))).release()
                hold = rig.faults.hold = Hold()
                reading = asyncio.create_task(client.read(rig.ring.write_raw(EPISODE), deadline_s=60))
                for _ in range(100):
                    await asyncio.sleep(0)
                assert not reading.done()
                hold.set()
                rig.faults.hold = None
                (await reading).release()

    asyncio.run(main())


def test_a_deadline_is_kept_while_nothing_else_happens() -> None:
    async def main() -> None:
        with port_beside() as rig:
            async with rig.async_client() as client:
                (await client.read(rig.ring.write_raw(EPISODE))).release()
                rig.faults.drop = 1000
                began_s = time.monotonic()
                with pytest.raises(DeadlineExceededError):
                    await client.read(rig.ring.write_raw(EPISODE), deadline_s="50ms")
                assert time.monotonic() - began_s >= 0.05
                rig.faults.drop = 0

    asyncio.run(main())


def test_a_read_cancelled_at_any_of_its_steps_loses_no_payload_and_keeps_no_buffer() -> None:
    async def main() -> None:
        with port_beside() as rig:
            async with rig.async_client(spin_s=0.0) as client:
                (await client.read(rig.ring.write_raw(EPISODE))).release()
                cut = delivered = 0
                for steps in range(40):
                    ref = rig.ring.write_raw(EPISODE)
                    reading = asyncio.create_task(client.read(ref, deadline_s=60))
                    for _ in range(steps):
                        await asyncio.sleep(0)
                    reading.cancel()
                    try:
                        payload = await reading
                    except asyncio.CancelledError:
                        cut += 1
                        payload = await client.read(ref, deadline_s=60)
                    else:
                        delivered += 1
                    with payload:
                        assert bytes(payload.buffer) == EPISODE
                    del payload, reading
                    await until_free(rig.ring, ref.slot)
                assert cut > 0
                statistics = client.statistics()
                assert (statistics.reads, statistics.duplicates, statistics.lent_buffers) == (41, 0, 0)
                assert statistics.connections == 1

    asyncio.run(main())


def test_a_payload_that_had_come_when_its_task_was_cancelled_can_be_read_again() -> None:
    async def main() -> None:
        with port_beside() as rig:
            async with rig.async_client() as client:
                (await client.read(rig.ring.write_raw(EPISODE))).release()
                ref = rig.ring.write_raw(EPISODE)
                hold = rig.faults.hold = Hold()
                reading = asyncio.create_task(client.read(ref, deadline_s=60))
                await until(lambda: client.statistics().lent_buffers > 0)
                hold.set()
                rig.faults.hold = None
                core = client._core  # noqa: SLF001 - the moment between the answer and the task's turn
                while core.reads.jobs:
                    core.reactor.poll(0.01)
                reading.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await reading
                with await client.read(ref) as payload:
                    assert bytes(payload.buffer) == EPISODE

    asyncio.run(main())


def test_a_cancelled_batch_releases_what_had_come() -> None:
    async def main() -> None:
        with port_beside() as rig:
            async with rig.async_client() as client:
                (await client.read(rig.ring.write_raw(EPISODE))).release()
                rig.faults.spare, rig.faults.drop = 1, 1
                refs = [rig.ring.write_raw(bytes(60_000)) for _ in range(2)]
                reading = asyncio.create_task(client.read_many(refs, deadline_s=60))
                await until(lambda: client.statistics().reads == 2)
                reading.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await reading
            assert client.statistics().lent_buffers == 0

    asyncio.run(main())


def test_a_client_belongs_to_the_thread_it_is_first_used_in() -> None:
    with port_beside() as rig:
        client = rig.async_client()
        first, second = (rig.ring.write_raw(EPISODE) for _ in range(2))

        async def read() -> None:
            (await client.read(first)).release()

        async def read_elsewhere() -> None:
            with pytest.raises(ConfigError, match="event loop"):
                await client.read(second)

        async def read_here_and_close() -> None:
            (await client.read(second)).release()
            await client.aclose()

        asyncio.run(read())
        with ThreadPoolExecutor(1) as other:
            other.submit(asyncio.run, read_elsewhere()).result()
        asyncio.run(read_here_and_close())


def test_a_client_that_has_no_connection_any_more_closes_at_once() -> None:
    async def main() -> None:
        with port_beside() as rig:
            client = rig.async_client()
            rig.client_faults.refuse = True
            with pytest.raises(PeerLostError):
                await client.read(rig.ring.write_raw(EPISODE), deadline_s=30)
            async with asyncio.timeout(30):
                await client.aclose()

    asyncio.run(main())


def test_a_client_takes_leave_of_a_server_once() -> None:
    async def main() -> None:
        with port_beside() as rig:
            client = rig.async_client()
            (await client.read(rig.ring.write_raw(EPISODE))).release()
            await until_free(rig.ring, 0)
            rig.client_faults.spare = 100
            await client.aclose()
            assert rig.client_faults.spare == 99

    asyncio.run(main())


def test_closing_ends_reads_in_flight_and_is_idempotent() -> None:
    async def main() -> None:
        with port_beside() as rig:
            client = rig.async_client()
            (await client.read(rig.ring.write_raw(EPISODE))).release()
            rig.faults.drop = 1000
            ref = rig.ring.write_raw(EPISODE)
            reading = asyncio.create_task(client.read(ref, deadline_s=60))
            await until(lambda: rig.ring.slot_state(ref.slot) is SlotState.READING)
            await client.aclose()
            await client.aclose()
            with pytest.raises(Exception, match="closed"):
                await reading
            with pytest.raises(ConfigError, match="closed"):
                await client.read(rig.ring.write_raw(EPISODE))

    asyncio.run(main())


def test_no_thread_is_started_for_reads_over_the_link() -> None:
    async def main() -> None:
        with port_beside() as rig:
            before = set(threading.enumerate())
            async with rig.async_client() as client:
                (await client.read(rig.ring.write_raw(EPISODE))).release()
                assert set(threading.enumerate()) <= before

    asyncio.run(main())


def test_discards_over_the_link_free_the_slots() -> None:
    async def main() -> None:
        with port_beside() as rig:
            async with rig.async_client() as client:
                refs = [rig.ring.write_raw(EPISODE) for _ in range(3)]
                assert await client.discard([*refs, replace(refs[0])]) == 3
                assert [rig.ring.slot_state(ref.slot) for ref in refs] == [SlotState.FREE] * 3
                assert client.statistics().discarded == 3

    asyncio.run(main())
