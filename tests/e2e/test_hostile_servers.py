"""Whatever a client is connected to, and whatever that says: the right error in time, and the next read is well."""

from __future__ import annotations

import socket
import threading
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import pytest

from tests.support.payloads import ref_to
from tests.support.raw_server import Behaviour, RawServer, answer_to, payload_of, raw_server, welcome
from tests.support.rows import row
from tests.support.served_ring import LOOPBACK, ServedRing, client_of, served_ring
from ucxx_transport import (
    DeadlineExceededError,
    Payload,
    PeerLostError,
    ProtocolError,
    SlotRef,
    SyncUCXXClient,
    TransportError,
)
from ucxx_transport.wire.codec import encode_error
from ucxx_transport.wire.frames import HEADER_BYTES, Frame, Status

NBYTES = 100_000
LARGE = 64 << 20
# Long enough that what answers at once is heard, however busy the machine; a silent server costs all of it.
DEADLINE_S = 20.0
SILENCE_S = 1.5
LOST = (PeerLostError, DeadlineExceededError)


@pytest.fixture(scope="module")
def good() -> Iterator[ServedRing]:
    """A server that keeps to the protocol."""
    with served_ring(ports=1) as served:
        yield served


@contextmanager
def checked_client(good: ServedRing, **settings: object) -> Iterator[SyncUCXXClient]:
    """A client that must have given everything back after the block, and be able to read."""
    with client_of(
        read_attempts=1, connect_timeout_s=settings.pop("connect_timeout_s", DEADLINE_S), **settings
    ) as client:
        yield client
        with client.read(good.ring.write_raw(b"as if nothing had happened"), deadline_s=60) as payload:
            assert bytes(payload.buffer) == b"as if nothing had happened"
        seen = client.statistics()
        assert (seen.lent_buffers, seen.leaked_buffers, seen.reads) == (0, 0, 1)


def read_from(
    client: SyncUCXXClient, behave: Behaviour, ref: SlotRef, *, deadline_s: float = DEADLINE_S
) -> tuple[type[TransportError], str]:
    """What reading from such a server ends with; a clean read fails the test."""
    with raw_server(behave, ref) as port:
        try:
            payload = client.read(replace(ref, ports=(port.number,)), deadline_s=deadline_s)
        except TransportError as error:
            return type(error), str(error)
    raise AssertionError(f"delivered {payload!r}")


