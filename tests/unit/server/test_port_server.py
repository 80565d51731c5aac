"""One port and its connections: what peers do wrong costs them their own connection, and nobody else anything."""

from __future__ import annotations

import asyncio

import pytest

from tests.support.exchange_rig import ExchangeRig, open_rig
from tests.support.rows import row
from tests.support.virtual_time import settle
from tests.unit.server.raw_peer import RawPeer, ack_of, request_of
from ucxx_transport.config import ServerConfig
from ucxx_transport.ring import SlotState
from ucxx_transport.wire.codec import encode_read, encode_request
from ucxx_transport.wire.frames import Auth, Bye, Confirm, Describe, Hello, Status

pytestmark = pytest.mark.anyio

EPISODE = bytes(range(256)) * 16
LIMITED = ServerConfig(mode="thread", max_connections=2)
# Time limits are looked at this often; a limit is kept within one look.
SWEEP_S = 0.3


async def is_closed(peer: RawPeer) -> bool:
    await settle()
    return not peer.endpoint.alive


async def still_serves(rig: ExchangeRig) -> bool:
    ref = rig.write(EPISODE)
    with await rig.client().read(ref) as payload:
        return bytes(payload.buffer) == EPISODE


async def test_garbage_is_answered_bad_request_and_closed() -> None:
    rows: list[bytes] = [
        b"",
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\xff" * 128,
        bytes(128),
        encode_request(Bye())[:127],
        encode_request(Hello(reader=1, nonce=bytes(32)))[:64],
    ]
    for garbage in rows:
        with row(garbage=garbage):
            async with open_rig(ports=1) as rig:
                peer = await RawPeer.connect(rig)
                reply, text = await peer.ask(garbage)
                assert reply.status is Status.BAD_REQUEST
                assert text
                await asyncio.sleep(1.0 + SWEEP_S)
                assert await is_closed(peer)
                assert rig.statistics(1).bad_requests == 1
                assert await still_serves(rig)


async def test_clients_that_the_link_could_not_accept_are_counted_once() -> None:
    async with open_rig(ports=1) as rig:
        for count, counted in [(2, 2), (0, 2), (1, 3)]:
            rig.fail_accepts(1, count)
            await asyncio.sleep(SWEEP_S)
            assert rig.statistics(1).accepts_failed == counted


async def test_a_message_longer_than_any_frame_ends_the_connection() -> None:
    async with open_rig(ports=1) as rig:
        peer = await RawPeer.connect(rig)
        peer.say(bytes(100_000))
        assert await is_closed(peer)
        assert await still_serves(rig)


async def test_a_frame_cannot_be_read_twice_when_the_next_message_is_short() -> None:
    async with open_rig(ports=1) as rig:
        ref = rig.write(EPISODE)
        rig.ring.discard(ref)
        peer = await RawPeer.greeted(rig)
        reply, _ = await peer.ask(request_of(ref))
        assert reply.status is Status.STALE
        # Four right bytes: what follows them in the server's buffer must not be the READ of before.
        reply, _ = await peer.ask(encode_request(request_of(ref))[:4])
        assert reply.status is Status.BAD_REQUEST
        assert rig.requests() == 1


async def test_a_connection_that_says_nothing_is_closed() -> None:
    async with open_rig(ports=1) as rig:
        peer = await RawPeer.connect(rig)
        await asyncio.sleep(4.9)
        assert peer.endpoint.alive
        await asyncio.sleep(0.1 + SWEEP_S)
        assert await is_closed(peer)
        assert rig.statistics(1).handshake_timeouts == 1
        assert rig.statistics(1).connections == 0


async def test_a_challenge_left_unanswered_is_closed_too() -> None:
    async with open_rig(ports=1, server=ServerConfig(mode="thread", token="t")) as rig:
        peer = await RawPeer.connect(rig)
        reply, _ = await peer.ask(Hello(reader=5, nonce=bytes(32)))
        assert reply.token_required
        await asyncio.sleep(5.0 + SWEEP_S)
        assert await is_closed(peer)
        assert rig.statistics(1).handshake_timeouts == 1


