"""Whatever a client is connected to, and whatever that says: the right error in time, and the next read is well."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace

import pytest
import xxhash

from tests.support.raw_server import Behaviour, RawServer, payload_of, raw_server, reply_to, welcome
from tests.support.served_ring import LOOPBACK, ServedRing, served_ring
from ucxx_transport import (
    AuthenticationError,
    BusyError,
    ChecksumError,
    ClientConfig,
    DeadlineExceededError,
    NotReadyError,
    Payload,
    PeerLostError,
    ProtocolError,
    Schema,
    SlotRef,
    StaleSlotError,
    TensorSpec,
    TransportError,
    UCXXClient,
)
from ucxx_transport.wire.codec import encode_error, encode_header_into, encode_reply
from ucxx_transport.wire.frames import ReadReply, Status

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
        assert (seen.lent_buffers, seen.parked_buffers, seen.reads) == (0, 0, 0)
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


def answering(*messages: bytes) -> Behaviour:
    """Proper until asked; then these messages."""

    async def behave(server: RawServer) -> None:
        await server.be_asked()
        for message in messages:
            await server.say(message)

    return behave


def patched(message: bytes, offset: int, form: str, value: int) -> bytes:
    words = bytearray(message)
    struct.pack_into(form, words, offset, value)
    return bytes(words)


def error_claiming(nbytes: int) -> bytes:
    header = bytearray(64)
    encode_header_into(header, ReadReply(status=Status.STALE, nbytes=0))
    return patched(bytes(header), 16, "<Q", nbytes)


REF = ref_to()
GOOD = reply_to(REF)
LIES: dict[str, tuple[bytes, type[TransportError], str]] = {
    "no such status": (patched(GOOD, 6, "<H", 99), ProtocolError, "unknown status"),
    "wrong magic": (patched(GOOD, 0, "<I", 0), ProtocolError, "not a ucxx_transport reply"),
    "wrong version": (patched(GOOD, 4, "<H", 9), ProtocolError, "version 9"),
    "another slot": (reply_to(REF, slot=4), ProtocolError, "another payload"),
    "another generation": (reply_to(REF, generation=4), ProtocolError, "another payload"),
    "another ring": (reply_to(REF, ring_id=bytes(16)), ProtocolError, "another payload"),
    "another schema": (reply_to(REF, fingerprint=7), ProtocolError, "not what its reference promised"),
    "a shorter payload": (reply_to(REF, nbytes=NBYTES - 1), ProtocolError, "not what its reference promised"),
    "half a payload": (GOOD[: NBYTES // 2], ProtocolError, "cut short"),
    "no trailer": (GOOD[:-16], ProtocolError, "cut short"),
    "half a trailer": (GOOD[:-8], ProtocolError, "cut short"),
    "a header alone": (GOOD[:64], ProtocolError, "cut short"),
    "half a header": (GOOD[:32], ProtocolError, "cut short|another payload"),
    "no bytes": (b"", ProtocolError, "not a ucxx_transport reply"),
    "more than was posted": (patched(GOOD, 16, "<Q", NBYTES + 4096), ProtocolError, "more bytes than were posted"),
    "2**63 bytes": (patched(GOOD, 16, "<Q", 2**63), ProtocolError, "more bytes than its kind may have"),
    "2**46 bytes": (patched(GOOD, 16, "<Q", 2**46), ProtocolError, "more bytes than were posted"),
    "an error of 2**32 bytes": (error_claiming(2**32), ProtocolError, "more bytes than its kind may have"),
    "an error of 1025 bytes": (error_claiming(1025), ProtocolError, "more bytes than its kind may have"),
    "garbage": (bytes(range(256)) * 100, ProtocolError, "not a ucxx_transport reply"),
    "a longer message": (GOOD + bytes(4096), PeerLostError, "longer than the buffer"),
    "stale": (encode_error(Status.STALE, "gone"), StaleSlotError, "gone"),
    "busy": (encode_error(Status.BUSY, "later"), BusyError, "later"),
    "internal": (encode_error(Status.INTERNAL, "broken"), PeerLostError, "broken"),
    "unauthorized": (encode_error(Status.UNAUTHORIZED, "no"), AuthenticationError, "no"),
    "bad request": (encode_error(Status.BAD_REQUEST, "what"), ProtocolError, "what"),
}


@pytest.mark.parametrize("name", LIES)
def test_lie_in_a_reply_is_the_right_error(good: ServedRing, name: str) -> None:
    message, cls, words = LIES[name]

    async def scenario() -> None:
        async with checked_client(good) as client:
            found, text = await read_from(client, answering(message), REF)
            assert found is cls, text
            assert any(word in text for word in words.split("|")), text

    asyncio.run(scenario())


def test_a_server_that_says_not_ready_and_no_more_costs_a_read_its_deadline(good: ServedRing) -> None:
    async def scenario() -> None:
        async with checked_client(good) as client:
            late = encode_error(Status.NOT_READY, "soon")
            found, _ = await read_from(client, answering(late), REF, deadline_s=1.0)
            assert found in {NotReadyError, DeadlineExceededError}
            assert client.statistics().not_ready > 0

    asyncio.run(scenario())


def test_error_text_is_bounded_and_printable(good: ServedRing) -> None:
    async def scenario() -> None:
        async with checked_client(good) as client:
            hostile = encode_error(Status.STALE, "\x1b[2J\n" * 1000 + "\ud800")
            found, text = await read_from(client, answering(hostile), REF)
            assert (found, text.isprintable(), len(text) < 1500) == (StaleSlotError, True, True)

    asyncio.run(scenario())


def test_changed_payload_is_a_checksum_error(good: ServedRing) -> None:
    ref = ref_to(checksum=xxhash.xxh3_64_intdigest(payload_of(REF)))

    async def scenario() -> None:
        async with checked_client(good) as client:
            found, _ = await read_from(client, answering(patched(reply_to(ref), 64 + 777, "<H", 0)), ref)
            assert found is ChecksumError

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


@pytest.mark.parametrize("behave", [never_greets, never_answers])
def test_silent_server_costs_the_deadline_and_no_more(good: ServedRing, behave: Behaviour) -> None:
    async def scenario() -> None:
        async with checked_client(good) as client:
            found, _ = await read_from(client, behave, ref_to(LARGE), deadline_s=SILENCE_S)
            assert found is DeadlineExceededError
            assert client.statistics().deadlines == 1

    asyncio.run(scenario())


@pytest.mark.parametrize("behave", [hangs_up_at_once, hangs_up_when_asked, hangs_up_in_the_middle])
@pytest.mark.parametrize("nbytes", [NBYTES, LARGE])
def test_server_that_hangs_up_is_lost_at_once(good: ServedRing, behave: Behaviour, nbytes: int) -> None:
    async def scenario() -> None:
        async with checked_client(good) as client:
            found, text = await read_from(client, behave, ref_to(nbytes))
            assert found is PeerLostError, text
            assert client.statistics().quarantined == 1

    asyncio.run(scenario())


# The handshake.

GREETINGS: dict[str, tuple[bytes, str | None, type[TransportError], str]] = {
    "garbage": (bytes(100), None, ProtocolError, "not a ucxx_transport reply"),
    "short nonce": (welcome(nonce_bytes=16), None, ProtocolError, "nonce"),
    "long nonce": (welcome(nonce_bytes=64), None, ProtocolError, "nonce"),
    "no nonce": (welcome(nonce_bytes=0), None, ProtocolError, "nonce"),
    "other version": (patched(welcome(), 4, "<H", 2), None, ProtocolError, "version 2"),
    "token asked for": (welcome(token_required=True), None, AuthenticationError, "asks for a token"),
    "no token asked for": (welcome(), "secret", AuthenticationError, "asks for none"),
    "busy": (encode_error(Status.BUSY, "full"), None, BusyError, "full"),
    "2**60 bytes": (patched(welcome(), 16, "<Q", 2**60), None, ProtocolError, "more bytes"),
}


@pytest.mark.parametrize("name", GREETINGS)
def test_bad_greeting_is_the_right_error(good: ServedRing, name: str) -> None:
    message, token, cls, words = GREETINGS[name]

    async def behave(server: RawServer) -> None:
        await server.hear()
        await server.say(message)

    async def scenario() -> None:
        async with checked_client(good, **({"token": token} if token else {})) as client:
            found, text = await read_from(client, behave, REF)
            assert (found, words in text) == (cls, True), text

    asyncio.run(scenario())


def test_impostor_that_does_not_know_the_token_is_found_out(good: ServedRing) -> None:
    async def behave(server: RawServer) -> None:
        await server.hear()
        await server.say(welcome(token_required=True))
        await server.hear()
        await server.say(welcome())  # 32 bytes where the proof belongs

    async def scenario() -> None:
        async with checked_client(good, token="secret") as client:
            found, text = await read_from(client, behave, REF)
            assert (found, "impostor" in text) == (AuthenticationError, True)

    asyncio.run(scenario())


# The schema.

SCHEMA = Schema([TensorSpec("a", (10,), "uint8")])
OTHER = Schema([TensorSpec("b", (10,), "uint8")])
DESCRIPTIONS: dict[str, tuple[bytes, type[TransportError]]] = {
    "another schema": (OTHER.to_bytes(), ProtocolError),
    "no schema": (b"\xc0", ProtocolError),
    "garbage": (b"\xff" * 1000, ProtocolError),
    "nothing": (b"", ProtocolError),
    "nesting": (b"\x91" * 5000, ProtocolError),
    "a list of 2**32": (b"\xdd\xff\xff\xff\xff", ProtocolError),
}


@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_false_description_of_the_schema_is_the_right_error(good: ServedRing, name: str) -> None:
    body, cls = DESCRIPTIONS[name]

    async def behave(server: RawServer) -> None:
        await server.greet()
        await server.hear()
        await server.say(encode_reply(ReadReply(status=Status.OK, nbytes=len(body)), body))

    async def scenario() -> None:
        async with checked_client(good) as client:
            found, text = await read_from(client, behave, ref_to(SCHEMA.nbytes, fingerprint=SCHEMA.fingerprint))
            assert found is cls, text

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


def read_nothing_from(good: ServedRing, port: int) -> None:
    async def scenario() -> None:
        async with checked_client(good, connect_timeout_s=SILENCE_S) as client:
            with pytest.raises(LOST):
                await client.read(ref_to(ports=(port,)), deadline_s=2 * SILENCE_S)
            assert client.statistics().quarantined == 1

    asyncio.run(scenario())


@pytest.mark.parametrize("hangs_up", [True, False])
@pytest.mark.parametrize(
    "words", [b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n" * 50, b"", b"SSH-2.0-x\r\n"]
)
def test_foreign_server_behind_the_port_is_lost_in_time(
    good: ServedRing,
    words: bytes,
    hangs_up: bool,
) -> None:
    with foreign_server(words, hangs_up=hangs_up) as port:
        read_nothing_from(good, port)


def test_nothing_behind_the_port_is_lost_in_time(good: ServedRing) -> None:
    with socket.socket() as held:
        held.bind((LOOPBACK, 0))  # bound, not listening: nobody else gets it
        read_nothing_from(good, held.getsockname()[1])


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
