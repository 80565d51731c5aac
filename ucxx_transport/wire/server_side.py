"""The server's half of one connection: frame -> actions, as a table. No I/O, no clock of its own.

```
 phase      frame          ->  phase      actions, in the order in which they are to be done
 GREETING   HELLO              OPEN       Reply(welcome)                    no token configured
 GREETING   HELLO              CHALLENGED Reply(welcome)                    a token is configured
 CHALLENGED AUTH (right)       OPEN       Reply(own mac)
 OPEN       any                OPEN       End for each end that it brings, and then
            FETCH                         Serve, if it has names
            TAKE                          Take
            CONFIRM                       Settle
            DESCRIBE                      Reply(schema)
            BYE                CLOSING    Reply, the last one
 any        anything else      CLOSING    Reply(BAD_REQUEST | UNAUTHORIZED | BUSY), the last one
```
Every phase has a time limit; the shell around a session closes the connection once `limit()` has passed. A session that
has sent its last reply lingers for a moment, so that the client reads it before the connection breaks.

An attempt is over when two things are known, in any order: how it ended, and that its message has left. The shell
finalises its lease then, once. What has not left yet is bounded, for named payloads, taken ones and other replies: a
peer that reads nothing loses its connection before it piles anything up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final, NamedTuple, Protocol, TypeAlias

from ucxx_transport.errors import ProtocolError
from ucxx_transport.wire.codec import (
    Message,
    answer_channel,
    check_packed,
    decode_frame,
    encode_error,
    encode_offer,
    encode_reply,
    encode_welcome,
    macs_equal,
    token_mac,
)
from ucxx_transport.wire.frames import (
    FLAG_NEWEST,
    MAX_CHANNEL,
    MAX_NAMES,
    MAX_SCHEMA_BYTES,
    Frame,
    Kind,
    OfferedPayload,
    ReplyHeader,
    Status,
    Window,
    message_bytes,
)

# How long the last reply may take to be read before the connection breaks.
LINGER_S: Final = 1.0
# Replies that have not left yet (payloads apart): two FETCHes of which every name is refused.
MAX_UNSENT_REPLIES: Final = 2 * MAX_NAMES
# TAKEs that wait on one connection.
MAX_TAKES: Final = 8
DEFAULT_WINDOW: Final = Window(MAX_NAMES, 256 << 20)


class Phase(Enum):
    """Where a connection stands."""

    GREETING = "greeting"
    CHALLENGED = "challenged"
    OPEN = "open"
    CLOSING = "closing"


# An enum's attribute costs 0.3 µs in Python 3.11; these are on the hot path.
_OPEN: Final = Phase.OPEN
_FETCH: Final = int(Kind.FETCH)
_IN_HANDSHAKE: Final = {Phase.GREETING: int(Kind.HELLO), Phase.CHALLENGED: int(Kind.AUTH)}
_NAMES: Final = {int(kind): kind.name for kind in Kind}


class Lease(Protocol):
    """What the shell holds for an attempt; a ring's `ReadLease` is one."""

    def mark_consumed(self) -> bool: ...
    def release_reading(self) -> bool: ...


class Send(Protocol):
    """The operation that sends an attempt's message."""

    @property
    def completed(self) -> bool: ...


class Attempt:
    """One payload under way to the client.

    Attributes:
        number: the client's number for it. channel: on which its message goes, unless it shares one.
        slot, generation, nbytes: the payload.
        is_taken: the server picked it.
        since_s: when it was named. sent_s: when its message had left, None before.
        delivered: how the client ended it, None before.
        lease, send: the shell's.
    """

    __slots__ = (
        "delivered", "generation", "is_taken", "lease", "nbytes", "number", "send", "sent_s", "since_s", "slot",
    )  # fmt: skip

    def __init__(
        self, number: int, slot: int, generation: int, nbytes: int, since_s: float, *, is_taken: bool = False
    ) -> None:
        self.number = number
        self.slot = slot
        self.generation = generation
        self.nbytes = nbytes
        self.since_s = since_s
        self.is_taken = is_taken
        self.sent_s: float | None = None
        self.delivered: bool | None = None
        self.lease: Lease | None = None
        self.send: Send | None = None

    @property
    def channel(self) -> int:
        """Where its message goes, unless it shares one."""
        return self.number & MAX_CHANNEL


