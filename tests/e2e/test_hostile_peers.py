"""A hostile peer costs the server that peer's connection, and no other peer anything."""

from __future__ import annotations

import asyncio
import random
import socket
import struct
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, suppress

import psutil
import pytest
import structlog

from tests.support.raw_peer import NONCE, RawPeer, raw_peer, request_of
from tests.support.served_ring import LOOPBACK, ServedRing, client_of, read_retrying, served_ring
from tests.support.waiting import wait_until
from tests.support.well_behaved import trainer_at_work
from ucxx_transport import AuthenticationError, BusyError, PeerLostError, SlotRef, SlotState
from ucxx_transport.link.ucxx import UCXXLink
from ucxx_transport.wire.codec import encode_request
from ucxx_transport.wire.frames import REQUEST_BYTES, Hello, Status

MINUTE = 60
HELLO = encode_request(Hello(reader=7, nonce=NONCE))

log = structlog.get_logger(__name__)


@pytest.fixture(scope="module")
def served() -> Iterator[ServedRing]:
    """One port with short limits, in a process of its own."""
    limits = {"first_frame_timeout_s": 1.0, "ack_timeout_s": 1.0, "idle_timeout_s": 30.0}
    with served_ring(ring={"slots": 16}, ports=1, **limits) as opened:
        yield opened


@pytest.fixture
def mortal() -> Iterator[ServedRing]:
    """The same for one test alone: its process may be ended by what comes in, and replaced."""
    with served_ring(ring={"slots": 16}, ports=1) as opened:
        yield opened


@pytest.fixture
def ref(served: ServedRing) -> Iterator[SlotRef]:
    """A payload that must be there, whole and READY, whatever the test does to it."""
    written = served.ring.write_raw(bytes(range(200)))
    yield written
    wait_until(lambda: served.ring.slot_state(written.slot) is SlotState.READY, MINUTE)
    with client_of(connect_timeout_s=1.0) as client, read_retrying(client, written) as payload:
        assert bytes(payload.buffer) == bytes(range(200))


def seeded() -> random.Random:
    seed = random.SystemRandom().randrange(1 << 32)
    log.info("seed", seed=seed)
    return random.Random(seed)


def with_peer(served: ServedRing, behave: Callable[[RawPeer], Awaitable[None]]) -> None:
    async def scenario() -> None:
        async with raw_peer(served.server.ports[0]) as peer:
            await behave(peer)

    asyncio.run(scenario())


def count(served: ServedRing, name: str) -> int:
    return served.server.statistics().total(name)


# Raw sockets: bytes that are not even UCX.


def listening_ports(served: ServedRing) -> list[int]:
    """Every TCP port of the server's process: its own, and the one UCX opens for its data connections."""
    pid = wait_until(lambda: served.server.statistics().pids[0], MINUTE)
    assert pid is not None
    return sorted(
        connection.laddr.port
        for connection in psutil.Process(pid).net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    )


def connection_to(port: int) -> socket.socket | None:
    try:
        return socket.create_connection((LOOPBACK, port), timeout=10)
    except OSError:
        return None  # the server is just being replaced: garbage may have ended it


def say(connection: socket.socket, words: bytes) -> None:
    with suppress(OSError):  # it may hang up whenever it likes
        connection.sendall(words)


def test_garbage_on_every_port_hurts_nobody_else(mortal: ServedRing) -> None:
    chance = seeded()
    with trainer_at_work(mortal) as trainer, ExitStack() as stack:
        for _ in range(120):
            connection = connection_to(chance.choice(listening_ports(mortal)))
            if connection is None:
                continue
            stack.enter_context(connection)
            say(connection, chance.randbytes(chance.choice((1, 8, 24, 100, 1000, 50_000))))
            if chance.random() < 0.5:
                if chance.random() < 0.5:  # a reset instead of an end
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                connection.close()
        trainer.must_get(20)


def recorded_handshake() -> bytes:
    """What a UCX client says first, as its server hears it."""

    async def connect_to_nobody(port: int) -> None:
        async with UCXXLink.open() as link, asyncio.timeout(0.5):
            await link.connect(LOOPBACK, port)

    with socket.create_server((LOOPBACK, 0)) as listener:
        with pytest.raises((TimeoutError, PeerLostError)):
            asyncio.run(connect_to_nobody(listener.getsockname()[1]))
        connection, _ = listener.accept()
        with connection:
            return connection.recv(65536)


def test_mutated_handshakes_hurt_nobody_else(mortal: ServedRing) -> None:
    chance = seeded()
    handshake = recorded_handshake()
    assert len(handshake) > 20
    with trainer_at_work(mortal) as trainer, ExitStack() as stack:
        for _ in range(100):
            connection = connection_to(mortal.server.ports[0])
            if connection is None:
                continue
            stack.enter_context(connection)
            changed = bytearray(handshake)
            for _ in range(chance.choice((1, 1, 1, 3, 20))):
                changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
            say(connection, bytes(changed[: chance.choice((len(changed), chance.randrange(1, len(changed))))]))
        trainer.must_get(20)
        log.info("server process after mutated handshakes", restarts=mortal.server.statistics().restarts)


def test_handshake_that_aborts_ucx_costs_a_restart_and_nobody_else(mortal: ServedRing) -> None:
    # Seen with UCX 1.21: another version in the address ends the process by an assertion (`address.c`, `addr_version`).
    # A UCX that has mended it passes as well.
    handshake = bytearray(recorded_handshake())
    handshake[25] ^= 8
    with trainer_at_work(mortal) as trainer:
        connection = connection_to(mortal.server.ports[0])
        assert connection is not None
        with connection:
            say(connection, bytes(handshake))
            connection.settimeout(MINUTE)
            with suppress(ConnectionResetError):
                connection.recv(4096)  # an answer, or the end of the process
        trainer.must_get(20)
        log.info("server process after that handshake", restarts=mortal.server.statistics().restarts)


