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
 CLOSING    any                CLOSING    none
 any        anything else      CLOSING    Reply(BAD_REQUEST | UNAUTHORIZED | BUSY), the last one
```
The shell around a session closes the connection once `limit()` has passed. A session that has sent its last reply
lingers for a moment, so that the client reads it before the connection breaks.
An attempt is over when two things are known, in any order: how it ended, and that its message has left; the shell
finalises its lease then, once. What has not left is bounded: who reads nothing loses the connection before it piles up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Final, NamedTuple

from ucxx_transport.errors import ProtocolError
from ucxx_transport.wire.actions import Action, Attempt, End, Reply, Serve, Settle, Take
from ucxx_transport.wire.codec import Message, answer_channel, decode_frame, encode_error, encode_offer, encode_reply
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
from ucxx_transport.wire.handshake import ServerHandshake

if TYPE_CHECKING:
    from ucxx_transport.config import ServerConfig

# How long the last reply may take to be read before the connection breaks.
LINGER_S: Final = 1.0
MAX_UNSENT: Final = 2 * MAX_NAMES  # replies, shared messages and ended attempts, each, that have not left yet
MAX_TAKES: Final = 8  # that wait on one connection
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
_DUE: Final = {Phase.GREETING: Kind.HELLO, Phase.CHALLENGED: Kind.AUTH}
_FULL: Final = "this port is at its limit of connections; try another port or later"
_FOREIGN: Final = "this server stands before another ring"


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionSource:
    """What a session may send its peer about the ring behind it."""

    ring_id: bytes
    fingerprint: int
    schema_bytes: bytes


class Limit(NamedTuple):
    """When a connection is to be closed, and the counter of what it did too slowly ("" for none)."""

    when_s: float
    counter: str


class ServerSession:
    """See the module.

    Args:
        source: identity and schema of the ring.
        settings: time limits by phase, and the token.
        nonce: 32 fresh random bytes, the server's half of the token challenge.
        now: the shell's clock, seconds.
        admitted: False for a connection above the cap: its first frame is answered BUSY.
        window: what may be in flight.

    Attributes:
        in_flight: attempts that are named or taken and have not ended, by number.
        leaving: those that have ended, and whose message has not left yet.
        moved_s: when a message last left.
        takes: those that wait for an answer, by attempt.
        reader: the client's id, 0 before HELLO.
    """

    def __init__(
        self,
        source: SessionSource,
        settings: ServerConfig,
        *,
        nonce: bytes,
        now: float,
        admitted: bool = True,
        window: Window = DEFAULT_WINDOW,
    ) -> None:
        self._source = source
        self._settings = settings
        self._window = window
        self._handshake = ServerHandshake(nonce=nonce, token=settings.token_bytes)
        self._admitted = admitted
        self._sequence = 0
        self._last = 0  # attempt
        self._since_s = now  # of the phase, or of the last frame
        self.moved_s = now
        self._named = self._named_bytes = 0
        self._taken = self._taken_bytes = 0
        self._unsent_replies = self._unsent_shared = 0
        self.in_flight: dict[int, Attempt] = {}
        self.leaving: dict[int, Attempt] = {}
        self.takes: dict[int, Take] = {}
        self.reader = 0
        self.phase = Phase.GREETING

    # --- Frames ---

    def receive(self, frame: Message, now: float) -> list[Action]:  # noqa: C901 - a call more costs on this path
        """What to do about the client's next frame; never longer than what is posted for one."""
        try:
            decoded = decode_frame(frame)
        except ProtocolError as error:
            return self._turn_away(str(error), answer_channel(frame), now)
        self._sequence += 1
        if self.phase is not _OPEN or decoded[1] != self._sequence:
            return self._out_of_line(decoded, now)
        self._since_s = now
        actions: list[Action] = []
        wrong = ""
        in_flight = self.in_flight
        for word in decoded.ends:
            attempt = in_flight.pop(word >> 1, None)
            if attempt is None:
                wrong = f"an end of attempt {word >> 1}, which is not in flight"
                break
            attempt.delivered = word & 1 == 1
            if attempt.is_taken:
                self._taken -= 1
                self._taken_bytes -= attempt.nbytes
            else:
                self._named -= 1
                self._named_bytes -= attempt.nbytes
            if attempt.sent_s is None:
                self.leaving[attempt.number] = attempt
            actions.append(End(attempt))
        if len(self.leaving) > MAX_UNSENT or self._unsent_replies > MAX_UNSENT or self._unsent_shared > MAX_UNSENT:
            wrong = wrong or "answers are not read"
        if wrong:
            actions.append(self._wrong(decoded, wrong, now))
        elif decoded[0] != _FETCH:
            actions.append(self._obey(decoded, now))
        elif decoded.names:
            actions += self._fetch(decoded, now)
        return actions

    def _fetch(self, frame: Frame, now: float) -> Sequence[Action]:
        """Register what a FETCH names; attempts grow, also within a frame, so that none is ever there twice."""
        shared = frame.attempt if frame.flags else 0
        if shared and shared <= self._last:
            return [self._wrong(frame, f"attempt {shared} is not new", now)]
        last = shared or self._last
        attempts: list[Attempt] = []
        for slot, _, generation, number, nbytes in frame.names:
            if number <= last or not number & MAX_CHANNEL:
                return [self._wrong(frame, f"attempt {number} is not new, or of no channel", now)]
            last = number
            self._named_bytes += nbytes
            attempts.append(Attempt(number, slot, generation, nbytes, now))
        self._last = last
        self._named += len(attempts)
        window = self._window
        if self._named > window.attempts or (self._named_bytes > window.nbytes and self._named > 1):
            return [self._wrong(frame, "more is named than the window holds", now)]
        for attempt in attempts:
            self.in_flight[attempt.number] = attempt
        if frame.ring_id != self._source.ring_id:
            return self._refuse_foreign(attempts, shared)
        if shared:
            self._unsent_shared += 1
        return [Serve(attempts, shared & MAX_CHANNEL)]

    def _obey(self, frame: Frame, now: float) -> Action:  # noqa: PLR0911 - one a kind, and one a fault
        """What comes on an open connection and is no FETCH."""
        kind, attempt = Kind(frame.kind), frame.attempt
        if kind in (Kind.HELLO, Kind.AUTH):
            return self._wrong(frame, f"{kind.name} out of turn, while {self.phase.value}", now)
        if attempt <= self._last:
            return self._wrong(frame, f"attempt {attempt} is not new", now)
        self._last = attempt + (frame.max_payloads if kind is Kind.TAKE else 0)
        if kind is Kind.BYE:
            self.phase = Phase.CLOSING
            return self._ok(attempt)
        is_foreign = frame.ring_id != self._source.ring_id
        if kind is Kind.CONFIRM:
            if is_foreign:
                return self._ok(attempt, bytes([Status.STALE]) * len(frame.names))
            return Settle([(name[0], name[2]) for name in frame.names], attempt)
        if is_foreign:
            return self._error(Status.STALE, _FOREIGN, attempt)
        if kind is Kind.TAKE:
            return self._take(frame, now)
        schema = self._source.schema_bytes
        if len(schema) > MAX_SCHEMA_BYTES:
            return self._error(Status.INTERNAL, "the schema is larger than the wire allows", attempt)
        return self._ok(attempt, schema)

    def _take(self, frame: Frame, now: float) -> Action:
        if len(self.takes) >= MAX_TAKES:
            return self._error(Status.BUSY, f"{MAX_TAKES} TAKEs wait on this connection already", frame.attempt)
        newest, until_s = frame.flags == FLAG_NEWEST, now + frame.wait_ms / 1000
        take = self.takes[frame.attempt] = Take(frame.attempt, frame.max_payloads, frame.word, newest, until_s)
        return take

    # --- What the shell reports ---

    def sent(self, attempt: Attempt, now: float) -> bool:
        """The attempt's message has left. True: its end is known, finalise it now."""
        attempt.sent_s = self.moved_s = now
        if attempt.delivered is None:
            return False
        del self.leaving[attempt.number]
        return True

    def sent_shared(self, attempts: Sequence[Attempt], now: float) -> list[Attempt]:
        """A shared message has left, with what was acquired for it; returns those to finalise now."""
        self._unsent_shared -= 1
        self.moved_s = now
        return [attempt for attempt in attempts if self.sent(attempt, now)]

    def refused(self, attempt: Attempt, status: Status, text: str) -> Reply:
        """The ring would not give this slot: the answer for the client; the attempt is over."""
        self._forget(attempt)
        return self._error(status, text, attempt.number, slot=attempt.slot, generation=attempt.generation)

    def refused_part(self, attempt: Attempt, status: Status, text: str) -> bytes:
        """The same as this attempt's part of a shared message: as long as the payload would have been."""
        self._forget(attempt)
        room = message_bytes(attempt.nbytes)
        refusal = encode_error(status, text, slot=attempt.slot, generation=attempt.generation, room=room)
        return refusal.ljust(room, b"\0")

    def replied(self) -> None:
        """A reply has left."""
        self._unsent_replies -= 1

    def take_room(self, take: Take) -> tuple[int, int]:
        """How many payloads and bytes may be picked now; where nothing else is taken, all the bytes that were asked."""
        window = self._window
        nbytes = min(take.max_bytes, max(0, window.nbytes - self._taken_bytes)) if self._taken else take.max_bytes
        return min(take.max_payloads, window.attempts - self._taken), nbytes

    def taken(self, take: Take, payloads: Sequence[OfferedPayload], now: float) -> tuple[Reply, list[Attempt]]:
        """These were picked and acquired, at least one: the offer to send, and then the attempts, as in a Serve."""
        del self.takes[take.attempt]
        attempts = [
            Attempt(number, payload.slot, payload.generation, payload.nbytes, now)
            for number, payload in enumerate(payloads, take.attempt + 1)
        ]
        for attempt in attempts:
            attempt.is_taken = True
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
        settings = self._settings
        if self.phase is Phase.CLOSING:
            return Limit(self._since_s + LINGER_S, "")
        if self.phase is not _OPEN:
            return Limit(self._since_s + settings.first_frame_timeout_s, "handshake_timeouts")
        due = [
            max(attempt.since_s, self.moved_s) + settings.send_timeout_s
            if attempt.sent_s is None
            else attempt.sent_s + settings.ack_timeout_s
            for several in (self.in_flight, self.leaving)
            for attempt in several.values()
        ]
        if due:
            return Limit(min(due), "delivery_timeouts")
        idle_since_s = max((take.until_s for take in self.takes.values()), default=self._since_s)
        return Limit(max(self._since_s, idle_since_s) + settings.idle_timeout_s, "idle_evictions")

    # --- Handshake ---

    def _out_of_line(self, frame: Frame, now: float) -> list[Action]:
        """A frame of the handshake, or one that comes where another is due."""
        if frame.sequence != self._sequence:
            text = f"frame {frame.sequence} came where {self._sequence} was due"
            return self._turn_away(text, _channel_of(frame), now)
        if self.phase is Phase.CLOSING or not self._admitted:
            return self._turn_away("", _channel_of(frame), now)
        return [self._greet(frame, now)]

    def _turn_away(self, text: str, channel: int, now: float) -> list[Action]:
        """The last reply, unless it has been given; a connection above the cap is BUSY, whatever it says."""
        if self.phase is Phase.CLOSING:
            return []
        if not self._admitted:
            return [self._close(Status.BUSY, _FULL, channel, now)]
        return [self._close(Status.BAD_REQUEST, text, channel, now)]

    def _greet(self, frame: Frame, now: float) -> Reply:
        kind, attempt = Kind(frame.kind), frame.attempt
        if kind is Kind.HELLO and self.phase is not Phase.GREETING:
            return self._wrong(frame, f"HELLO out of turn, while {self.phase.value}", now)
        if kind is not _DUE[self.phase]:
            return self._close(Status.UNAUTHORIZED, f"{kind.name} before the handshake", _channel_of(frame), now)
        if frame.ends or attempt <= self._last:
            return self._wrong(frame, "ends, or an old attempt, before the first payload", now)
        self._last = attempt
        if kind is Kind.HELLO:
            self.reader = frame.word
            body = self._handshake.welcome(frame.secret, self._window)
            if self._handshake.token_required:
                self.phase = Phase.CHALLENGED  # the first-frame limit covers the whole handshake
                return self._ok(attempt, body, token_required=True)
        else:
            body = self._handshake.prove(frame.secret)
            if not body:
                text = "wrong token; give client and server the same one"
                return self._close(Status.UNAUTHORIZED, text, attempt & MAX_CHANNEL, now)
        self.phase = _OPEN
        self._since_s = now
        return self._ok(attempt, body)

    # --- Inside ---

    def _refuse_foreign(self, attempts: list[Attempt], shared: int) -> Sequence[Action]:
        """Every name of another ring is stale, and the connection stays usable."""
        if not shared:
            return [self.refused(attempt, Status.STALE, _FOREIGN) for attempt in attempts]
        self._unsent_replies += 1
        message = b"".join(self.refused_part(attempt, Status.STALE, _FOREIGN) for attempt in attempts)
        return [Reply(message, shared & MAX_CHANNEL, Status.STALE)]

    def _forget(self, attempt: Attempt) -> None:
        del self.in_flight[attempt.number]
        self._named -= 1
        self._named_bytes -= attempt.nbytes

    def _ok(self, attempt: int, body: bytes = b"", *, token_required: bool = False) -> Reply:
        source = self._source
        header = ReplyHeader(
            Status.OK, len(body), source.ring_id, fingerprint=source.fingerprint, token_required=token_required
        )
        self._unsent_replies += 1
        return Reply(encode_reply(header, body), attempt & MAX_CHANNEL, Status.OK)

    def _error(self, status: Status, text: str, attempt: int, *, slot: int = 0, generation: int = 0) -> Reply:
        self._unsent_replies += 1
        return Reply(encode_error(status, text, slot=slot, generation=generation), attempt & MAX_CHANNEL, status)

    def _wrong(self, frame: Frame, text: str, now: float) -> Reply:
        return self._close(Status.BAD_REQUEST, text, _channel_of(frame), now)

    def _close(self, status: Status, text: str, channel: int, now: float) -> Reply:
        self.phase = Phase.CLOSING
        self._since_s = now
        return self._error(status, text, channel)


def _channel_of(frame: Frame) -> int:
    """Where the client may be listening for an answer to this frame."""
    if frame.kind == _FETCH and not frame.flags:
        return (frame.names[0][3] & MAX_CHANNEL if frame.names else 0) or 1
    return frame.attempt & MAX_CHANNEL or 1
