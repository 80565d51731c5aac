"""Whatever a client is connected to, and whatever that says: the right error in time, and the next read is well."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import replace

import pytest

from tests.support.raw_server import Behaviour, RawServer, payload_of, raw_server, reply_to
from tests.support.served_ring import LOOPBACK, ServedRing, served_ring
from ucxx_transport import (
    ClientConfig,
    DeadlineExceededError,
    Payload,
    PeerLostError,
    ProtocolError,
    SlotRef,
    TransportError,
    UCXXClient,
)

NBYTES = 100_000
LARGE = 64 << 20
# Long enough that what answers at once is heard, however busy the machine; a silent server costs all of it.
DEADLINE_S = 20.0
SILENCE_S = 1.5
LOST = (PeerLostError, DeadlineExceededError)


def ref_to(nbytes: int = NBYTES, **facts: object) -> SlotRef:
    """A reference into a ring of another host, as far as the client can tell."""
    ref = SlotRef(
        ring_id=b"0123456789abcdef", ring_name="elsewhere", slot=3, generation=5, nbytes=nbytes, host_id="another"
    )
    return replace(ref, host=LOOPBACK, **facts)  # type: ignore[arg-type]  # fields of a reference, by name


@pytest.fixture(scope="module")
def good() -> Iterator[ServedRing]:
    """A server that keeps to the protocol."""
    with served_ring(ports=1) as served:
        yield served


@asynccontextmanager
async def checked_client(good: ServedRing, **settings: object) -> AsyncIterator[UCXXClient]:
    """A client that must have given everything back after the block, and be able to read."""
    values: dict[str, object] = {"local": "off", "read_attempts": 1, "connect_timeout_s": DEADLINE_S, **settings}
    async with UCXXClient(ClientConfig(**values)) as client:  # type: ignore[arg-type]  # checked by the settings
        yield client
        seen = client.statistics()
        assert (seen.lent_buffers, seen.leaked_buffers, seen.reads) == (0, 0, 0)
        if "token" in settings:
            return
        ref = good.ring.write_raw(b"as if nothing had happened")
        with await client.read(ref, deadline_s=60) as payload:
            assert bytes(payload.buffer) == b"as if nothing had happened"


async def read_from(
    client: UCXXClient, behave: Behaviour, ref: SlotRef, *, deadline_s: float = DEADLINE_S
) -> tuple[type[TransportError], str]:
    """What reading from such a server ends with; a clean read fails the test."""
    async with raw_server(behave, ref) as port:
        try:
            payload = await client.read(replace(ref, ports=(port.number,)), deadline_s=deadline_s)
        except TransportError as error:
            return type(error), str(error)
    raise AssertionError(f"delivered {payload!r}")


REF = ref_to()
GOOD = reply_to(REF)
# What else a reply may say wrongly, the unit tests of the exchange show without UCX.
LIES: dict[str, tuple[bytes, type[TransportError], str]] = {
    "garbage": (bytes(range(256)) * 100, ProtocolError, "not a ucxx_transport reply"),
    "no bytes": (b"", ProtocolError, "not a ucxx_transport reply"),
    "half a payload": (GOOD[: NBYTES // 2], ProtocolError, "cut short"),
    "no trailer": (GOOD[:-16], ProtocolError, "cut short"),
    "a longer message than was posted": (GOOD + bytes(4096), PeerLostError, "longer than the buffer"),
}


def answering(message: bytes) -> Behaviour:
    """Proper until asked; then this message."""

    async def behave(server: RawServer) -> None:
        await server.be_asked()
        await server.say(message)

    return behave


def test_reply_that_is_none_or_of_another_length_is_the_right_error(good: ServedRing) -> None:
    async def scenario() -> None:
        async with checked_client(good) as client:
            for lie, (message, expected, words) in LIES.items():
                found, text = await read_from(client, answering(message), REF)
                assert (found, words in text) == (expected, True), f"{lie}: {text}"

    asyncio.run(scenario())


def test_second_answer_is_never_taken_for_the_next_payload(good: ServedRing) -> None:
    first, second = REF, ref_to(nbytes=NBYTES)
    second = replace(second, slot=4)

    async def twice(server: RawServer) -> None:
        await server.be_asked()
        await server.say(reply_to(first))
        await server.say(reply_to(first))

    async def scenario() -> None:
        async with UCXXClient(ClientConfig(local="off", read_attempts=1)) as client, raw_server(twice, first) as port:
            with await client.read(replace(first, ports=(port.number,)), deadline_s=DEADLINE_S) as payload:
                assert bytes(payload.buffer) == payload_of(first)
            with pytest.raises(ProtocolError, match="another payload"):
                await client.read(replace(second, ports=(port.number,)), deadline_s=DEADLINE_S)
            ref = good.ring.write_raw(b"fine")
            with await client.read(ref, deadline_s=DEADLINE_S) as payload:
                assert bytes(payload.buffer) == b"fine"

    asyncio.run(scenario())


# Silence, and hanging up.


async def never_greets(server: RawServer) -> None:
    await server.hear()


async def never_answers(server: RawServer) -> None:
    await server.be_asked()


async def hangs_up_at_once(server: RawServer) -> None:
    await server.endpoint.close()


async def hangs_up_when_asked(server: RawServer) -> None:
    await server.be_asked()
    await server.endpoint.close()


async def hangs_up_in_the_middle(server: RawServer) -> None:
    await server.be_asked()
    server.endpoint.post_send(reply_to(server.ref))
    await server.endpoint.close()


def test_silent_server_costs_the_deadline_and_no_more(good: ServedRing) -> None:
    async def scenario() -> None:
        async with checked_client(good) as client:
            reads = (
                read_from(client, behave, ref_to(LARGE, slot=slot), deadline_s=SILENCE_S)
                for slot, behave in enumerate((never_greets, never_answers))
            )
            assert [found for found, _ in await asyncio.gather(*reads)] == [DeadlineExceededError] * 2
            assert client.statistics().deadlines == 2

    asyncio.run(scenario())


def test_server_that_hangs_up_is_lost_at_once(good: ServedRing) -> None:
    rows = [
        (hangs_up_at_once, NBYTES),
        (hangs_up_when_asked, NBYTES),
        (hangs_up_in_the_middle, NBYTES),
        (hangs_up_in_the_middle, LARGE),
    ]

    async def scenario() -> None:
        async with checked_client(good) as client:
            for behave, nbytes in rows:
                found, text = await read_from(client, behave, ref_to(nbytes))
                assert found is PeerLostError, f"{behave.__name__}, {nbytes} bytes: {text}"
            assert client.statistics().quarantined == len(rows)

    asyncio.run(scenario())


# No UCX at all.


@contextmanager
def foreign_server(words: bytes, *, hangs_up: bool) -> Iterator[int]:
    """A plain TCP server that says something of its own to everybody; yields its port."""
    connections: list[socket.socket] = []

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            connection.sendall(words)
            if hangs_up:
                connection.close()
            else:
                connections.append(connection)

    with socket.create_server((LOOPBACK, 0)) as listener:
        thread = threading.Thread(target=accept, name="foreign-server")
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()
            for connection in connections:
                connection.close()


def test_foreign_servers_and_none_at_all_are_lost_in_time(good: ServedRing) -> None:
    http = b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n" * 50

    async def scenario(ports: list[int]) -> None:
        async with checked_client(good, connect_timeout_s=SILENCE_S, max_concurrent_reads=8) as client:
            refs = [ref_to(slot=slot, ports=(port,)) for slot, port in enumerate(ports)]
            outcomes = await client.read_many(refs, deadline_s=2 * SILENCE_S)
            assert [isinstance(outcome, LOST) for outcome in outcomes] == [True] * len(ports), outcomes
            assert client.statistics().quarantined == len(ports)

    with ExitStack() as stack:
        held = stack.enter_context(socket.socket())
        held.bind((LOOPBACK, 0))  # bound, not listening: nobody else gets it
        foreign = [(http, True), (http, False), (b"", True), (b"", False), (b"SSH-2.0-x\r\n", False)]
        ports = [stack.enter_context(foreign_server(words, hangs_up=hangs_up)) for words, hangs_up in foreign]
        asyncio.run(scenario([*ports, held.getsockname()[1]]))


def test_good_port_is_found_behind_a_bad_one(good: ServedRing) -> None:
    async def scenario() -> None:
        async with UCXXClient(ClientConfig(local="off", connect_timeout_s=SILENCE_S)) as client:
            with socket.socket() as held:
                held.bind((LOOPBACK, 0))
                for sequence in (0, 2):
                    refs = [
                        good.ring.write_raw(bytes([sequence + n]) * 100) for n in range(2)
                    ]  # overlapping: each port
                    refs = [replace(ref, ports=(held.getsockname()[1], *ref.ports)) for ref in refs]
                    for n, payload in enumerate(await client.read_many(refs, deadline_s=60)):
                        assert isinstance(payload, Payload)
                        assert bytes(payload.buffer) == bytes([sequence + n]) * 100
                        payload.release()
            seen = client.statistics()
            assert (seen.reads, seen.failed, seen.quarantined, seen.rotations) == (4, 0, 1, 1)

    asyncio.run(scenario())