def test_silent_and_slow_connections_hurt_nobody_else(served: ServedRing) -> None:
    handshake = recorded_handshake()
    with trainer_at_work(served) as trainer, ExitStack() as stack:
        silent = [connection_to(served.server.ports[0]) for _ in range(300)]
        slow = [connection_to(served.server.ports[0]) for _ in range(30)]
        for connection in filter(None, (*silent, *slow)):
            stack.enter_context(connection)
        for position in range(12):
            for connection in filter(None, slow):
                say(connection, handshake[position : position + 1])
            trainer.must_get(3)


# UCX peers that do not keep to the protocol.


# What else a frame may say wrongly, and when, the unit tests of session and port server show without UCX.


def test_bad_first_frame_is_answered_with_its_reason_and_a_hang_up(served: ServedRing) -> None:
    async def behave(peer: RawPeer) -> None:
        reply, text = await peer.ask(random.Random(5).randbytes(REQUEST_BYTES))
        assert (reply.status, "not a ucxx_transport request" in text) == (Status.BAD_REQUEST, True), text
        with pytest.raises(PeerLostError):
            await peer.wait_for_hang_up()

    with trainer_at_work(served):
        with_peer(served, behave)


def test_frame_longer_than_any_ends_its_connection(served: ServedRing) -> None:
    async def behave(peer: RawPeer) -> None:
        await peer.send(HELLO * 64)
        with pytest.raises(PeerLostError):
            await peer.wait_for_hang_up()

    with trainer_at_work(served):
        with_peer(served, behave)


def test_payload_that_is_never_acknowledged_is_ready_again(served: ServedRing, ref: SlotRef) -> None:
    async def behave(peer: RawPeer) -> None:
        await peer.greet()
        reply, _ = await peer.read(ref)
        assert reply.status is Status.OK
        assert served.ring.slot_state(ref.slot) is SlotState.READING
        with pytest.raises(PeerLostError):  # when the time for the ACK is over
            await peer.wait_for_hang_up()
        await asyncio.to_thread(wait_until, lambda: served.ring.slot_state(ref.slot) is SlotState.READY, MINUTE)

    with trainer_at_work(served):
        with_peer(served, behave)


def test_reader_that_hangs_up_in_the_middle_leaves_the_payload_ready(served: ServedRing, ref: SlotRef) -> None:
    async def behave(peer: RawPeer) -> None:
        await peer.greet()
        await peer.send(encode_request(request_of(ref)))

    for _ in range(5):
        with_peer(served, behave)


def test_connection_without_a_word_is_closed_in_time(served: ServedRing) -> None:
    before = count(served, "handshake_timeouts")

    async def behave(peer: RawPeer) -> None:
        with pytest.raises(PeerLostError):
            await peer.wait_for_hang_up()

    with_peer(served, behave)
    assert count(served, "handshake_timeouts") == before + 1


def test_client_with_a_wrong_token_gets_nothing() -> None:
    with served_ring(token="right") as served, trainer_at_work(served, token="right"):
        ref = served.ring.write_raw(b"secret")
        with client_of(token="wrong") as client, pytest.raises(AuthenticationError, match="token"):
            client.read(ref)
        assert client.statistics().quarantined == 0
        assert served.ring.slot_state(ref.slot) is SlotState.READY
        assert count(served, "unauthorized") == 1


# Too many.


async def greeted(stack: list[RawPeer], link: UCXXLink, port: int) -> Status | None:
    """Connect and say HELLO, and stay; the server's status, or None when it hangs up without one."""
    try:
        peer = RawPeer(await link.connect(LOOPBACK, port))
        stack.append(peer)
        return (await peer.greet()).status
    except PeerLostError:
        return None


def test_connections_above_the_limit_are_told_busy_and_the_others_go_on() -> None:
    with served_ring(ports=1, max_connections=4) as served, trainer_at_work(served) as trainer:
        port = served.server.ports[0]

        async def crowd() -> None:
            async with UCXXLink.open() as link:
                stack: list[RawPeer] = []
                assert [await greeted(stack, link, port) for _ in range(5)] == [Status.OK] * 3 + [Status.BUSY] * 2
                await asyncio.to_thread(newcomer_is_told_busy)
                await asyncio.to_thread(trainer.must_get, 5)
                for peer in stack:
                    await peer.endpoint.close()

        def newcomer_is_told_busy() -> None:
            ref = served.ring.write_raw(b"later")
            with client_of() as client, pytest.raises(BusyError):
                client.read(ref)
            assert served.ring.discard(ref)

        asyncio.run(crowd())
        with client_of() as client, read_retrying(client, served.ring.write_raw(b"now")) as payload:
            assert bytes(payload.buffer) == b"now"
        wait_until(lambda: count(served, "connections") <= 2, MINUTE)


def test_flood_of_connections_hurts_nobody_else() -> None:
    with served_ring(ports=1, max_connections=8) as served, trainer_at_work(served) as trainer:
        port = served.server.ports[0]

        async def flood() -> set[Status | None]:
            stack: list[RawPeer] = []
            async with UCXXLink.open() as link, asyncio.TaskGroup() as tasks:
                crowd = [tasks.create_task(greeted(stack, link, port)) for _ in range(150)]
            return {task.result() for task in crowd}

        assert asyncio.run(flood()) <= {Status.OK, Status.BUSY, None}
        assert count(served, "refused") > 0
        trainer.must_get(10)
        wait_until(lambda: count(served, "connections") <= 1, MINUTE)
