"""The client's half of one connection: what to send, what to post, what an answer means. No I/O, no clock.

```
 phase       call               -> phase      what the caller does
 GREETING    hello()               GREETING   sends the frame; posts HANDSHAKE_RECEIVE_BYTES on the attempt's channel
 GREETING    on_welcome()          OPEN       no token configured
 GREETING    on_welcome()          CHALLENGED a token is configured: sends the AUTH frame likewise
 CHALLENGED  on_authenticated()    OPEN
 OPEN        fetch(), take() …     OPEN       sends the frame and posts the receives, within one turn
 any         close()               CLOSED     confirms owed() on the next connection to the same ring
```
An attempt lives from `fetch()` (or from the offer that brings it) until `end()`, or until `verify()` raises because the
server refused it. Its end waits in a queue; the next frame of any kind takes all of them along. A delivery is *owed* as
long as no later answer has proved that the server handled the frame that said so.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from enum import Enum
from typing import Final, TypeAlias

from ucxx_transport.errors import ProtocolError
from ucxx_transport.wire import codec, frames
from ucxx_transport.wire.actions import Asked, Fetch, Offer, Offered
from ucxx_transport.wire.codec import Message, Named, Seal, encode_fetch, pack_one_end, pack_one_name, seal_of
from ucxx_transport.wire.frames import (
    END_MARK,
    HEADER_BYTES,
    MAX_CHANNEL,
    MAX_SCHEMA_BYTES,
    Frame,
    Kind,
    ReplyHeader,
    Status,
    Window,
)
from ucxx_transport.wire.handshake import WELCOME_BYTES, ClientHandshake

HANDSHAKE_RECEIVE_BYTES: Final = frames.receive_bytes(WELCOME_BYTES)
CONFIRM_RECEIVE_BYTES: Final = frames.receive_bytes(frames.MAX_NAMES)
DESCRIBE_RECEIVE_BYTES: Final = frames.receive_bytes(MAX_SCHEMA_BYTES)
BYE_RECEIVE_BYTES: Final = frames.receive_bytes(0)

_CONFIRMED: Final = {int(status): status for status in (Status.OK, Status.STALE, Status.BUSY)}

# An attempt in flight: its number, the sequence of its frame, what it names (None: no payload), the attempt of the
# message that it shares (or 0), whether the server picked it. A plain tuple costs a third of a named one.
_Record: TypeAlias = tuple[int, int, Named | None, int, bool]


class Phase(Enum):
    """Where a connection stands."""

    GREETING = "greeting"
    CHALLENGED = "challenged"
    OPEN = "open"
    CLOSED = "closed"


class ClientSession:
    """See the module.

    Args:
        reader: this client's random id, 1 to 2**63 - 1; one reader counts once among a payload's `readers`.
        nonce: 32 fresh random bytes, the client's half of the token challenge.
        token: the secret, None when none is configured.

    Attributes:
        broken: an answer was not as the protocol has it: close the connection.
        window: what the server lets this connection have in flight.
        ends: those that wait for a frame.
        ring_id, fingerprint: of the ring behind it, once it is open.
    """

    def __init__(self, *, reader: int, nonce: bytes, token: bytes | None) -> None:
        self._reader = reader
        self._handshake = ClientHandshake(nonce=nonce, token=token)
        self._last = 0  # attempt
        self._sequence = 0
        self._awaited: dict[int, _Record] = {}  # by channel: no answer has come yet
        self._arrived: dict[int, _Record] = {}  # by attempt: answered OK, not ended
        self._takes: dict[int, tuple[int, int]] = {}  # by attempt: payloads and bytes at most
        self._confirms: dict[int, Sequence[Named]] = {}
        self._named = 0  # attempts of FETCH that are named and not ended, and their bytes
        self._named_bytes = 0
        self._taken = 0
        self.ends: list[int] = []
        self._delivered: list[Named] = []  # of the ends that wait
        self._unproved: deque[tuple[int, list[Named]]] = deque()  # by the sequence of the frame that brought the ends
        self.broken = False
        self.window = Window(0, 0)
        self.ring_id = bytes(frames.RING_ID_BYTES)
        self.fingerprint = 0
        self.phase = Phase.GREETING

    # --- Handshake ---

    def hello(self) -> Asked:
        """The first frame; its answer is for `on_welcome`."""
        return self._ask(Frame(Kind.HELLO, word=self._reader, secret=self._handshake.nonce))

    def on_welcome(self, message: Message) -> Asked | None:
        """Judge the answer to HELLO.

        Returns:
            The AUTH frame to send next, or None when the connection is open.

        Raises:
            AuthenticationError: only one of the two sides has a token.
            ProtocolError, BusyError: as the server says, or it is not ours.
        """
        header, body = self._body_of(1, message)
        self.window, mac = self._handshake.welcome(header, body)
        self.ring_id, self.fingerprint = header.ring_id, header.fingerprint
        self.phase = Phase.OPEN if mac is None else Phase.CHALLENGED
        return None if mac is None else self._ask(Frame(Kind.AUTH, secret=mac))

    def on_authenticated(self, message: Message) -> None:
        """Judge the answer to AUTH. An AuthenticationError: the server does not know the token, or refuses ours."""
        self._handshake.authenticated(self._body_of(2, message)[1])
        self.phase = Phase.OPEN

    # --- Payloads by name ---

    @property
    def in_flight(self) -> int:
        """Attempts that have not ended, named and taken."""
        return self._named + self._taken

    def room(self, nbytes: int, names: int = 1) -> bool:
        """Whether so many more names, of so many bytes together, fit the window. A name alone always does."""
        attempts, limit = self.window
        named = self._named + names
        return named <= attempts and (self._named_bytes + nbytes <= limit or named == 1)

    def fetch(self, named: Sequence[Named], *, packed: bool = False) -> Fetch:
        """Ask for payloads of one ring, for which there is `room()`.

        Args:
            named: 1 to 64 of them.
            packed: one message brings all; they are at least two, of at most PACK_BYTES with their headers.

        Returns:
            The frame. In the turn that sends it a receive is posted for each attempt (`receive_bytes(nbytes)`), or one
            for the shared message, of exactly the sum of `message_bytes(nbytes)`; `clear_ends` goes before each.
        """
        self._sequence = sequence = self._sequence + 1
        awaited = self._awaited
        attempt, shared = self._last, 0
        if packed:
            shared = attempt = self._number()
            awaited[shared & MAX_CHANNEL] = (shared, sequence, None, 0, False)
        attempts: list[int] = []
        words: list[int] = []
        for name in named:
            attempt += 1
            channel = attempt & MAX_CHANNEL
            while not channel or channel in awaited:
                attempt += 1
                channel = attempt & MAX_CHANNEL
            nbytes = name.nbytes
            awaited[channel] = (attempt, sequence, name, shared, False)
            attempts.append(attempt)
            words += (name.slot, 0, name.generation, attempt, nbytes)
            self._named_bytes += nbytes
        self._last = attempt
        self._named += len(attempts)
        ends = self.ends and self._pass_ends(sequence)
        frame = encode_fetch(sequence, named[0].ring_id, 1 if packed else 0, shared, words, ends)
        return Fetch(frame, attempts, shared)

    def fetch_one(self, named: Named) -> Asked:
        """`fetch` of one payload, in fewer steps: a lone read of a few KiB takes no longer than they do."""
        awaited = self._awaited
        attempt = self._last + 1
        channel = attempt & MAX_CHANNEL
        if self.ends or not channel or channel in awaited:
            frame, attempts, _ = self.fetch((named,))
            return Asked(frame, attempts[0])
        self._sequence = sequence = self._sequence + 1
        nbytes = named.nbytes
        awaited[channel] = (attempt, sequence, named, 0, False)
        self._last = attempt
        self._named += 1
        self._named_bytes += nbytes
        name = named.slot, named.generation, attempt, nbytes
        return Asked(pack_one_name(sequence, named.ring_id, 1, 0, *name, END_MARK ^ sequence), attempt)

    def verify(self, attempt: int, message: Message, seal: Seal | None = None) -> None:
        """Check that `message` carries exactly the payload of the attempt, whole: it is `message[64 : 64 + nbytes]`.

        Of a shared message, the part of this attempt. Afterwards the attempt is to be ended.
        `seal` as `seal_of` gave it.

        Raises:
            StaleSlotError, BusyError, NotReadyError, PeerLostError, AuthenticationError: as the server says; the
                attempt is over and must not be ended.
            ProtocolError: likewise; or another name, another length, a missing trailer, not our protocol, and then
                the session is `broken`.
        """
        channel = attempt & MAX_CHANNEL
        record = self._awaited[channel]
        _, sequence, named, shared, _ = record
        assert named is not None
        refusal = None
        header, trailer, end, whole = seal or seal_of(named)
        if message[:HEADER_BYTES] != header or message[end:whole] != trailer:
            self.broken = True
            refusal = codec.refusal_in(named, message)
            self.broken = False
        del self._awaited[channel]
        if shared:
            self._awaited.pop(shared & MAX_CHANNEL, None)  # it has come, and all its parts are judged together
        unproved = self._unproved
        while unproved and unproved[0][0] <= sequence:
            unproved.popleft()
        self._arrived[attempt] = record
        if refusal is not None:
            self.end(attempt, delivered=False)
            self.ends.pop()  # the server has forgotten it
            raise refusal

    def end(self, attempt: int, *, delivered: bool) -> None:
        """End an attempt that has arrived: consumed if `delivered`, otherwise the payload is READY again."""
        _, _, named, _, is_taken = self._arrived.pop(attempt)
        assert named is not None
        if is_taken:
            self._taken -= 1
        else:
            self._named -= 1
            self._named_bytes -= named.nbytes
        self.ends.append(attempt << 1 | delivered)
        if delivered:
            self._delivered.append(named)

    def ends_frame(self) -> bytes:
        """A frame that brings the ends that wait, and nothing else. It has no answer."""
        self._sequence = sequence = self._sequence + 1
        ends, self.ends = self.ends, []
        if self._delivered:  # as `_pass_ends`
            self._unproved.append((sequence, self._delivered))
            self._delivered = []
        if len(ends) == 1:
            return pack_one_end(sequence, self.ring_id, 0, 1, ends[0], END_MARK ^ sequence)
        return encode_fetch(sequence, self.ring_id, 0, 0, (), ends)

    # --- Payloads without names ---

    def take(self, max_payloads: int, max_bytes: int, *, newest: bool = False, wait_ms: int = 0) -> Asked:
        """Ask for what is there; post `offer_receive_bytes(max_payloads)` for the answer, which is for `on_offer`."""
        attempt = self._number(max_payloads)
        words = Frame(Kind.TAKE, 0, self.ring_id, int(newest), attempt, max_bytes, max_payloads, wait_ms)
        asked = self._ask(words)
        for number in range(attempt + 1, attempt + 1 + max_payloads):
            self._awaited[number & MAX_CHANNEL] = (number, self._sequence, None, 0, True)
        self._last = attempt + max_payloads
        self._takes[attempt] = (max_payloads, max_bytes)
        return asked

    def on_offer(self, attempt: int, message: Message) -> Offer:
        """What the server has picked; a receive is to be posted for each, which `verify` judges.

        Raises:
            BusyError, NotReadyError, …: as the server says. ProtocolError: an offer that was not asked for.
        """
        sequence = self._awaited[attempt & MAX_CHANNEL][1]
        header, body = self._answer(attempt, message)
        max_payloads, max_bytes = self._takes.pop(attempt)
        numbers = range(attempt + 1, attempt + 1 + max_payloads)
        for number in numbers:
            del self._awaited[number & MAX_CHANNEL]
        if header.status is Status.EMPTY:
            return Offer([], codec.error_text(message, header))
        if header.status is not Status.OK:
            raise codec.error_of(header, message)
        self.broken = True
        picked = codec.decode_offer(body)
        if (
            len(picked) > min(max_payloads, self.window.attempts - self._taken)
            or sum(payload.nbytes for payload in picked) > max_bytes
            or len({(payload.slot, payload.generation) for payload in picked}) != len(picked)
        ):
            raise ProtocolError("an offer is more than was asked for", payloads=len(picked))
        self.broken = False
        payloads = []
        for number, (slot, generation, nbytes, checksum, time_ns, envelope) in zip(numbers, picked, strict=False):
            offered = Offered(
                number, header.ring_id, slot, generation, nbytes, checksum, header.fingerprint, time_ns, envelope
            )
            self._awaited[number & MAX_CHANNEL] = (number, sequence, offered, 0, True)
            payloads.append(offered)
        self._taken += len(payloads)
        return Offer(payloads, "")

    # --- Everything else ---

    def confirm(self, named: Sequence[Named]) -> Asked:
        """Say again that payloads of one ring were delivered, or discard them unread; 1 to 64. See `confirmed`."""
        names = tuple((name.slot, 0, name.generation, 0, 0) for name in named)
        asked = self._ask(Frame(Kind.CONFIRM, ring_id=named[0].ring_id, names=names))
        self._confirms[asked.attempt] = named
        return asked

    def confirmed(self, attempt: int, message: Message) -> list[Status]:
        """One status a name: OK, it was there and is consumed now; STALE, it was not; BUSY, confirm it again later."""
        body = self._body_of(attempt, message)[1]
        if len(body) != len(self._confirms[attempt]) or not set(body) <= _CONFIRMED.keys():
            self.broken = True
            raise ProtocolError("the answer to a CONFIRM has other statuses than it may", nbytes=len(body))
        del self._confirms[attempt]
        return [_CONFIRMED[code] for code in body]

    def describe(self, ring_id: bytes) -> Asked:
        """Ask for a ring's schema; post DESCRIBE_RECEIVE_BYTES. See `described`."""
        return self._ask(Frame(Kind.DESCRIBE, ring_id=ring_id))

    def described(self, attempt: int, message: Message) -> bytes:
        """The schema's msgpack. A StaleSlotError: the server stands before another ring."""
        body = self._body_of(attempt, message)[1]
        if len(body) > MAX_SCHEMA_BYTES:
            self.broken = True
            raise ProtocolError("a schema is larger than the wire allows", nbytes=len(body), limit=MAX_SCHEMA_BYTES)
        return body

    def bye(self) -> Asked:
        """The last frame of a connection. See `farewell`."""
        return self._ask(Frame(Kind.BYE))

    def farewell(self, attempt: int, message: Message) -> None:
        """Judge the answer to BYE: the server has handled everything that this side sent."""
        self._body_of(attempt, message)

    def close(self) -> None:
        """The connection is lost or closed: nothing in flight will be answered any more."""
        self.phase = Phase.CLOSED

    def owed(self) -> list[Named]:
        """Deliveries of which no answer has proved that the server knows, and what unanswered CONFIRMs name."""
        owed = [named for _, several in self._unproved for named in several]
        return owed + self._delivered + [named for several in self._confirms.values() for named in several]

    # --- Inside ---

    def _number(self, following: int = 0) -> int:
        """The next attempt whose channel is free, as are those of so many that follow it."""
        attempt, free = self._last + 1, 0
        while free <= following:
            channel = (attempt + free) & MAX_CHANNEL
            if channel and channel not in self._awaited:
                free += 1
            else:
                attempt, free = attempt + free + 1, 0
        self._last = attempt
        return attempt

    def _ask(self, frame: Frame) -> Asked:
        """Any frame but a FETCH; its sequence, its ends and, where it has none, its attempt are filled in."""
        attempt = frame.attempt or self._number()
        self._sequence = sequence = self._sequence + 1
        self._awaited[attempt & MAX_CHANNEL] = (attempt, sequence, None, 0, False)
        ends = tuple(self._pass_ends(sequence))
        return Asked(codec.encode_frame(frame._replace(sequence=sequence, attempt=attempt, ends=ends)), attempt)

    def _pass_ends(self, sequence: int) -> list[int]:
        """The ends that wait; they go with this frame."""
        ends, self.ends = self.ends, []
        if self._delivered:
            self._unproved.append((sequence, self._delivered))
            self._delivered = []
        return ends

    def _answer(self, attempt: int, message: Message) -> tuple[ReplyHeader, bytes]:
        """Header and body of an answer that is no payload; what its frame and those before it said has been heard."""
        self.broken = True
        header, body = codec.body_of(message)
        self.broken = False
        sequence = self._awaited.pop(attempt & MAX_CHANNEL)[1]
        while self._unproved and self._unproved[0][0] <= sequence:
            self._unproved.popleft()
        return header, body

    def _body_of(self, attempt: int, message: Message) -> tuple[ReplyHeader, bytes]:
        """The same where only OK will do."""
        header, body = self._answer(attempt, message)
        if header.status is not Status.OK:
            raise codec.error_of(header, message)
        return header, body
