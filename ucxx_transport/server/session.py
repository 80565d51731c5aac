"""One connection as the server sees it: frame -> action, as a table. No I/O, no clock of its own.

```
 phase      frame      ->  phase      action
 GREETING   HELLO          IDLE       Reply(welcome)            no token configured
 GREETING   HELLO          CHALLENGED Reply(welcome, nonce)     a token is configured
 CHALLENGED AUTH (right)   IDLE       Reply(own mac)
 IDLE       READ           SERVING    Serve
 SERVING    ACK            IDLE       Finish
 IDLE       CONFIRM        IDLE       Settle
 IDLE       DESCRIBE       IDLE       Reply(schema)
 IDLE       BYE            CLOSING    Reply, the last one
 any        anything else  CLOSING    Reply(BAD_REQUEST | UNAUTHORIZED | BUSY), the last one
```
Every phase has a time limit; the shell around a session closes the connection once `deadline_s` has passed. A session
that has sent its final reply lingers for a moment, so that the client reads it before the connection breaks.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final, NamedTuple

from ucxx_transport.errors import ProtocolError
from ucxx_transport.wire.codec import decode_request, encode_error, encode_reply, macs_equal, token_mac
from ucxx_transport.wire.frames import (
    MAX_SCHEMA_BYTES,
    Ack,
    Auth,
    Bye,
    Confirm,
    Describe,
    Hello,
    ReadReply,
    ReadRequest,
    Request,
    Status,
)

# How long the last reply may take to be read before the connection breaks.
LINGER_S: Final = 1.0


class Phase(Enum):
    """Where a connection stands."""

    GREETING = "greeting"
    CHALLENGED = "challenged"
    IDLE = "idle"
    SERVING = "serving"
    CLOSING = "closing"


# An enum's attribute costs 0.3 µs in Python 3.11; these are on the hot path.
_IDLE: Final = Phase.IDLE
_SERVING: Final = Phase.SERVING


class Reply(NamedTuple):
    """Send these bytes. After the last reply (`Session.phase` is CLOSING) nothing more is read."""

    message: bytes
    status: Status


class Serve(NamedTuple):
    """Acquire the named slot and send it; call the session's `refused()` when the ring refuses."""

    request: ReadRequest


class Finish(NamedTuple):
    """The attempt in flight has ended: consume it if `delivered`, otherwise release it."""

    delivered: bool


class Settle(NamedTuple):
    """The client says that this payload arrived: consume it if it is still there, then answer OK."""

    request: ReadRequest


Action = Reply | Serve | Finish | Settle


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionLimits:
    """Seconds a connection may stay in each phase."""

    first_frame_timeout_s: float
    idle_timeout_s: float
    send_timeout_s: float
    ack_timeout_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionSource:
    """What a session may send its peer about the ring behind it."""

    ring_id: bytes
    fingerprint: int
    schema_bytes: bytes
    token: bytes | None = None


_PHASE_OF: Final[dict[type[Request], Phase]] = {
    Hello: Phase.GREETING,
    Auth: Phase.CHALLENGED,
    ReadRequest: Phase.IDLE,
    Confirm: Phase.IDLE,
    Describe: Phase.IDLE,
    Bye: Phase.IDLE,
    Ack: Phase.SERVING,
}


