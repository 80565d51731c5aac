"""A session in any phase, and the replies it gives, taken apart."""

from __future__ import annotations

from ucxx_transport.server.session import Phase, Reply, Session, SessionLimits, SessionSource
from ucxx_transport.wire.codec import check_trailer, decode_header, encode_request, error_text, token_mac
from ucxx_transport.wire.frames import HEADER_BYTES, NONCE_BYTES, Auth, Bye, Hello, ReadReply, ReadRequest, Request

RING_ID = b"R" * 16
SCHEMA = b"a schema as msgpack"
TOKEN = b"the secret"
CLIENT_NONCE = b"c" * NONCE_BYTES
SERVER_NONCE = b"s" * NONCE_BYTES
ATTEMPT = 11
NAMED = ReadRequest(ring_id=RING_ID, slot=2, generation=6, attempt=ATTEMPT, nbytes=128)
LIMITS = SessionLimits(first_frame_timeout_s=5.0, idle_timeout_s=120.0, send_timeout_s=60.0, ack_timeout_s=10.0)


def session_with(
    *, token: bytes | None = TOKEN, admitted: bool = True, schema_bytes: bytes = SCHEMA, now: float = 0.0
) -> Session:
    """A new session, in GREETING."""
    source = SessionSource(ring_id=RING_ID, fingerprint=99, schema_bytes=schema_bytes, token=token)
    return Session(source, LIMITS, nonce=SERVER_NONCE, now=now, admitted=admitted)


def auth_with(token: bytes) -> Auth:
    """The answer to the challenge of `session_with()` by a client that knows `token`."""
    return Auth(mac=token_mac(token, "client", CLIENT_NONCE, SERVER_NONCE))


def at_phase(phase: Phase, *, now: float = 0.0) -> Session:
    """A session with a token, brought to `phase` by legal frames at time `now`."""
    session = session_with(now=now)
    steps: dict[Phase, list[Request]] = {
        Phase.GREETING: [],
        Phase.CHALLENGED: [Hello(reader=77, nonce=CLIENT_NONCE)],
        Phase.IDLE: [Hello(reader=77, nonce=CLIENT_NONCE), auth_with(TOKEN)],
        Phase.SERVING: [Hello(reader=77, nonce=CLIENT_NONCE), auth_with(TOKEN), NAMED],
        Phase.CLOSING: [Hello(reader=77, nonce=CLIENT_NONCE), auth_with(TOKEN), Bye()],
    }
    for frame in steps[phase]:
        session.receive(encode_request(frame), now)
    assert session.phase is phase
    return session


def header_of(reply: Reply) -> ReadReply:
    """The header the client would see."""
    header = decode_header(reply.message)
    assert header.status is reply.status
    return header


def body_of(reply: Reply) -> bytes:
    """The body of an OK reply, proved whole."""
    header = header_of(reply)
    check_trailer(reply.message, header)
    return reply.message[HEADER_BYTES : HEADER_BYTES + header.nbytes]


def text_of(reply: Reply) -> str:
    """The words of a refusal."""
    return error_text(reply.message, header_of(reply))
