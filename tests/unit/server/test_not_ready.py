"""A source that waits for its epoch: reads are answered NOT_READY, what was delivered before still settles."""

from __future__ import annotations

import pytest

from tests.support.exchange_rig import open_rig
from tests.support.virtual_time import settle
from tests.unit.server.raw_peer import RawPeer, ack_of, request_of
from ucxx_transport.errors import NotReadyError
from ucxx_transport.ring import SlotState
from ucxx_transport.server import RingSource
from ucxx_transport.wire.frames import Confirm, Describe, Status

pytestmark = pytest.mark.anyio

EPISODE = bytes(range(256)) * 16


async def test_a_read_before_there_is_an_epoch_is_not_ready_and_counted() -> None:
    async with open_rig(ports=1) as rig:
        source = RingSource(rig.ring)
        source.hold()
        ref = rig.write(EPISODE)
        peer = await RawPeer.greeted(rig)
        for attempt in (1, 2):
            reply, text = await peer.ask(request_of(ref, attempt))
            assert (reply.status, text) == (Status.NOT_READY, b"the worker has no epoch yet")
        assert rig.ring.slot_state(ref.slot) is SlotState.READY
        assert (rig.statistics(1).not_ready, rig.statistics(1).requests) == (2, 2)
        source.bind()
        reply, body = await peer.ask(request_of(ref, 3))  # over the connection of before
        assert (reply.status, body) == (Status.OK, EPISODE)
        assert rig.statistics(1).not_ready == 2


async def test_what_is_no_read_is_answered_as_ever() -> None:
    async with open_rig(ports=1) as rig:
        RingSource(rig.ring).hold()
        peer = await RawPeer.greeted(rig)
        reply, _ = await peer.ask(Describe(ring_id=rig.ring.ring_id))
        assert reply.status is Status.OK
        assert rig.statistics(1).not_ready == 0


async def test_a_payload_delivered_before_is_freed_by_its_confirmation() -> None:
    async with open_rig(ports=1) as rig:
        ref = rig.write(EPISODE)
        peer = await RawPeer.greeted(rig)
        peer.say(request_of(ref))
        await settle()
        peer.endpoint.reset()  # what it has got it cannot acknowledge here
        await settle()
        assert rig.ring.slot_state(ref.slot) is SlotState.READY
        RingSource(rig.ring).hold()
        peer = await RawPeer.greeted(rig)
        assert (await peer.ask(Confirm(request=request_of(ref))))[0].status is Status.OK
        assert rig.ring.slot_state(ref.slot) is SlotState.FREE


async def test_a_send_on_its_way_when_the_epoch_ends_is_delivered() -> None:
    async with open_rig(ports=1) as rig:
        ref = rig.write(EPISODE)
        peer = await RawPeer.greeted(rig)
        reply, body = await peer.ask(request_of(ref))
        source = RingSource(rig.ring)
        source.hold()
        assert (reply.status, body) == (Status.OK, EPISODE)
        peer.say(ack_of(ref))
        await settle()
        assert rig.ring.slot_state(ref.slot) is SlotState.FREE
        assert rig.statistics(1).delivered == 1


async def test_a_client_goes_on_asking_and_is_served_when_there_is_an_epoch() -> None:
    async with open_rig(ports=2) as rig:
        source = RingSource(rig.ring)
        source.hold()
        client = rig.client(read_attempts=1)
        ref = rig.write(EPISODE)
        with pytest.raises(NotReadyError):
            await client.read(ref, deadline_s=5.0)
        assert client.statistics().not_ready == rig.statistics(1).not_ready + rig.statistics(2).not_ready > 1
        assert client.statistics().quarantined == 0  # the port is healthy
        source.release()
        with await client.read(ref) as payload:
            assert bytes(payload.buffer) == EPISODE