class Session:
    """The server's half of one connection.

    Args:
        source: identity, schema and token of the ring.
        limits: time limits by phase.
        nonce: 32 fresh random bytes, the server's half of the token challenge.
        now: the shell's clock, seconds.
        admitted: False for a connection above the cap: its first frame is answered BUSY.
    """

    def __init__(
        self, source: SessionSource, limits: SessionLimits, *, nonce: bytes, now: float, admitted: bool = True
    ) -> None:
        self._source = source
        self._limits = limits
        self._nonce = nonce
        self._client_nonce = b""
        self._admitted = admitted
        self._request: ReadRequest | None = None
        self.reader = 0
        self.phase = Phase.GREETING
        self.deadline_s = now + limits.first_frame_timeout_s

    def receive(self, frame: bytes | bytearray | memoryview, now: float) -> Action:
        """What to do about the client's next frame (128 bytes)."""
        if not self._admitted:
            return self._close(Status.BUSY, "this port is at its limit of connections; try another port or later", now)
        try:
            request = decode_request(frame)
        except ProtocolError as error:
            return self._close(Status.BAD_REQUEST, str(error), now)
        if self.phase is not _PHASE_OF[type(request)]:
            return self._out_of_turn(request, now)
        return self._obey(request, now)

    def _obey(self, request: Request, now: float) -> Action:
        match request:
            case ReadRequest():
                return self._read(request, now)
            case Ack():
                return self._ack(request, now)
            case Hello():
                return self._hello(request, now)
            case Auth(mac=mac):
                return self._auth(mac, now)
            case Confirm(request=named):
                return self._confirm(named, now)
            case Describe(ring_id=ring_id):
                return self._describe(ring_id, now)
            case Bye():
                self._last_word(now)
                return Reply(message=self._ok(), status=Status.OK)

    def sent(self, now: float) -> None:
        """The payload has left: from here on the acknowledgement's own limit counts."""
        if self.phase is _SERVING:
            self.deadline_s = min(self.deadline_s, now + self._limits.ack_timeout_s)

    def refused(self, status: Status, text: str, now: float) -> Reply:
        """The ring would not give the slot of the last `Serve`: the answer for the client."""
        named = self._request
        self._idle(now)
        return self._error(status, text, named)

    def settled(self, status: Status) -> Reply:
        """The ring's answer to the last `Settle`: OK; STALE, nothing is left to confirm; BUSY, it cannot say now."""
        if status is Status.OK:
            return Reply(message=self._ok(), status=status)
        text = "nothing left to confirm" if status is Status.STALE else "the ring is busy; confirm again later"
        return self._error(status, text, None)

    def _hello(self, hello: Hello, now: float) -> Action:
        self.reader = hello.reader
        self._client_nonce = hello.nonce
        token_required = self._source.token is not None
        if token_required:
            self.phase = Phase.CHALLENGED  # the first-frame limit covers the whole handshake
        else:
            self._idle(now)
        return Reply(message=self._ok(self._nonce, token_required=token_required), status=Status.OK)

    def _auth(self, mac: bytes, now: float) -> Action:
        token = self._source.token or b""
        if not macs_equal(mac, token_mac(token, "client", self._client_nonce, self._nonce)):
            return self._close(Status.UNAUTHORIZED, "wrong token; give client and server the same one", now)
        self._idle(now)
        return Reply(message=self._ok(token_mac(token, "server", self._client_nonce, self._nonce)), status=Status.OK)

    def _read(self, request: ReadRequest, now: float) -> Action:
        self._request = request
        refusal = self._mismatch(request)
        if refusal is not None:
            self.deadline_s = now + self._limits.idle_timeout_s
            return refusal
        self.phase = _SERVING
        self.deadline_s = now + self._limits.send_timeout_s
        return Serve(request=request)

    def _ack(self, ack: Ack, now: float) -> Action:
        named = self._request
        assert named is not None
        if (ack.slot, ack.generation, ack.attempt) != (named.slot, named.generation, named.attempt):
            return self._close(Status.BAD_REQUEST, "an ACK names another attempt than the one in flight", now)
        self._idle(now)
        return Finish(delivered=ack.delivered)

    def _describe(self, ring_id: bytes, now: float) -> Action:
        self.deadline_s = now + self._limits.idle_timeout_s
        if ring_id != self._source.ring_id:
            return self._error(Status.STALE, "this server stands before another ring", None)
        if len(self._source.schema_bytes) > MAX_SCHEMA_BYTES:
            return self._error(Status.INTERNAL, "the schema is larger than the wire allows", None)
        return Reply(message=self._ok(self._source.schema_bytes), status=Status.OK)

    def _confirm(self, named: ReadRequest, now: float) -> Action:
        self.deadline_s = now + self._limits.idle_timeout_s
        return self._mismatch(named) or Settle(request=named)

    def _mismatch(self, request: ReadRequest) -> Reply | None:
        if request.ring_id == self._source.ring_id:
            return None
        return self._error(Status.STALE, "this server stands before another ring", request)

    def _out_of_turn(self, request: Request, now: float) -> Reply:
        kind = type(request).__name__
        if self.phase in {Phase.GREETING, Phase.CHALLENGED} and not isinstance(request, Hello | Ack):
            return self._close(Status.UNAUTHORIZED, f"{kind} before the handshake", now)
        return self._close(Status.BAD_REQUEST, f"{kind} out of turn, while {self.phase.value}", now)

    def _idle(self, now: float) -> None:
        self.phase = _IDLE
        self.deadline_s = now + self._limits.idle_timeout_s

    def _ok(self, body: bytes = b"", *, token_required: bool = False) -> bytes:
        source = self._source
        reply = ReadReply(
            status=Status.OK,
            nbytes=len(body),
            ring_id=source.ring_id,
            fingerprint=source.fingerprint,
            token_required=token_required,
        )
        return encode_reply(reply, body)

    def _error(self, status: Status, text: str, named: ReadRequest | None) -> Reply:
        slot, generation = (named.slot, named.generation) if named else (0, 0)
        return Reply(message=encode_error(status, text, slot=slot, generation=generation), status=status)

    def _close(self, status: Status, text: str, now: float) -> Reply:
        self._last_word(now)
        return Reply(message=encode_error(status, text), status=status)

    def _last_word(self, now: float) -> None:
        self.phase = Phase.CLOSING
        self.deadline_s = now + LINGER_S