class Reply(NamedTuple):
    """Send these bytes, and call `replied()` when they have left. After the last one (CLOSING) nothing more is read."""

    message: bytes
    channel: int
    status: Status


class Serve(NamedTuple):
    """Acquire each slot and send it on its attempt's channel, or all in one message on channel `shared` (if not 0).

    For each: `sent()` when its message has left, or `refused()` instead, when the ring refuses.
    """

    attempts: list[Attempt]
    shared: int


class End(NamedTuple):
    """The client has ended this attempt (`attempt.delivered`). If its message has left (`sent_s`), finalise it now."""

    attempt: Attempt


class Take(NamedTuple):
    """Pick READY payloads within `take_room()`; answer by `taken()`, or `nothing()` once `until_s` has come.

    Attributes:
        attempt: of the answer. max_payloads, max_bytes: what the client asked for.
        newest: newest first, else oldest.
        until_s: how long to wait for a first payload.
    """

    attempt: int
    max_payloads: int
    max_bytes: int
    newest: bool
    until_s: float


class Settle(NamedTuple):
    """The client says that these (slot, generation) were delivered, or need not be; answer by `settled()`."""

    names: list[tuple[int, int]]
    attempt: int


Action: TypeAlias = Reply | Serve | End | Take | Settle


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionLimits:
    """Seconds a connection may stay in each phase, and its window."""

    first_frame_timeout_s: float
    idle_timeout_s: float
    send_timeout_s: float
    ack_timeout_s: float
    window: Window = DEFAULT_WINDOW


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionSource:
    """What a session may send its peer about the ring behind it."""

    ring_id: bytes
    fingerprint: int
    schema_bytes: bytes
    token: bytes | None = None


class Limit(NamedTuple):
    """When a connection is to be closed, and the counter of what it did too slowly."""

    when_s: float
    counter: str


