"""Both sessions of one connection, face to face, and the messages between them."""

from __future__ import annotations

from typing import TypeVar

from tests.support.numbered_session import Fetch, NumberedSession
from tests.support.payloads import answer_with, ref_to
from ucxx_transport.config import ServerConfig
from ucxx_transport.schema import SlotRef
from ucxx_transport.wire.actions import Action, Attempt, Reply, Serve
from ucxx_transport.wire.client_side import Asked
from ucxx_transport.wire.codec import check_trailer, decode_frame, decode_header, encode_reply, error_text
from ucxx_transport.wire.frames import (
    FRAME_BYTES,
    HEADER_BYTES,
    NONCE_BYTES,
    Frame,
    OfferedPayload,
    ReplyHeader,
    Status,
    Window,
)
from ucxx_transport.wire.server_side import DEFAULT_WINDOW, Phase, ServerSession, SessionSource

RING_ID = b"R" * 16
SCHEMA = b"a schema as msgpack"
FINGERPRINT = 99
TOKEN = b"the secret"
CLIENT_NONCE = b"c" * NONCE_BYTES
SERVER_NONCE = b"s" * NONCE_BYTES
READER = 77
LIMITS = ServerConfig()

A = TypeVar("A", bound=Action)


def ref(slot: int = 2, *, generation: int = 6, nbytes: int = 128, ring_id: bytes = RING_ID) -> SlotRef:
    """The name of a payload."""
    return ref_to(ring_id, slot, generation, nbytes, fingerprint=FINGERPRINT)


def payload(named: SlotRef, **changes: object) -> bytes:
    """The answer that brings it, but for the `changes` in its header."""
    return answer_with(named, bytes([named.slot & 0xFF]) * named.nbytes, **changes)


def offered(named: SlotRef, envelope: bytes = b"") -> OfferedPayload:
    """The same in an offer."""
    return OfferedPayload(named.slot, named.generation, named.nbytes, named.checksum, 1234, envelope)


def frame_of(asked: Asked) -> Frame:
    """What the server makes of it."""
    return decode_frame(asked.frame)


class Pair:
    """A client's and a server's session; `now` is the server's clock.

    Args:
        token: the server's. client_token: the client's, the same if not given.
        window: that the server grants.
        is_admitted: as in `ServerSession`.
        schema: the ring's.
    """

    def __init__(
        self,
        *,
        token: bytes | None = None,
        client_token: bytes | None = b"the same",
        window: Window = DEFAULT_WINDOW,
        is_admitted: bool = True,
        schema: bytes = SCHEMA,
    ) -> None:
        self.now = 1000.0
        source = SessionSource(ring_id=RING_ID, fingerprint=FINGERPRINT, schema_bytes=schema, window=window)
        self.server = ServerSession(
            source, ServerConfig(token=token), nonce=SERVER_NONCE, now=self.now, is_admitted=is_admitted
        )
        secret = token if client_token == b"the same" else client_token
        self.client = NumberedSession(reader=READER, nonce=CLIENT_NONCE, token=secret)
        self._posted = bytearray(FRAME_BYTES)  # used again for every frame, as a port does

    def actions(self, frame: bytes) -> list[Action]:
        """What the server does about a frame."""
        self._posted[: len(frame)] = frame
        return self.server.receive(self._posted, self.now)

    def action(self, asked: Asked | Fetch | bytes, kind: type[A]) -> A:
        """The one thing that the server does about a frame, once the ends are done that it brings."""
        *_, action = self.actions(asked if isinstance(asked, bytes) else asked.frame)
        assert isinstance(action, kind), action
        if not isinstance(asked, bytes) and isinstance(action, Reply):
            expected = asked.attempt if isinstance(asked, Asked) else asked.shared or asked.attempts[0]
            assert action.channel == expected & 0xFFFF
        return action

    def reply(self, asked: Asked | Fetch | bytes) -> bytes:
        """The message that answers a frame, which has left."""
        reply = self.action(asked, Reply)
        self.server.replied()
        return reply.message

    def open(self) -> Pair:
        """Shake hands."""
        auth = self.client.on_welcome(self.reply(self.client.hello()))
        if auth is not None:
            self.client.on_authenticated(self.reply(auth))
        assert self.server.phase is Phase.OPEN
        return self

    def fetch(self, *names: SlotRef, packed: bool = False) -> tuple[list[int], list[Attempt]]:
        """Ask for payloads: the client's numbers and the server's attempts."""
        fetch = self.client.ask(names, packed=packed)
        served = self.action(fetch, Serve)
        assert served.shared == fetch.shared & 0xFFFF
        assert [attempt.number for attempt in served.attempts] == fetch.attempts
        return fetch.attempts, served.attempts

    def deliver(self, *names: SlotRef, delivered: bool = True) -> list[Attempt]:
        """Ask for payloads, get them and end them; the ends wait."""
        numbers, attempts = self.fetch(*names)
        for number, attempt, name in zip(numbers, attempts, names, strict=True):
            self.server.sent(attempt, self.now)
            self.client.judge(number, payload(name))
            self.client.finish(number, delivered=delivered)
        return attempts


def ok(body: bytes) -> bytes:
    """An OK answer with this body."""
    return encode_reply(ReplyHeader(status=Status.OK, nbytes=len(body)), body)


def header_of(message: bytes) -> ReplyHeader:
    """The header that the client would see."""
    return decode_header(message)


def body_of(message: bytes) -> bytes:
    """The body of an OK answer, proved whole."""
    header = decode_header(message)
    assert header.status is Status.OK
    check_trailer(message, header)
    return message[HEADER_BYTES : HEADER_BYTES + header.nbytes]


def text_of(message: bytes) -> str:
    """The words of a refusal."""
    return error_text(message, decode_header(message))


def in_flight(*names: SlotRef) -> tuple[Pair, list[int]]:
    """An open pair and the numbers of attempts under way."""
    pair = Pair().open()
    return pair, pair.fetch(*names)[0]