async def test_without_the_token_nothing_is_told_and_nothing_is_taken() -> None:
    async with open_rig(ports=1, server=ServerConfig(mode="thread", token="t")) as rig:
        ref = rig.write(EPISODE)
        for frame in (request_of(ref), Confirm(request=request_of(ref)), Describe(ring_id=ref.ring_id), Bye()):
            peer = await RawPeer.connect(rig)
            reply, _ = await peer.ask(frame)
            assert reply.status is Status.UNAUTHORIZED
            peer = await RawPeer.connect(rig)
            await peer.ask(Hello(reader=5, nonce=bytes(32)))
            reply, body = await peer.ask(frame)
            assert reply.status is Status.UNAUTHORIZED
            assert EPISODE not in body
        peer = await RawPeer.connect(rig)
        await peer.ask(Hello(reader=5, nonce=bytes(32)))
        reply, _ = await peer.ask(Auth(mac=bytes(32)))
        assert reply.status is Status.UNAUTHORIZED
        assert rig.ring.slot_state(ref.slot) is SlotState.READY
        assert rig.requests() == 0


async def test_an_idle_connection_is_evicted_and_a_used_one_is_not() -> None:
    async with open_rig(ports=1) as rig:
        idle, used = await RawPeer.greeted(rig), await RawPeer.greeted(rig)
        await asyncio.sleep(100.0)
        await used.ask(Describe(ring_id=rig.ring.ring_id))
        await asyncio.sleep(20.0 + SWEEP_S)
        assert await is_closed(idle)
        assert not await is_closed(used)
        assert rig.statistics(1).idle_evictions == 1


@pytest.mark.parametrize("nbytes", [100, 60_000], ids=["eager", "rendezvous"])
async def test_a_payload_that_is_never_acknowledged_is_ready_again(nbytes: int) -> None:
    async with open_rig(ports=1) as rig:
        ref = rig.write(bytes(nbytes))
        peer = await RawPeer.greeted(rig)
        reply, _ = await peer.ask(request_of(ref))
        assert reply.status is Status.OK
        await asyncio.sleep(9.9)
        assert rig.ring.slot_state(ref.slot) is SlotState.READING
        await asyncio.sleep(0.1 + 2 * SWEEP_S)
        assert await is_closed(peer)
        assert rig.ring.slot_state(ref.slot) is SlotState.READY
        assert rig.statistics(1).delivery_timeouts == 1
        assert rig.statistics(1).released == 1


async def test_a_payload_that_does_not_move_is_given_up_after_its_own_longer_limit() -> None:
    async with open_rig(ports=1) as rig:
        ref = rig.write(bytes(60_000))
        peer = await RawPeer.greeted(rig)
        peer.say(request_of(ref))  # and no receive is posted for the answer
        await asyncio.sleep(59.0)
        assert rig.ring.slot_state(ref.slot) is SlotState.READING
        await asyncio.sleep(1.0 + 2 * SWEEP_S)
        assert await is_closed(peer)
        assert rig.ring.slot_state(ref.slot) is SlotState.READY
        assert rig.statistics(1).delivery_timeouts == 1


async def test_a_client_that_dies_between_request_and_acknowledgement_loses_nothing() -> None:
    async with open_rig(ports=1) as rig:
        refs = [rig.write(bytes([number]) * 100) for number in range(4)]
        for ref in refs:
            peer = await RawPeer.greeted(rig)
            await peer.ask(request_of(ref))
            peer.endpoint.reset()
        await settle()
        assert rig.ring.slot_states() == [SlotState.READY] * 4
        assert rig.statistics(1).delivered == 0


