"""The handshake, both ways: who is refused, by whom, and in what words."""

from __future__ import annotations

import struct
from itertools import combinations

import pytest

from tests.support.rows import row
from tests.unit.wire.session_rig import (
    CLIENT_NONCE,
    READER,
    RING_ID,
    SERVER_NONCE,
    TOKEN,
    Pair,
    body_of,
    header_of,
    ok,
    text_of,
)
from ucxx_transport.errors import AuthenticationError, BusyError, ProtocolError, TransportError
from ucxx_transport.wire import server_side
from ucxx_transport.wire.actions import Reply
from ucxx_transport.wire.codec import WELCOME_BYTES, encode_error, encode_frame, token_mac
from ucxx_transport.wire.frames import MAC_BYTES, MAX_NAMES, Frame, Kind, Status, Window, receive_bytes


def test_without_a_token_on_either_side_hello_is_all() -> None:
    pair = Pair(window=Window(7, 1000))
    asked = pair.client.hello()
    message = pair.reply(asked)
    assert pair.client.on_welcome(message) is None
    assert pair.client.is_open
    assert pair.server.phase is server_side.Phase.OPEN
    assert pair.server.reader == READER
    assert pair.client.window == (7, 1000)
    assert pair.client.ring_id == RING_ID
    assert len(message) <= asked.receive_bytes


def test_with_a_token_each_side_proves_it_to_the_other() -> None:
    pair = Pair(token=TOKEN)
    auth = pair.client.on_welcome(pair.reply(pair.client.hello()))
    assert auth is not None
    assert TOKEN not in auth.frame
    assert (pair.client.is_open, pair.server.phase.name) == (False, "CHALLENGED")
    message = pair.reply(auth)
    assert TOKEN not in message
    assert body_of(message) == token_mac(TOKEN, "server", CLIENT_NONCE, SERVER_NONCE)
    pair.client.on_authenticated(message)
    assert (pair.client.is_open, pair.server.phase.name) == (True, "OPEN")


def test_only_one_side_with_a_token_is_an_authentication_error_that_says_what_to_set() -> None:
    rows: list[tuple[bytes | None, bytes | None, str]] = [
        (TOKEN, None, r"set ClientConfig\(token=…\)"),
        (None, TOKEN, r"set ServerConfig\(token=…\)"),
    ]
    for token, client_token, words in rows:
        pair = Pair(token=token, client_token=client_token)
        with row(token=token), pytest.raises(AuthenticationError, match=words):
            pair.client.on_welcome(pair.reply(pair.client.hello()))


def test_a_wrong_token_is_refused_and_closes() -> None:
    pair = Pair(token=TOKEN, client_token=b"another")
    auth = pair.client.on_welcome(pair.reply(pair.client.hello()))
    assert auth is not None
    message = pair.reply(auth)
    assert header_of(message).status is Status.UNAUTHORIZED
    with pytest.raises(AuthenticationError, match="the same"):
        pair.client.on_authenticated(message)
    assert pair.server.phase is server_side.Phase.CLOSING
    assert not pair.client.is_open


def test_a_wrong_mac_is_unauthorized_and_cannot_be_tried_again() -> None:
    rows: list[bytes] = [
        token_mac(b"wrong", "client", CLIENT_NONCE, SERVER_NONCE),
        token_mac(b"", "client", CLIENT_NONCE, SERVER_NONCE),
        bytes(MAC_BYTES),
        token_mac(TOKEN, "server", CLIENT_NONCE, SERVER_NONCE),
        token_mac(TOKEN, "client", CLIENT_NONCE, bytes(32)),
    ]
    for mac in rows:
        pair = Pair(token=TOKEN)
        pair.reply(pair.client.hello())
        with row(mac=mac):
            message = pair.reply(encode_frame(Frame(Kind.AUTH, 2, attempt=2, secret=mac)))
            assert header_of(message).status is Status.UNAUTHORIZED
            assert TOKEN not in message
            right = token_mac(TOKEN, "client", CLIENT_NONCE, SERVER_NONCE)
            assert pair.actions(encode_frame(Frame(Kind.AUTH, 3, attempt=3, secret=right))) == []
            assert pair.server.phase is server_side.Phase.CLOSING


