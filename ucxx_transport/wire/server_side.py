"""The server's half of one connection: frame -> actions, as a table. No I/O, no clock of its own.

```
 phase      frame          ->  phase      actions, in the order in which they are to be done
 GREETING   HELLO              OPEN       Reply(welcome)                    no token configured
 GREETING   HELLO              CHALLENGED Reply(welcome)                    a token is configured
 CHALLENGED AUTH (right)       OPEN       Reply(own mac)
 OPEN       any                OPEN       the Attempt of each end, and then
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

import hmac
from collections.abc import Sequence
from enum import Enum
from typing import TYPE_CHECKING, Final, NamedTuple

from ucxx_transport.errors import AuthenticationError, BusyError, ProtocolError
from ucxx_transport.wire import codec, frames
from ucxx_transport.wire.actions import Action, Attempt, Load, Reply, Serve, Settle, Take
from ucxx_transport.wire.codec import FETCH_HEAD, ONE_END, ONE_NAME, glance
from ucxx_transport.wire.frames import END_MARK, MAX_ATTEMPT, MAX_CHANNEL, MAX_NAMES, Frame, Kind, Status, Window

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
_OPEN, _CLOSING = Phase.OPEN, Phase.CLOSING
_new: Final = tuple.__new__  # a named tuple in one call that is none in Python
_MAX_SLOT: Final = (1 << 32) - 1
_HELLO, _AUTH, _FETCH, _TAKE, _CONFIRM, _, _BYE = map(int, Kind)
_DUE: Final = {Phase.GREETING: _HELLO, Phase.CHALLENGED: _AUTH}
_FOREIGN: Final = "this server stands before another ring"


class SessionSource(NamedTuple):
    """What a session may send its peer about the ring behind it, and what the peer may have in flight."""

    ring_id: bytes
    fingerprint: int
    schema_bytes: bytes
    window: Window = DEFAULT_WINDOW


class ServerSession:
    """See the module. `nonce`: 32 fresh random bytes, the server's half of the token challenge."""

    def __init__(
        self, source: SessionSource, settings: ServerConfig, *, nonce: bytes, now: float, is_admitted: bool = True
    ) -> None:
        self._source, self._window = source, source.window
        self._settings = settings
        self._nonces = b"", nonce  # the client's comes with its HELLO
        self.is_admitted = is_admitted  # False for a connection above the cap: its first frame is answered BUSY
        self._sequence = 0
        self._last = 0  # attempt
        self._since_s = now  # of the phase, or of the last frame
        self.moved_s = now  # when a message last left
        self._named, self._taken = Load(), Load()
        self._unsent = 0
        self.in_flight: dict[int, Attempt] = {}  # named or taken, and not ended, by number
        self.leaving: dict[int, Attempt] = {}  # ended, and their message has not left yet
        self.takes: dict[int, Take] = {}  # that wait for an answer, by attempt
        self.reader = 0  # the client's id, once its HELLO has come
        self.phase = Phase.GREETING

    def receive(self, frame: codec.Message, now: float) -> list[Action]:
        """What to do about the client's next frame, in its FRAME_BYTES; what comes before a fault in it counts."""
        actions: list[Action] = []
        try:
            # What a client says that reads one by one, on a straight path: each call more makes a lone read longer.
            if self.phase is _OPEN:
                head, sequence, ring_id, counts, slot, generation, number, nbytes, mark = glance(frame)
                if head != FETCH_HEAD or sequence != self._sequence + 1:
                    pass
                elif counts == ONE_NAME:
                    named, in_use = self._named, self._named.nbytes + nbytes
                    if (
                        mark == END_MARK ^ sequence
                        and ring_id == self._source.ring_id
                        and self._last < number <= MAX_ATTEMPT
                        and number & MAX_CHANNEL
                        and slot <= _MAX_SLOT
                        and generation
                        and named.attempts < self._window.attempts
                        and in_use <= self._window.nbytes
                        and not (self.leaving or self._unsent)
                    ):
                        self._sequence, self._last, self._since_s = sequence, number, now
                        named.attempts += 1
                        named.nbytes = in_use
                        attempt = self.in_flight[number] = Attempt(number, slot, generation, nbytes, now, named)
                        return [_new(Serve, ([attempt], 0))]
                elif counts == ONE_END and generation == END_MARK ^ sequence and slot >> 1 in self.in_flight:
                    self._sequence, self._since_s = sequence, now
                    return [self._end(slot)]
            if self.phase is not _CLOSING:
                self._obey(frame, now, actions)
        except (AuthenticationError, BusyError, ProtocolError) as error:
            self.phase, self._since_s = _CLOSING, now
            actions.append(self._error(codec.status_of(error), str(error), codec.answer_channel(frame)))
        return actions

    def _obey(self, frame: codec.Message, now: float, actions: list[Action]) -> None:
        if not self.is_admitted:  # whatever it says
            raise BusyError("this port is at its limit of connections; try another port or later")
        decoded = codec.decode_frame(frame)
        self._sequence += 1
        if decoded.sequence != self._sequence:
            raise ProtocolError(f"frame {decoded.sequence} came where {self._sequence} was due")
        if self.phase is not _OPEN:
            actions.append(self._greet(decoded, now))
            return
        self._since_s = now
        for word in decoded.ends:
            if word >> 1 not in self.in_flight:
                raise ProtocolError(f"an end of attempt {word >> 1}, which is not in flight")
            actions.append(self._end(word))
        if len(self.leaving) > MAX_UNSENT or self._unsent > MAX_UNSENT:
            raise ProtocolError("answers are not read")
        if decoded.kind != _FETCH:
            actions.append(self._answer(decoded, now))
        elif decoded.names:
            actions += self._fetch(decoded, now)

    def _end(self, word: int) -> Attempt:
        """The client has ended this attempt, which is in flight."""
        attempt = self.in_flight.pop(word >> 1)
        attempt.delivered = word & 1 == 1
        load = attempt.load
        load.attempts -= 1
        load.nbytes -= attempt.nbytes
        if attempt.sent_s is None:
            self.leaving[attempt.number] = attempt
        return attempt

    def _fetch(self, frame: Frame, now: float) -> Sequence[Action]:
        """Register what a FETCH names; attempts grow, also within a frame, so that none is ever there twice."""
        shared, named, window = frame.attempt if frame.flags else 0, self._named, self._window
        if shared and shared <= self._last:
            raise ProtocolError(f"attempt {shared} is not new")
        last = shared or self._last
        attempts: list[Attempt] = []
        for slot, _, generation, number, nbytes in frame.names:
            if number <= last or not number & MAX_CHANNEL:
                raise ProtocolError(f"attempt {number} is not new, or of no channel")
            last = number
            named.nbytes += nbytes
            attempts.append(Attempt(number, slot, generation, nbytes, now, named))
        self._last = last
        named.attempts += len(attempts)
        if named.attempts > window.attempts or (named.nbytes > window.nbytes and named.attempts > 1):
            raise ProtocolError("more is named than the window holds")
        for attempt in attempts:
            self.in_flight[attempt.number] = attempt
        self._unsent += bool(shared)
        if frame.ring_id == self._source.ring_id:  # else every name is stale, and the connection stays usable
            return [Serve(attempts, shared & MAX_CHANNEL)]
        if not shared:
            return [self.refused(attempt, Status.STALE, _FOREIGN) for attempt in attempts]
        message = b"".join(self.refused_part(attempt, Status.STALE, _FOREIGN) for attempt in attempts)
        return [Reply(message, shared & MAX_CHANNEL, Status.STALE)]

    def _answer(self, frame: Frame, now: float) -> Action:
        """What comes on an open connection and is no FETCH."""
        kind, attempt = frame.kind, frame.attempt
        if kind in _DUE.values():
            raise ProtocolError(f"{Kind(kind).name} out of turn, while {self.phase.value}")
        if attempt <= self._last:
            raise ProtocolError(f"attempt {attempt} is not new")
        self._last = attempt + (frame.max_payloads if kind == _TAKE else 0)
        if kind == _BYE:
            self.phase = _CLOSING
            return self._ok(attempt)
        is_foreign = frame.ring_id != self._source.ring_id
        if kind == _CONFIRM:
            if is_foreign:
                return self._ok(attempt, bytes([Status.STALE]) * len(frame.names))
            return Settle([(name[0], name[2]) for name in frame.names], attempt)
        if is_foreign:
            return self._error(Status.STALE, _FOREIGN, attempt)
        if kind == _TAKE:
            if len(self.takes) >= MAX_TAKES:
                return self._error(Status.BUSY, f"{MAX_TAKES} TAKEs wait on this connection already", attempt)
            newest, until_s = frame.flags == frames.FLAG_NEWEST, now + frame.wait_ms / 1000
            take = self.takes[attempt] = Take(attempt, frame.max_payloads, frame.word, newest, until_s)
            return take
        return self._ok(attempt, self._source.schema_bytes)

    def sent(self, attempt: Attempt, now: float) -> bool:
        """The attempt's message has left. True: its end is known, finalise it now."""
        attempt.sent_s = self.moved_s = now
        if attempt.delivered is None:
            return False
        del self.leaving[attempt.number]
        return True

    def refused(self, attempt: Attempt, status: Status, text: str) -> Reply:
        """The ring would not give this slot: the answer for the client; the attempt is over."""
        self._forget(attempt)
        return self._error(status, text, attempt.number, slot=attempt.slot, generation=attempt.generation)

    def refused_part(self, attempt: Attempt, status: Status, text: str) -> bytes:
        """The same as this attempt's part of a shared message: as long as the payload would have been."""
        self._forget(attempt)
        room = frames.message_bytes(attempt.nbytes)
        refusal = codec.encode_error(status, text, slot=attempt.slot, generation=attempt.generation, room=room)
        return refusal.ljust(room, b"\0")

    def replied(self) -> None:
        """A reply has left, or a shared message: its attempts are `sent`."""
        self._unsent -= 1

    def take_room(self, take: Take) -> tuple[int, int]:
        """How many payloads and bytes may be picked now; where nothing else is taken, all the bytes that were asked."""
        window, taken = self._window, self._taken
        nbytes = min(take.max_bytes, max(0, window.nbytes - taken.nbytes)) if taken.attempts else take.max_bytes
        return min(take.max_payloads, window.attempts - taken.attempts), nbytes

    def taken(self, take: Take, payloads: Sequence[frames.OfferedPayload], now: float) -> tuple[Reply, list[Attempt]]:
        """These were picked and acquired, at least one: the offer to send, and then the attempts, as in a Serve."""
        del self.takes[take.attempt]
        attempts, taken = [], self._taken
        for number, (slot, generation, nbytes, *_) in enumerate(payloads, take.attempt + 1):
            attempt = self.in_flight[number] = Attempt(number, slot, generation, nbytes, now, taken)
            attempts.append(attempt)
            taken.nbytes += nbytes
        taken.attempts += len(attempts)
        return self._ok(take.attempt, codec.encode_offer(payloads)), attempts

    def nothing(self, take: Take, text: str = "", status: Status = Status.EMPTY) -> Reply:
        """There is nothing for a TAKE; `text` says why if time is not the reason."""
        del self.takes[take.attempt]
        return self._error(status, text, take.attempt)

    def settled(self, settle: Settle, statuses: Sequence[Status]) -> Reply:
        """The ring's word for each name: OK, consumed now; STALE, nothing left to confirm; BUSY, it cannot say now."""
        return self._ok(settle.attempt, bytes(statuses))

    def limit(self) -> tuple[float, str]:
        """When the connection's time is up, as things are, and the counter of what it did too slowly ("" for none)."""
        settings = self._settings
        if self.phase is _CLOSING:
            return (self._since_s + LINGER_S, "")
        if self.phase is not _OPEN:
            return (self._since_s + settings.first_frame_timeout_s, "handshake_timeouts")
        due = [
            max(attempt.since_s, self.moved_s) + settings.send_timeout_s
            if attempt.sent_s is None
            else attempt.sent_s + settings.ack_timeout_s
            for several in (self.in_flight, self.leaving)
            for attempt in several.values()
        ]
        if due:
            return (min(due), "delivery_timeouts")
        idle_since_s = max((take.until_s for take in self.takes.values()), default=self._since_s)
        return (max(self._since_s, idle_since_s) + settings.idle_timeout_s, "idle_evictions")

    def _greet(self, frame: Frame, now: float) -> Reply:
        kind, attempt, token = frame.kind, frame.attempt, self._settings.token_bytes
        if kind == _HELLO and self.phase is not Phase.GREETING:
            raise ProtocolError(f"HELLO out of turn, while {self.phase.value}")
        if kind != _DUE[self.phase]:
            raise AuthenticationError(f"{Kind(kind).name} before the handshake")
        if frame.ends or attempt <= self._last:
            raise ProtocolError("ends, or an old attempt, before the first payload")
        self._last = attempt
        if kind == _HELLO:
            self.reader, self._nonces = frame.word, (frame.secret, self._nonces[1])
            body = codec.pack_welcome(self._nonces[1], self._window)
            if token is not None:
                self.phase = Phase.CHALLENGED  # the first-frame limit covers the whole handshake
                return self._ok(attempt, body, token_required=True)
        elif token is None or not hmac.compare_digest(frame.secret, codec.token_mac(token, "client", *self._nonces)):
            raise AuthenticationError("wrong token; give client and server the same one")
        else:
            body = codec.token_mac(token, "server", *self._nonces)
        self.phase = _OPEN
        self._since_s = now
        return self._ok(attempt, body)

    def _forget(self, attempt: Attempt) -> None:
        del self.in_flight[attempt.number]
        self._named.attempts -= 1
        self._named.nbytes -= attempt.nbytes

    def _ok(self, attempt: int, body: bytes = b"", *, token_required: bool = False) -> Reply:
        source = self._source
        header = frames.ReplyHeader(
            Status.OK, len(body), source.ring_id, fingerprint=source.fingerprint, token_required=token_required
        )
        self._unsent += 1
        return Reply(codec.encode_reply(header, body), attempt & MAX_CHANNEL, Status.OK)

    def _error(self, status: Status, text: str, attempt: int, *, slot: int = 0, generation: int = 0) -> Reply:
        self._unsent += 1
        return Reply(codec.encode_error(status, text, slot=slot, generation=generation), attempt & MAX_CHANNEL, status)