class ServerSession:
    """See the module.

    Args:
        source: identity, schema and token of the ring.
        limits: time limits by phase, and the window.
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
        self._sequence = 0
        self._last = 0  # attempt
        self._since_s = now  # of the phase, or of the last frame
        self._moved_s = now  # when a message last left
        self._named = 0
        self._named_bytes = 0
        self._taken = 0
        self._taken_bytes = 0
        self._unsent_replies = 0
        self.in_flight: dict[int, Attempt] = {}  # named or taken, and not ended
        self.leaving: dict[int, Attempt] = {}  # ended, and the message has not left yet
        self.takes: dict[int, Take] = {}
        self.reader = 0
        self.phase = Phase.GREETING

    # --- Frames ---

    def receive(self, frame: Message, now: float) -> list[Action]:
        """What to do about the client's next frame."""
        if not self._admitted:
            text = "this port is at its limit of connections; try another port or later"
            return [self._close(Status.BUSY, text, answer_channel(frame), now)]
        try:
            decoded = decode_frame(frame)
        except ProtocolError as error:
            return [self._close(Status.BAD_REQUEST, str(error), answer_channel(frame), now)]
        kind, sequence, ring_id, flags, attempt, _, _, _, _, names, ends = decoded
        self._sequence += 1
        if sequence != self._sequence:
            return [self._wrong(decoded, f"frame {sequence} came where {self._sequence} was due", now)]
        if self.phase is not _OPEN:
            return [self._greet(decoded, now)]
        self._since_s = now
        actions: list[Action] = []
        for word in ends:
            ended = self._end(word)
            if ended is None:
                actions.append(self._wrong(decoded, f"an end of attempt {word >> 1}, which is not in flight", now))
                return actions
            actions.append(End(ended))
        if kind != _FETCH:
            actions.append(self._obey(decoded, now))
        elif names:
            if ring_id != self._source.ring_id:
                actions += self._foreign(decoded, now)
            else:
                actions.append(self._serve(decoded, names, attempt if flags else 0, now))
        return actions

    def _serve(
        self, frame: Frame, names: tuple[tuple[int, int, int, int, int], ...], shared: int, now: float
    ) -> Action:
        """Register what a FETCH names; the reply that closes the connection where it may not name it."""
        wrong = self._numbers_wrong(names, shared)
        if wrong is None and shared:
            wrong = _packed_wrong(names)
        if wrong is not None:
            return self._wrong(frame, wrong, now)
        attempts = [Attempt(number, slot, generation, nbytes, now) for slot, _, generation, number, nbytes in names]
        total = sum([name[4] for name in names])
        window = self._limits.window
        self._named += len(attempts)
        self._named_bytes += total
        if self._named > window.attempts or (self._named_bytes > window.nbytes and self._named > 1):
            return self._wrong(frame, "more is named than the window holds", now)
        if len(self.leaving) > window.attempts or self._unsent_replies > MAX_UNSENT_REPLIES:
            return self._wrong(frame, "answers are not read", now)
        for attempt in attempts:
            self.in_flight[attempt.number] = attempt
        return Serve(attempts, shared & MAX_CHANNEL)

    def _end(self, word: int) -> Attempt | None:
        attempt = self.in_flight.pop(word >> 1, None)
        if attempt is None:
            return None
        attempt.delivered = word & 1 == 1
        self._leave_window(attempt)
        if attempt.sent_s is None:
            self.leaving[attempt.number] = attempt
        return attempt

    def _obey(self, frame: Frame, now: float) -> Action:  # noqa: PLR0911 - one a kind
        """What comes on an open connection and is no FETCH."""
        kind, attempt = frame.kind, frame.attempt
        if kind in (Kind.HELLO, Kind.AUTH):
            return self._wrong(frame, f"{_NAMES[kind]} out of turn, while {self.phase.value}", now)
        if attempt <= self._last:
            return self._wrong(frame, f"attempt {attempt} is not new", now)
        if self._unsent_replies > MAX_UNSENT_REPLIES:
            return self._wrong(frame, "answers are not read", now)
        self._last = attempt + (frame.max_payloads if kind == Kind.TAKE else 0)
        is_foreign = frame.ring_id != self._source.ring_id
        if kind == Kind.BYE:
            self._last_word(now)
            return self._ok(attempt)
        if kind == Kind.DESCRIBE:
            return self._describe(attempt, is_foreign=is_foreign)
        if kind == Kind.CONFIRM:
            if is_foreign:
                return self._ok(attempt, bytes([Status.STALE]) * len(frame.names))
            return Settle([(name[0], name[2]) for name in frame.names], attempt)
        if is_foreign:
            return self._error(Status.STALE, "this server stands before another ring", attempt)
        if len(self.takes) >= MAX_TAKES:
            return self._error(Status.BUSY, f"{MAX_TAKES} TAKEs wait on this connection already", attempt)
        take = Take(attempt, frame.max_payloads, frame.word, frame.flags == FLAG_NEWEST, now + frame.wait_ms / 1000)
        self.takes[attempt] = take
        return take

    # --- What the shell reports ---

    def sent(self, attempt: Attempt, now: float) -> bool:
        """The attempt's message has left. True: its end is known, finalise it now."""
        attempt.sent_s = self._moved_s = now
        if attempt.delivered is None:
            return False
        self.leaving.pop(attempt.number, None)
        return True

    def refused(self, attempt: Attempt, status: Status, text: str) -> Reply:
        """The ring would not give this slot: the answer for the client; the attempt is over."""
        self._forget(attempt)
        return self._error(status, text, attempt.number, attempt)

    def refused_part(self, attempt: Attempt, status: Status, text: str) -> bytes:
        """The same as this attempt's part of a shared message."""
        self._forget(attempt)
        return _part(attempt.slot, attempt.generation, attempt.nbytes, status, text)

    def replied(self) -> None:
        """A reply has left."""
        self._unsent_replies -= 1

    def take_room(self, take: Take) -> tuple[int, int]:
        """How many payloads, and how many bytes, may be picked now; what is alone may have all that was asked."""
        window = self._limits.window
        if not self._taken:
            return min(take.max_payloads, window.attempts), take.max_bytes
        return (
            min(take.max_payloads, window.attempts - self._taken),
            max(0, min(take.max_bytes, window.nbytes - self._taken_bytes)),
        )

    def taken(self, take: Take, payloads: Sequence[OfferedPayload], now: float) -> tuple[Reply, list[Attempt]]:
        """These were picked and acquired, at least one: the offer to send, and then the attempts, as in a Serve."""
        del self.takes[take.attempt]
        attempts = [
            Attempt(number, payload.slot, payload.generation, payload.nbytes, now, is_taken=True)
            for number, payload in enumerate(payloads, take.attempt + 1)
        ]
        for attempt in attempts:
            self.in_flight[attempt.number] = attempt
            self._taken += 1
            self._taken_bytes += attempt.nbytes
        return self._ok(take.attempt, encode_offer(payloads)), attempts

    def nothing(self, take: Take, text: str = "", status: Status = Status.EMPTY) -> Reply:
        """There is nothing for a TAKE; `text` says why if time is not the reason."""
        del self.takes[take.attempt]
        return self._error(status, text, take.attempt)

    def settled(self, settle: Settle, statuses: Sequence[Status]) -> Reply:
        """The ring's word for each name: OK, consumed now; STALE, nothing left to confirm; BUSY, it cannot say now."""
        return self._ok(settle.attempt, bytes(statuses))

    def limit(self) -> Limit:
        """When the connection's time is up, as things are."""
        limits = self._limits
        if self.phase is Phase.CLOSING:
            return Limit(self._since_s + LINGER_S, "")
        if self.phase is not _OPEN:
            return Limit(self._since_s + limits.first_frame_timeout_s, "handshake_timeouts")
        due = [
            max(attempt.since_s, self._moved_s) + limits.send_timeout_s
            if attempt.sent_s is None
            else attempt.sent_s + limits.ack_timeout_s
            for several in (self.in_flight, self.leaving)
            for attempt in several.values()
        ]
        if due:
            return Limit(min(due), "delivery_timeouts")
        waiting = max((take.until_s for take in self.takes.values()), default=self._since_s)
        return Limit(max(self._since_s, waiting) + limits.idle_timeout_s, "idle_evictions")

    # --- Handshake ---

    def _greet(self, frame: Frame, now: float) -> Reply:
        kind = frame.kind
        due = _IN_HANDSHAKE.get(self.phase)
        if kind != due:
            name = _NAMES[kind]
            if due is not None and kind != Kind.HELLO:
                channel = _channel_of(frame)
                return self._close(Status.UNAUTHORIZED, f"{name} before the handshake", channel, now)
            return self._wrong(frame, f"{name} out of turn, while {self.phase.value}", now)
        if frame.ends or frame.attempt <= self._last:
            return self._wrong(frame, "ends or an old attempt before the first payload", now)
        self._last = frame.attempt
        return self._hello(frame, now) if kind == Kind.HELLO else self._auth(frame, now)

    def _hello(self, frame: Frame, now: float) -> Reply:
        self.reader = frame.word
        self._client_nonce = frame.secret
        token_required = self._source.token is not None
        if token_required:
            self.phase = Phase.CHALLENGED  # the first-frame limit covers the whole handshake
        else:
            self._open(now)
        welcome = encode_welcome(self._nonce, self._limits.window)
        return self._ok(frame.attempt, welcome, token_required=token_required)

    def _auth(self, frame: Frame, now: float) -> Reply:
        token = self._source.token or b""
        if not macs_equal(frame.secret, token_mac(token, "client", self._client_nonce, self._nonce)):
            text = "wrong token; give client and server the same one"
            return self._close(Status.UNAUTHORIZED, text, frame.attempt & MAX_CHANNEL, now)
        self._open(now)
        return self._ok(frame.attempt, token_mac(token, "server", self._client_nonce, self._nonce))

    def _open(self, now: float) -> None:
        self.phase = _OPEN
        self._since_s = self._moved_s = now

    # --- Inside ---

    def _describe(self, attempt: int, *, is_foreign: bool) -> Reply:
        if is_foreign:
            return self._error(Status.STALE, "this server stands before another ring", attempt)
        if len(self._source.schema_bytes) > MAX_SCHEMA_BYTES:
            return self._error(Status.INTERNAL, "the schema is larger than the wire allows", attempt)
        return self._ok(attempt, self._source.schema_bytes)

    def _foreign(self, frame: Frame, now: float) -> list[Action]:
        """A FETCH for another ring: every name is stale, and the connection stays usable."""
        text = "this server stands before another ring"
        shared = frame.attempt if frame.flags else 0
        wrong = self._numbers_wrong(frame.names, shared) or (_packed_wrong(frame.names) if shared else None)
        if wrong is not None or self._unsent_replies > MAX_UNSENT_REPLIES:
            return [self._wrong(frame, wrong or "answers are not read", now)]
        if shared:
            parts = [
                _part(slot, generation, nbytes, Status.STALE, text) for slot, _, generation, _, nbytes in frame.names
            ]
            self._unsent_replies += 1
            return [Reply(b"".join(parts), shared & MAX_CHANNEL, Status.STALE)]
        return [
            self._error(Status.STALE, text, number, Attempt(number, slot, generation, nbytes, now))
            for slot, _, generation, number, nbytes in frame.names
        ]

    def _numbers_wrong(self, names: tuple[tuple[int, int, int, int, int], ...], shared: int) -> str | None:
        """Attempts grow, also within a frame, so that none is ever there twice."""
        last = max(self._last, shared)
        if shared and shared <= self._last:
            return f"attempt {shared} is not new"
        for name in names:
            number = name[3]
            if number <= last or not number & MAX_CHANNEL:
                return f"attempt {number} is not new, or of no channel"
            last = number
        self._last = last
        return None

    def _leave_window(self, attempt: Attempt) -> None:
        if attempt.is_taken:
            self._taken -= 1
            self._taken_bytes -= attempt.nbytes
        else:
            self._named -= 1
            self._named_bytes -= attempt.nbytes

    def _forget(self, attempt: Attempt) -> None:
        if self.in_flight.pop(attempt.number, None) is not None:
            self._leave_window(attempt)

    def _ok(self, attempt: int, body: bytes = b"", *, token_required: bool = False) -> Reply:
        source = self._source
        header = ReplyHeader(
            status=Status.OK,
            nbytes=len(body),
            ring_id=source.ring_id,
            fingerprint=source.fingerprint,
            token_required=token_required,
        )
        self._unsent_replies += 1
        return Reply(encode_reply(header, body), attempt & MAX_CHANNEL, Status.OK)

    def _error(self, status: Status, text: str, number: int, attempt: Attempt | None = None) -> Reply:
        slot, generation = (attempt.slot, attempt.generation) if attempt else (0, 0)
        self._unsent_replies += 1
        return Reply(encode_error(status, text, slot=slot, generation=generation), number & MAX_CHANNEL, status)

    def _wrong(self, frame: Frame, text: str, now: float) -> Reply:
        return self._close(Status.BAD_REQUEST, text, _channel_of(frame), now)

    def _close(self, status: Status, text: str, channel: int, now: float) -> Reply:
        self._last_word(now)
        self._unsent_replies += 1
        return Reply(encode_error(status, text), channel, status)

    def _last_word(self, now: float) -> None:
        self.phase = Phase.CLOSING
        self._since_s = now


def _channel_of(frame: Frame) -> int:
    """Where the client may be listening for an answer to this frame."""
    if frame.kind == _FETCH and not frame.flags:
        return (frame.names[0][3] & MAX_CHANNEL if frame.names else 0) or 1
    return frame.attempt & MAX_CHANNEL or 1


def _packed_wrong(names: tuple[tuple[int, int, int, int, int], ...]) -> str | None:
    try:
        check_packed(names)
    except ProtocolError as error:
        return str(error)
    return None


def _part(slot: int, generation: int, nbytes: int, status: Status, text: str) -> bytes:
    """A refusal in a shared message: as long as the payload would have been."""
    room = message_bytes(nbytes)
    return encode_error(status, text, slot=slot, generation=generation, room=room).ljust(room, b"\0")