REF = ref_to(nbytes=NBYTES, host=LOOPBACK)
GOOD = answer_to(REF)
LONG_TEXT = bytearray(encode_error(Status.STALE, "x" * 1024).ljust(5000, b"x"))
LONG_TEXT[16:24] = (4000).to_bytes(8, "little")
# What else an answer may say wrongly, the unit tests of the client's session show without UCX.
LIES: dict[str, tuple[bytes, type[TransportError], str]] = {
    "garbage": (bytes(range(256)) * 100, ProtocolError, "not an answer of ucxx_transport"),
    "no bytes": (b"", ProtocolError, "not an answer of ucxx_transport"),
    "half a payload": (GOOD[: NBYTES // 2], ProtocolError, "cut short"),
    "no trailer": (GOOD[:-16], ProtocolError, "cut short"),
    "another version": (GOOD[:4] + b"\1\0" + GOOD[6:], ProtocolError, "speaks protocol version 1, this side 2"),
    "a text beyond its limit": (bytes(LONG_TEXT), ProtocolError, "more bytes than its kind"),
    "a longer message than was posted": (GOOD + bytes(4096), PeerLostError, "longer than the buffer"),
}


def answering(message: bytes) -> Behaviour:
    """Proper until asked; then this message."""

    def behave(server: RawServer) -> Generator[None, Frame, None]:
        attempt = yield from server.be_asked()
        server.say(message, attempt)

    return behave


def greeting(message: bytes) -> Behaviour:
    """This message instead of a welcome."""

    def behave(server: RawServer) -> Generator[None, Frame, None]:
        hello = yield
        server.say(message, hello.attempt)

    return behave


def test_answer_that_is_none_or_of_another_length_is_the_right_error(good: ServedRing) -> None:
    with checked_client(good) as client:
        for lie, (message, expected, words) in LIES.items():
            with row(lie=lie):
                found, text = read_from(client, answering(message), REF)
                assert (found, words in text) == (expected, True), text


def test_welcome_that_is_none_is_the_right_error(good: ServedRing) -> None:
    rows = [
        ("garbage", bytes(range(256)), "not an answer of ucxx_transport"),
        ("cut short", welcome()[:-16], "cut short"),
        ("no nonce", welcome()[:HEADER_BYTES], "cut short"),
        ("no window", welcome(attempts=0), "no possible window"),
        ("version 1", welcome()[:4] + b"\1\0" + welcome()[6:], "speaks protocol version 1, this side 2"),
    ]
    with checked_client(good) as client:
        for lie, message, words in rows:
            with row(lie=lie):
                found, text = read_from(client, greeting(message), REF)
                assert (found, words in text) == (ProtocolError, True), text


def test_another_answer_ahead_of_time_is_never_taken_for_the_next_payload(good: ServedRing) -> None:
    first, second = REF, replace(REF, slot=4)

    def twice(server: RawServer) -> Generator[None, Frame, None]:
        attempt = yield from server.be_asked()
        for number in range(attempt, attempt + 20):  # on the next read's channel too, whichever that is
            server.say(answer_to(first), number)

    with client_of(read_attempts=1) as client, raw_server(twice, first) as port:
        with client.read(replace(first, ports=(port.number,)), deadline_s=DEADLINE_S) as payload:
            assert bytes(payload.buffer) == payload_of(first)
        with pytest.raises(ProtocolError, match="another payload"):
            client.read(replace(second, ports=(port.number,)), deadline_s=DEADLINE_S)
        with client.read(good.ring.write_raw(b"fine"), deadline_s=DEADLINE_S) as payload:
            assert bytes(payload.buffer) == b"fine"


def test_messages_that_no_one_asked_for_do_not_pile_up_or_disturb(good: ServedRing) -> None:
    def chatting(server: RawServer) -> Generator[None, Frame, None]:
        attempt = yield from server.be_asked()
        for number in range(1, 3000):
            server.say(b"?" * 1000, attempt + 100 + number)
        server.say(GOOD, attempt)

    with client_of(read_attempts=1) as client, raw_server(chatting, REF) as port:
        with client.read(replace(REF, ports=(port.number,)), deadline_s=60.0) as payload:
            assert bytes(payload.buffer) == payload_of(REF)
        with client.read(good.ring.write_raw(b"fine"), deadline_s=60.0) as payload:
            assert bytes(payload.buffer) == b"fine"


# Silence, and hanging up.


def never_greets(server: RawServer) -> Generator[None, Frame, None]:
    del server
    yield


def never_answers(server: RawServer) -> Generator[None, Frame, None]:
    yield from server.be_asked()


def hangs_up_when_greeted(server: RawServer) -> Generator[None, Frame, None]:
    yield
    server.endpoint.close()


def hangs_up_when_asked(server: RawServer) -> Generator[None, Frame, None]:
    yield from server.be_asked()
    server.endpoint.close()


def hangs_up_in_the_middle(server: RawServer) -> Generator[None, Frame, None]:
    attempt = yield from server.be_asked()
    server.say(answer_to(server.ref), attempt)
    server.endpoint.close()


def test_silent_servers_cost_the_deadline_and_no_more(good: ServedRing) -> None:
    refs = [replace(REF, nbytes=LARGE, slot=slot) for slot in range(2)]
    with (
        checked_client(good) as client,
        raw_server(never_greets, refs[0]) as one,
        raw_server(never_answers, refs[1]) as two,
    ):
        named = [replace(ref, ports=(port.number,)) for ref, port in zip(refs, (one, two), strict=True)]
        outcomes = client.read_many(named, deadline_s=SILENCE_S)
        assert [type(outcome) for outcome in outcomes] == [DeadlineExceededError] * 2
        assert client.statistics().deadlines == 2


def test_server_that_hangs_up_is_lost_at_once(good: ServedRing) -> None:
    rows = [
        (hangs_up_when_greeted, NBYTES),
        (hangs_up_when_asked, NBYTES),
        (hangs_up_in_the_middle, LARGE),
    ]
    with checked_client(good) as client:
        for behave, nbytes in rows:
            with row(behaviour=behave.__name__, nbytes=nbytes):
                ref = replace(REF, nbytes=nbytes)
                found, text = read_from(client, behave, ref)
                assert found is PeerLostError, text
        assert client.statistics().quarantined == len(rows)


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
    with ExitStack() as stack:
        held = stack.enter_context(socket.socket())
        held.bind((LOOPBACK, 0))  # bound, not listening: no one else gets it
        foreign = [(http, True), (http, False), (b"", True), (b"", False), (b"SSH-2.0-x\r\n", False)]
        ports = [stack.enter_context(foreign_server(words, hangs_up=hangs_up)) for words, hangs_up in foreign]
        ports.append(held.getsockname()[1])
        client = stack.enter_context(checked_client(good, connect_timeout_s=SILENCE_S))
        refs = [replace(REF, slot=slot, ports=(port,)) for slot, port in enumerate(ports)]
        outcomes = client.read_many(refs, deadline_s=60)  # a client that could not look gives a port its time again
        assert [isinstance(outcome, LOST) for outcome in outcomes] == [True] * len(ports), outcomes
        assert client.statistics().quarantined >= len(ports)


def test_good_port_is_found_behind_a_bad_one(good: ServedRing) -> None:
    with client_of(connect_timeout_s=SILENCE_S) as client, socket.socket() as held:
        held.bind((LOOPBACK, 0))
        for sequence in (0, 2):
            refs = [good.ring.write_raw(bytes([sequence + n]) * 100) for n in range(2)]
            refs = [replace(ref, ports=(held.getsockname()[1], *ref.ports)) for ref in refs]
            for n, payload in enumerate(client.read_many(refs, deadline_s=60)):
                assert isinstance(payload, Payload), payload
                assert bytes(payload.buffer) == bytes([sequence + n]) * 100
                payload.release()
        seen = client.statistics()
        assert (seen.reads, seen.failed) == (4, 0)
        assert seen.quarantined <= 1, "the bad port is tried once at most"