async def test_an_acknowledgement_of_another_attempt_consumes_nothing() -> None:
    async with open_rig(ports=1) as rig:
        ref = rig.write(EPISODE)
        peer = await RawPeer.greeted(rig)
        await peer.ask(request_of(ref, attempt=7))
        reply, _ = await peer.ask(ack_of(ref, attempt=8))
        assert reply.status is Status.BAD_REQUEST
        await asyncio.sleep(1.0 + SWEEP_S)
        assert rig.ring.slot_state(ref.slot) is SlotState.READY


async def test_an_acknowledgement_out_of_the_blue_frees_no_slot() -> None:
    async with open_rig(ports=1) as rig:
        ref = rig.write(EPISODE)
        peer = await RawPeer.greeted(rig)
        reply, _ = await peer.ask(ack_of(ref))
        assert reply.status is Status.BAD_REQUEST
        assert rig.ring.slot_state(ref.slot) is SlotState.READY


async def test_a_refused_delivery_is_ready_for_the_next_request_on_the_same_connection() -> None:
    async with open_rig(ports=1) as rig:
        ref = rig.write(EPISODE)
        peer = await RawPeer.greeted(rig)
        for attempt in range(3):
            reply, body = await peer.ask(request_of(ref, attempt))
            assert reply.status is Status.OK
            assert body == EPISODE
            peer.say(ack_of(ref, attempt, delivered=False))
            await settle()
            assert rig.ring.slot_state(ref.slot) is SlotState.READY


@pytest.mark.parametrize("slot", [4, 1 << 16, (1 << 32) - 1])
async def test_a_slot_out_of_range_discloses_nothing(slot: int) -> None:
    async with open_rig(ports=1) as rig:
        ref = rig.write(EPISODE)
        peer = await RawPeer.greeted(rig)
        for nbytes in (0, 1, ref.nbytes, 1 << 40):
            request = request_of(ref)._replace(slot=slot, nbytes=nbytes)
            reply, body = await peer.ask(request)
            assert reply.status is Status.BAD_REQUEST
            assert b"no such slot" in body
        assert rig.ring.statistics().out_of_range == 4
        reply, _ = await peer.ask(request_of(ref))
        assert reply.status is Status.OK, "a refusal leaves the connection usable"


async def test_another_generation_is_stale_however_large() -> None:
    rows: list[int] = [2, 3, 1 << 55, 1 << 56, (1 << 56) + 1, (1 << 64) - 1]
    for generation in rows:
        with row(generation=generation):
            async with open_rig(ports=1) as rig:
                ref = rig.write(EPISODE)
                peer = await RawPeer.greeted(rig)
                reply, _ = await peer.ask(request_of(ref)._replace(generation=generation))
                assert reply.status is Status.STALE
                reply, _ = await peer.ask(request_of(ref))
                assert reply.status is Status.OK


async def test_a_reader_id_the_ring_cannot_hold_is_refused_and_harms_nobody() -> None:
    async with open_rig(ports=1) as rig:
        ref = rig.write(EPISODE)
        peer = await RawPeer.connect(rig)
        reply, _ = await peer.ask(Hello(reader=(1 << 64) - 1, nonce=bytes(32)))
        assert reply.status is Status.BAD_REQUEST
        assert rig.ring.slot_state(ref.slot) is SlotState.READY
        assert await still_serves(rig)


async def test_as_many_attempts_as_a_slot_can_carry_and_then_busy() -> None:
    async with open_rig(ports=1) as rig:
        ref = rig.write(EPISODE)
        replies = []
        for _ in range(12):
            peer = await RawPeer.greeted(rig)
            replies.append((await peer.ask(request_of(ref)))[0].status)
        assert set(replies) == {Status.OK, Status.BUSY}
        assert rig.ring.slot_state(ref.slot) is SlotState.READING


