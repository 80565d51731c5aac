"""Payloads that a client lets go unread: locally, over the link, and when the server cannot be asked."""

from __future__ import annotations

import pytest

from tests.support.exchange_rig import open_rig
from tests.support.local_worker import LocalWorker
from tests.support.virtual_time import settle
from ucxx_transport import ClientConfig, ConfigError, RingConfig, SharedRingBuffer, SlotState, StaleSlotError
from ucxx_transport.client import SyncUCXXClient, UCXXClient

pytestmark = pytest.mark.anyio

EPISODE = bytes(5000)


async def test_their_slots_are_free_and_none_of_their_bytes_moved() -> None:
    async with open_rig(ports=2) as rig:
        client = rig.client()
        refs = [rig.write(EPISODE) for _ in range(3)]
        assert await client.discard(refs[:2]) == 2
        await settle()
        assert [rig.ring.slot_state(ref.slot) for ref in refs] == [SlotState.FREE, SlotState.FREE, SlotState.READY]
        assert sum(rig.statistics(port).bytes_sent for port in (1, 2)) == 0
        assert client.statistics().discarded == 2
        assert client.statistics().reads == 0
        with pytest.raises(StaleSlotError, match="already"):
            await client.read(refs[0])
        (await client.read(refs[2])).release()
        assert await client.discard([]) == 0


async def test_those_that_are_gone_or_were_delivered_are_not_counted() -> None:
    async with open_rig(ports=1) as rig:
        client = rig.client()
        first, second, third = (rig.write(EPISODE) for _ in range(3))
        (await client.read(first)).release()
        rig.ring.discard(second)
        assert await client.discard([first, second, third, third]) == 1


async def test_one_reader_of_several_lets_go_of_its_own_share() -> None:
    async with open_rig(ring=RingConfig(slots=4, slot_bytes=8192, readers=2), ports=1) as rig:
        one, other = rig.client(), rig.client()
        ref = rig.write(EPISODE)
        assert await one.discard([ref]) == 1
        assert rig.ring.slot_state(ref.slot) is SlotState.READY
        (await other.read(ref)).release()
        await settle()
        assert rig.ring.slot_state(ref.slot) is SlotState.FREE


async def test_a_server_that_cannot_be_asked_hears_of_it_with_the_next_read() -> None:
    async with open_rig(ports=1) as rig:
        client = rig.client()
        refs = [rig.write(EPISODE) for _ in range(4)]
        await rig.stop_port(1)
        assert await client.discard(refs[:3], deadline_s=1.0) == 0
        assert rig.ring.get_ready_count() == 4
        await rig.start_port(1)
        (await client.read(refs[3])).release()
        await settle()
        assert rig.ring.slot_states().count(SlotState.FREE) == rig.ring.slots


@pytest.mark.parametrize("local", ["view", "copy"])
def test_rings_of_this_host_are_told_at_once(local: str) -> None:
    with SharedRingBuffer.create(RingConfig(slots=8, slot_bytes=64)) as ring:
        first, second, third = LocalWorker(ring).play(3)
        assert first.ref is not None
        assert second.ref is not None
        assert third.ref is not None
        with SyncUCXXClient(ClientConfig(local=local)) as client:  # type: ignore[arg-type]
            assert client.discard([first.ref, second.ref, second.ref]) == 2
            assert ring.get_ready_count() == 1
            with pytest.raises(StaleSlotError):
                client.read(first.ref)
            client.read(third.ref).release()
            assert client.discard([third.ref]) == 0
            assert (client.statistics().discarded, client.statistics().reads) == (2, 1)


async def test_a_closed_client_refuses() -> None:
    with SharedRingBuffer.create(RingConfig(slots=1, slot_bytes=64)) as ring:
        (record,) = LocalWorker(ring).play(1)
        client = UCXXClient(ClientConfig(local="view"))
        await client.aclose()
        assert record.ref is not None
        with pytest.raises(ConfigError, match="closed"):
            await client.discard([record.ref])
