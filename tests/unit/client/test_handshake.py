"""HELLO and AUTH as the client sees them: both sides must know the token, or neither."""

from __future__ import annotations

import pytest

from tests.support.rows import row
from ucxx_transport.client.exchange import HANDSHAKE_RECEIVE_BYTES, Handshake
from ucxx_transport.errors import AuthenticationError, BusyError, ProtocolError
from ucxx_transport.wire.codec import decode_request, encode_error, encode_reply, token_mac
from ucxx_transport.wire.frames import MAC_BYTES, NONCE_BYTES, Auth, Hello, ReadReply, Status

TOKEN = b"the secret"
CLIENT_NONCE = b"c" * NONCE_BYTES
SERVER_NONCE = b"s" * NONCE_BYTES


def handshake(token: bytes | None = TOKEN) -> Handshake:
    return Handshake(reader=7, nonce=CLIENT_NONCE, token=token)


def welcome(*, token_required: bool, nonce: bytes = SERVER_NONCE) -> bytes:
    return encode_reply(ReadReply(status=Status.OK, nbytes=len(nonce), token_required=token_required), nonce)


def answer_to_auth(mac: bytes) -> bytes:
    return encode_reply(ReadReply(status=Status.OK, nbytes=len(mac)), mac)


def test_hello_names_the_reader_and_brings_the_nonce() -> None:
    assert decode_request(handshake().hello()) == Hello(reader=7, nonce=CLIENT_NONCE)


def test_without_a_token_on_either_side_hello_is_all() -> None:
    assert handshake(None).welcome(welcome(token_required=False)) is None


def test_a_challenge_is_answered_with_the_proof_of_the_token() -> None:
    frame = handshake().welcome(welcome(token_required=True))
    assert frame is not None
    assert decode_request(frame) == Auth(mac=token_mac(TOKEN, "client", CLIENT_NONCE, SERVER_NONCE))
    assert TOKEN not in frame


def test_a_server_that_proves_the_token_is_accepted() -> None:
    shaking = handshake()
    shaking.welcome(welcome(token_required=True))
    shaking.authenticated(answer_to_auth(token_mac(TOKEN, "server", CLIENT_NONCE, SERVER_NONCE)))


def test_a_server_that_cannot_prove_the_token_is_an_impostor() -> None:
    rows: list[bytes] = [
        bytes(MAC_BYTES),
        token_mac(b"guess", "server", CLIENT_NONCE, SERVER_NONCE),
        token_mac(TOKEN, "client", CLIENT_NONCE, SERVER_NONCE),
        token_mac(TOKEN, "server", bytes(NONCE_BYTES), SERVER_NONCE),
        b"",
        token_mac(TOKEN, "server", CLIENT_NONCE, SERVER_NONCE)[:-1],
        token_mac(TOKEN, "server", CLIENT_NONCE, SERVER_NONCE) + b"\0",
    ]
    for mac in rows:
        with row(mac=mac):
            shaking = handshake()
            shaking.welcome(welcome(token_required=True))
            with pytest.raises(AuthenticationError, match="impostor"):
                shaking.authenticated(answer_to_auth(mac))


def test_a_server_that_asks_for_no_token_is_not_trusted_by_a_client_that_has_one() -> None:
    with pytest.raises(AuthenticationError, match="asks for none"):
        handshake().welcome(welcome(token_required=False))


def test_a_client_without_a_token_is_told_what_to_set() -> None:
    with pytest.raises(AuthenticationError, match="ClientConfig"):
        handshake(None).welcome(welcome(token_required=True))


def test_a_refused_token_is_an_authentication_error() -> None:
    shaking = handshake()
    shaking.welcome(welcome(token_required=True))
    with pytest.raises(AuthenticationError, match="wrong token"):
        shaking.authenticated(encode_error(Status.UNAUTHORIZED, "wrong token"))


def test_a_full_port_says_busy() -> None:
    with pytest.raises(BusyError):
        handshake().welcome(encode_error(Status.BUSY, "full"))


def test_a_nonce_of_another_length_is_no_handshake() -> None:
    nonce_rows: list[bytes] = [b"", SERVER_NONCE[:-1], SERVER_NONCE * 2]
    token_rows: list[bytes | None] = [None, TOKEN]
    for token in token_rows:
        for nonce in nonce_rows:
            with row(token=token, nonce=nonce), pytest.raises(ProtocolError, match="nonce"):
                handshake(token).welcome(welcome(token_required=token is not None, nonce=nonce))


@pytest.mark.parametrize(
    "message",
    [bytes(HANDSHAKE_RECEIVE_BYTES), b"HTTP/1.1 400 Bad Request\r\n".ljust(HANDSHAKE_RECEIVE_BYTES, b"\0"), b""],
    ids=["silence", "http", "nothing"],
)
def test_a_foreign_server_is_a_protocol_error(message: bytes) -> None:
    with pytest.raises(ProtocolError):
        handshake().welcome(message)
    with pytest.raises(ProtocolError):
        handshake().authenticated(message)


def test_a_welcome_cut_short_is_a_protocol_error() -> None:
    whole = welcome(token_required=True)
    for length in range(len(whole.rstrip(b"\0"))):  # zeros at its end are what a fresh buffer holds
        with pytest.raises(ProtocolError):
            handshake().welcome(whole[:length].ljust(HANDSHAKE_RECEIVE_BYTES, b"\0"))