def test_a_server_that_cannot_prove_the_token_is_an_impostor() -> None:
    rows: list[bytes] = [
        token_mac(b"wrong", "server", CLIENT_NONCE, SERVER_NONCE),
        token_mac(TOKEN, "client", CLIENT_NONCE, SERVER_NONCE),  # what the client itself sent
        bytes(MAC_BYTES),
        b"",
        token_mac(TOKEN, "server", CLIENT_NONCE, SERVER_NONCE)[:-1],
    ]
    for mac in rows:
        pair = Pair(token=TOKEN)
        pair.client.on_welcome(pair.reply(pair.client.hello()))
        with row(mac=mac), pytest.raises(AuthenticationError, match="impostor"):
            pair.client.on_authenticated(ok(mac))


def test_the_mac_is_bound_to_token_role_and_both_nonces() -> None:
    mac = token_mac(TOKEN, "client", CLIENT_NONCE, SERVER_NONCE)
    macs = [
        mac,
        token_mac(TOKEN, "server", CLIENT_NONCE, SERVER_NONCE),  # it cannot be reflected to its sender
        token_mac(TOKEN, "client", SERVER_NONCE, CLIENT_NONCE),
        token_mac(TOKEN, "client", b"d" * 32, SERVER_NONCE),  # nor replayed on another connection
        token_mac(TOKEN, "client", CLIENT_NONCE, b"t" * 32),
        token_mac(b"other token", "client", CLIENT_NONCE, SERVER_NONCE),
        token_mac(b"", "client", CLIENT_NONCE, SERVER_NONCE),
    ]
    assert len(mac) == MAC_BYTES
    assert token_mac(TOKEN, "client", CLIENT_NONCE, SERVER_NONCE) == mac
    assert not any(left == right for left, right in combinations(macs, 2))


def test_a_full_port_answers_busy_whatever_is_said() -> None:
    for frame in (encode_frame(Frame(Kind.HELLO, 1, attempt=1, word=1)), b"\xde\xad" * 64, bytes(128), b"UXTQ"):
        pair = Pair(is_admitted=False)
        with row(frame=frame):
            message = pair.reply(frame)
            assert header_of(message).status is Status.BUSY
            assert pair.server.phase is server_side.Phase.CLOSING
            pair.client.hello()
            with pytest.raises(BusyError, match="limit of connections"):
                pair.client.on_welcome(message)


def test_a_client_of_version_1_is_refused_by_name() -> None:
    old = struct.pack(
        "<IHH16sQQQII32s32xQ", *struct.unpack("<I", b"UXTQ"), 1, 1, bytes(16), 0, 0, 7, 0, 0, b"n" * 32, 1
    )
    pair = Pair()
    reply = pair.action(old, Reply)
    assert (reply.channel, reply.status) == (1, Status.BAD_REQUEST)
    assert "protocol version 1, this side 2; install one release on both" in text_of(reply.message)
    assert pair.server.phase is server_side.Phase.CLOSING


def test_a_server_of_version_1_is_refused_by_name() -> None:
    pair = Pair()
    message = bytearray(pair.reply(pair.client.hello()))
    struct.pack_into("<H", message, 4, 1)
    with pytest.raises(ProtocolError, match="server speaks protocol version 1, this side 2; install one release"):
        pair.client.on_welcome(message)
    assert pair.client.broken


def test_a_foreign_or_broken_welcome_is_a_protocol_error() -> None:
    def welcome(nonce: bytes = SERVER_NONCE, attempts: int = 64, nbytes: int = 1 << 20) -> bytes:
        return ok(nonce + struct.pack("<IIQ", attempts, 0, nbytes))

    fine = Pair()
    fine.client.hello()
    assert fine.client.on_welcome(welcome()) is None
    rows: list[bytes] = [
        b"",
        b"SSH-2.0-OpenSSH_9.6\r\n".ljust(200, b"\0"),
        bytes(receive_bytes(WELCOME_BYTES)),
        welcome()[:-1],
        welcome()[:-16] + bytes(16),
        welcome(nonce=SERVER_NONCE[:-1]),
        welcome(nonce=SERVER_NONCE + b"x"),
        welcome(attempts=0),
        welcome(attempts=MAX_NAMES + 1),
        welcome(attempts=(1 << 32) - 1),
        welcome(nbytes=0),
        encode_error(Status.EMPTY, ""),
    ]
    for message in rows:
        pair = Pair()
        pair.client.hello()
        with row(message=message), pytest.raises(ProtocolError):
            pair.client.on_welcome(message)
        assert not pair.client.is_open


def test_a_refusal_of_the_handshake_brings_the_servers_words() -> None:
    for status in (status for status in Status if status is not Status.OK):
        pair = Pair()
        pair.client.hello()
        with row(status=status), pytest.raises(TransportError, match="because of it"):
            pair.client.on_welcome(encode_error(status, "because of it"))