async def test_connections_above_the_cap_are_told_busy_and_closed() -> None:
    async with open_rig(ports=1, server=LIMITED) as rig:
        admitted = [await RawPeer.greeted(rig) for _ in range(2)]
        newcomer = await RawPeer.connect(rig)
        reply, _ = await newcomer.ask(Hello(reader=5, nonce=bytes(32)))
        assert reply.status is Status.BUSY
        await asyncio.sleep(1.0 + SWEEP_S)
        assert await is_closed(newcomer)
        assert rig.statistics(1).refused == 1
        for peer in admitted:
            reply, _ = await peer.ask(Describe(ring_id=rig.ring.ring_id))
            assert reply.status is Status.OK


async def test_connections_that_wait_to_be_refused_take_nobodys_place() -> None:
    async with open_rig(ports=1, server=LIMITED) as rig:
        admitted = [await RawPeer.greeted(rig) for _ in range(2)]
        lingering = [await RawPeer.connect(rig) for _ in range(5)]  # above the cap, half-open
        await admitted[0].endpoint.close()
        await settle()
        newcomer = await RawPeer.connect(rig)
        reply, _ = await newcomer.ask(Hello(reader=5, nonce=bytes(32)))
        assert reply.status is Status.OK, "one of two places is free"
        assert all(peer.endpoint.alive for peer in lingering)


async def test_a_flood_of_connections_is_cut_off_and_those_admitted_go_on() -> None:
    async with open_rig(ports=1, server=LIMITED) as rig:
        admitted = await RawPeer.greeted(rig)
        flood = [await RawPeer.connect(rig) for _ in range(200)]
        await settle()
        assert sum(peer.endpoint.alive for peer in flood) < 40
        reply, _ = await admitted.ask(Describe(ring_id=rig.ring.ring_id))
        assert reply.status is Status.OK
        await asyncio.sleep(6.0 + SWEEP_S)
        assert await still_serves(rig)


async def test_statistics_count_connections_as_they_come_and_go() -> None:
    async with open_rig(ports=1) as rig:
        peers = [await RawPeer.greeted(rig) for _ in range(3)]
        assert (rig.statistics(1).accepted, rig.statistics(1).connections) == (3, 3)
        for peer in peers:
            await peer.endpoint.close()
        await settle()
        assert (rig.statistics(1).accepted, rig.statistics(1).connections) == (3, 0)


async def test_a_goodbye_proves_that_everything_before_it_was_handled() -> None:
    async with open_rig(ports=1) as rig:
        ref = rig.write(EPISODE)
        peer = await RawPeer.greeted(rig)
        await peer.ask(request_of(ref))
        peer.say(ack_of(ref))
        reply, _ = await peer.ask(Bye())
        assert reply.status is Status.OK
        assert rig.ring.slot_state(ref.slot) is SlotState.FREE


async def test_confirm_frees_what_is_still_there_and_says_stale_otherwise() -> None:
    async with open_rig(ports=1) as rig:
        ref = rig.write(EPISODE)
        peer = await RawPeer.greeted(rig)
        reply, _ = await peer.ask(encode_read(request_of(ref)))
        assert reply.status is Status.OK
        peer.endpoint.reset()
        await settle()
        peer = await RawPeer.greeted(rig)
        assert (await peer.ask(Confirm(request=request_of(ref))))[0].status is Status.OK
        assert rig.ring.slot_state(ref.slot) is SlotState.FREE
        assert (await peer.ask(Confirm(request=request_of(ref))))[0].status is Status.STALE
        assert rig.statistics(1).confirms == 1


async def test_stopping_the_port_gives_every_slot_back() -> None:
    async with open_rig(ports=1) as rig:
        refs = [rig.write(bytes(20_000)) for _ in range(3)]
        peers = [await RawPeer.greeted(rig) for _ in refs]
        for peer, ref in zip(peers, refs, strict=True):
            peer.say(request_of(ref))
        await settle()
        assert [rig.ring.slot_state(ref.slot) for ref in refs] == [SlotState.READING] * 3
        await rig.stop_port(1)
        assert [rig.ring.slot_state(ref.slot) for ref in refs] == [SlotState.READY] * 3
        assert rig.statistics(1).port == 0
