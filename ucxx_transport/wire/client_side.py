"""The client's half of one connection: what to send, what to post, what an answer means. No I/O, no clock.

```
 phase       call               -> phase      what the caller does with it
 GREETING    hello()               GREETING   sends the frame; posts HANDSHAKE_RECEIVE_BYTES on the attempt's channel
 GREETING    on_welcome()          OPEN       no token configured
 GREETING    on_welcome()          CHALLENGED a token is configured: sends the AUTH frame likewise
 CHALLENGED  on_authenticated()    OPEN
 OPEN        fetch(), take() …     OPEN       posts the receives first, then sends the frame
 any         close()               CLOSED     confirms owed() on the next connection to the same ring
```
An attempt lives from `fetch()` (or from the offer that brings it) until `end()`, or until `verify()` raises because the
server refused it. Its end waits in a queue; the next frame of any kind takes all of them along. An end whose frame no
later answer has proved to be handled is *owed*.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from enum import Enum
from typing import Final, NamedTuple, NoReturn, Protocol, TypeAlias

from ucxx_transport.errors import (
    AuthenticationError,
    BusyError,
    NotReadyError,
    PeerLostError,
    ProtocolError,
    StaleSlotError,
    TransportError,
)
from ucxx_transport.wire import frames
from ucxx_transport.wire.codec import (
    Message,
    check_trailer,
    decode_header,
    decode_offer,
    decode_welcome,
    encode_fetch,
    encode_frame,
    error_text,
    is_sealed,
    macs_equal,
    token_mac,
)
from ucxx_transport.wire.frames import HEADER_BYTES, MAX_CHANNEL, Frame, Kind, ReplyHeader, Status, Window

HANDSHAKE_RECEIVE_BYTES: Final = frames.receive_bytes(frames.NONCE_BYTES + 16)
CONFIRM_RECEIVE_BYTES: Final = frames.receive_bytes(frames.MAX_NAMES)
DESCRIBE_RECEIVE_BYTES: Final = frames.receive_bytes(frames.MAX_SCHEMA_BYTES)
BYE_RECEIVE_BYTES: Final = frames.receive_bytes(0)

_OK = Status.OK  # an enum's attribute costs 0.3 µs in Python 3.11

_ERRORS: Final[dict[Status, tuple[type[TransportError], str]]] = {
    Status.STALE: (StaleSlotError, "the slot no longer holds this payload"),
    Status.NOT_READY: (NotReadyError, "the source is not bound to its ring yet"),
    Status.BUSY: (BusyError, "the server is at a limit"),
    Status.BAD_REQUEST: (ProtocolError, "the server refused the request"),
    Status.UNAUTHORIZED: (AuthenticationError, "the server refused this client"),
    Status.INTERNAL: (PeerLostError, "the server failed inside"),
    Status.EMPTY: (ProtocolError, "the server answered EMPTY to what was no TAKE"),
}


class Phase(Enum):
    """Where a connection stands."""

    GREETING = "greeting"
    CHALLENGED = "challenged"
    OPEN = "open"
    CLOSED = "closed"


class Named(Protocol):
    """What names a payload and promises how it looks; a `SlotRef` does."""

    @property
    def ring_id(self) -> bytes: ...
    @property
    def slot(self) -> int: ...
    @property
    def generation(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def checksum(self) -> int | None: ...
    @property
    def fingerprint(self) -> int: ...


class Asked(NamedTuple):
    """A frame to send, and the attempt whose channel brings its answer."""

    frame: bytes
    attempt: int


class Fetch(NamedTuple):
    """A FETCH to send.

    Attributes:
        frame: its bytes.
        attempts: one a name, in order.
        shared: the attempt whose channel brings one message for all names; 0: each comes on its own attempt's channel.
    """

    frame: bytes
    attempts: list[int]
    shared: int


class Offered(NamedTuple):
    """A payload that the server has picked, and the attempt on whose channel it comes."""

    attempt: int
    ring_id: bytes
    slot: int
    generation: int
    nbytes: int
    checksum: int | None
    fingerprint: int
    commit_time_ns: int
    envelope: bytes


class Offer(NamedTuple):
    """The answer to a TAKE; without payloads `reason` may say why."""

    payloads: list[Offered]
    reason: str


# An attempt in flight: its number, the sequence of its frame, what it names (None: an answer that is no payload), the
# attempt of the message it shares (or 0), whether the server picked it. A plain tuple costs a third of a named one.
_Record: TypeAlias = tuple[int, int, Named | None, int, bool]


class _Take(NamedTuple):
    payloads: int
    nbytes: int


class ClientSession:
    """See the module.

    Args:
        reader: this client's random id, 1 to 2**63 - 1; one reader counts once among a payload's `readers`.
        nonce: 32 fresh random bytes, the client's half of the token challenge.
        token: the secret, None when none is configured.
    """

    def __init__(self, *, reader: int, nonce: bytes, token: bytes | None) -> None:
        self._reader = reader
        self._nonce = nonce
        self._token = token
        self._server_nonce = b""
        self._granted = Window(0, 0)
        self._last = 0  # attempt
        self._sequence = 0
        self._awaited: dict[int, _Record] = {}  # by channel: no answer has come yet
        self._arrived: dict[int, _Record] = {}  # by attempt: answered OK, not ended
        self._takes: dict[int, _Take] = {}
        self._confirms: dict[int, Sequence[Named]] = {}
        self._named = 0  # attempts of FETCH that are named and not ended, and their bytes
        self._named_bytes = 0
        self._taken = 0
        self._ends: list[int] = []
        self._delivered: list[Named] = []  # of the ends that wait
        self._unproved: deque[tuple[int, list[Named]]] = deque()  # delivered, by the sequence of the frame that said so
        self.phase = Phase.GREETING
        self.broken = False  # an answer was not as the protocol has it: close the connection
        self.ring_id = bytes(frames.RING_ID_BYTES)
        self.fingerprint = 0

    # --- Handshake ---

    def hello(self) -> Asked:
        """The first frame; its answer is for `on_welcome`."""
        return self._ask(Kind.HELLO, word=self._reader, secret=self._nonce)

    def on_welcome(self, message: Message) -> Asked | None:
        """Judge the answer to HELLO.

        Returns:
            The AUTH frame to send next, or None when the connection is open.

        Raises:
            AuthenticationError: only one of the two sides has a token.
            ProtocolError, BusyError: as the server says, or it is not ours.
        """
        header, body = self._body_of(1, message)
        nonce, window = decode_welcome(body)
        if self._token is None:
            if header.token_required:
                raise AuthenticationError("the server asks for a token; set ClientConfig(token=…) to its secret")
        elif not header.token_required:
            raise AuthenticationError("this client has a token but the server asks for none; set ServerConfig(token=…)")
        self._server_nonce = nonce
        self._granted = window
        self.ring_id, self.fingerprint = header.ring_id, header.fingerprint
        if self._token is None:
            self.phase = Phase.OPEN
            return None
        self.phase = Phase.CHALLENGED
        return self._ask(Kind.AUTH, secret=token_mac(self._token, "client", self._nonce, nonce))

    def on_authenticated(self, message: Message) -> None:
        """Judge the answer to AUTH. An AuthenticationError: the server does not know the token, or refuses ours."""
        _, body = self._body_of(2, message)
        expected = token_mac(self._token or b"", "server", self._nonce, self._server_nonce)
        if not macs_equal(bytes(body), expected):
            raise AuthenticationError("the server does not know the token; it may be an impostor")
        self.phase = Phase.OPEN

    # --- Payloads by name ---

    @property
    def window(self) -> Window:
        """What the server lets this connection have in flight."""
        return self._granted

    @property
    def in_flight(self) -> int:
        """Attempts that have not ended, named and taken."""
        return self._named + self._taken

    def room(self, nbytes: int, names: int = 1) -> bool:
        """Whether so many more names, of so many bytes together, fit the window. A name alone always does."""
        granted = self._granted
        named = self._named
        return named + names <= granted.attempts and (
            self._named_bytes + nbytes <= granted.nbytes or named + names == 1
        )

    def fetch(self, named: Sequence[Named], *, packed: bool = False) -> Fetch:
        """Ask for payloads of one ring, for which there is `room()`.

        Args:
            named: 1 to 64 of them.
            packed: one message brings all; they are at least two, of at most PACK_BYTES with their headers.

        Returns:
            The frame. Before it is sent, a receive is posted for each attempt (`receive_bytes(nbytes)`), or one for the
            shared message, of exactly the sum of `message_bytes(nbytes)`; `clear_ends` goes before each.
        """
        self._sequence = sequence = self._sequence + 1
        awaited = self._awaited
        attempt = self._last
        shared = 0
        if packed:
            shared = attempt = self._number()
            awaited[shared & MAX_CHANNEL] = (shared, sequence, None, 0, False)
        attempts: list[int] = []
        words: list[int] = []
        total = 0
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
            total += nbytes
        self._last = attempt
        self._named += len(attempts)
        self._named_bytes += total
        ends = self._ends
        if ends:
            self._pass_ends(sequence)
        frame = encode_fetch(sequence, named[0].ring_id, 1 if packed else 0, shared, words, ends)
        return Fetch(frame, attempts, shared)

    def verify(self, attempt: int, message: Message) -> None:
        """Check that `message` carries exactly the payload of the attempt, whole: it is `message[64 : 64 + nbytes]`.

        Of a shared message, the part of this attempt. Afterwards the attempt is to be ended.

        Raises:
            StaleSlotError, BusyError, NotReadyError, PeerLostError, AuthenticationError: as the server says; the
                attempt is over and must not be ended.
            ProtocolError: likewise, or another name, another length, a missing trailer, or not our protocol: then the
                connection is to be closed (`broken` says so).
        """
        channel = attempt & MAX_CHANNEL
        record = self._awaited[channel]
        _, sequence, named, shared, _ = record
        assert named is not None
        if not is_sealed(
            message, named.ring_id, named.slot, named.generation, named.nbytes, named.checksum, named.fingerprint
        ):
            self._explain(record, message)
        del self._awaited[channel]
        if shared:
            self._free_shared(shared)
        self._arrived[attempt] = record
        unproved = self._unproved
        while unproved and unproved[0][0] <= sequence:
            unproved.popleft()

    def end(self, attempt: int, *, delivered: bool) -> None:
        """End an attempt that has arrived: consumed if `delivered`, otherwise the payload is READY again."""
        _, _, named, _, is_taken = self._arrived.pop(attempt)
        assert named is not None
        if is_taken:
            self._taken -= 1
        else:
            self._named -= 1
            self._named_bytes -= named.nbytes
        self._ends.append(attempt << 1 | delivered)
        if delivered:
            self._delivered.append(named)

    @property
    def ends_waiting(self) -> bool:
        """Whether ends wait for a frame."""
        return bool(self._ends)

    def ends_frame(self) -> bytes:
        """A frame that brings the ends that wait, and nothing else. It has no answer."""
        self._sequence = sequence = self._sequence + 1
        ends = self._ends
        self._pass_ends(sequence)
        return encode_fetch(sequence, self.ring_id, 0, 0, (), ends)

    # --- Payloads without names ---

    def take(self, max_payloads: int, max_bytes: int, *, newest: bool = False, wait_ms: int = 0) -> Asked:
        """Ask for what is there; post `offer_receive_bytes(max_payloads)` for the answer, which is for `on_offer`."""
        attempt = self._number(max_payloads)
        asked = self._ask(
            Kind.TAKE, attempt, flags=int(newest), ring_id=self.ring_id, word=max_bytes, max_payloads=max_payloads,
            wait_ms=wait_ms,
        )  # fmt: skip
        sequence = self._sequence
        for number in range(attempt + 1, attempt + 1 + max_payloads):
            self._awaited[number & MAX_CHANNEL] = (number, sequence, None, 0, False)
        self._last = attempt + max_payloads
        self._takes[attempt] = _Take(max_payloads, max_bytes)
        return asked

    def on_offer(self, attempt: int, message: Message) -> Offer:
        """What the server has picked; a receive is to be posted for each, which `verify` judges.

        Raises:
            BusyError, NotReadyError, …: as the server says. ProtocolError: an offer that was not asked for.
        """
        asked = self._takes.pop(attempt)
        sequence = self._awaited[attempt & MAX_CHANNEL][1]
        numbers = range(attempt + 1, attempt + 1 + asked.payloads)
        for number in numbers:
            del self._awaited[number & MAX_CHANNEL]
        header = decode_header(message)
        if header.status is Status.EMPTY:
            self._answered(attempt)
            return Offer([], error_text(message, header))
        header, body = self._body_of(attempt, message)
        picked = decode_offer(body)
        if len(picked) > asked.payloads or sum(payload.nbytes for payload in picked) > asked.nbytes:
            raise self._misled("an offer is more than was asked for", count=len(picked))
        if self._taken + len(picked) > self._granted.attempts:
            raise self._misled("an offer leaves the window", count=len(picked))
        payloads = []
        for number, payload in zip(numbers, picked, strict=False):
            slot, generation, nbytes, checksum, commit_time_ns, envelope = payload
            offered = Offered(
                number, header.ring_id, slot, generation, nbytes, checksum, header.fingerprint, commit_time_ns, envelope
            )
            self._awaited[number & MAX_CHANNEL] = (number, sequence, offered, 0, True)
            payloads.append(offered)
        self._taken += len(payloads)
        return Offer(payloads, "")

    # --- Everything else ---

    def confirm(self, named: Sequence[Named]) -> Asked:
        """Say again that payloads of one ring were delivered, or discard them unread; 1 to 64. See `confirmed`."""
        asked = self._ask(
            Kind.CONFIRM,
            ring_id=named[0].ring_id,
            names=tuple((name.slot, 0, name.generation, 0, 0) for name in named),
        )
        self._confirms[asked.attempt] = named
        return asked

    def confirmed(self, attempt: int, message: Message) -> list[Status]:
        """One status a name: OK, it was there and is consumed now; STALE, it was not; BUSY, confirm it again later."""
        _, body = self._body_of(attempt, message)
        if len(body) != len(self._confirms[attempt]) or not set(body) <= _CONFIRMED.keys():
            raise self._misled("the answer to a CONFIRM has other statuses than it may", nbytes=len(body))
        del self._confirms[attempt]
        return [_CONFIRMED[code] for code in body]

    def describe(self, ring_id: bytes) -> Asked:
        """Ask for a ring's schema; post DESCRIBE_RECEIVE_BYTES. See `described`."""
        return self._ask(Kind.DESCRIBE, ring_id=ring_id)

    def described(self, attempt: int, message: Message) -> bytes:
        """The schema's msgpack. A StaleSlotError: the server stands before another ring."""
        _, body = self._body_of(attempt, message)
        if len(body) > frames.MAX_SCHEMA_BYTES:
            raise self._misled("a schema is larger than the wire allows", nbytes=len(body))
        return bytes(body)

    def bye(self) -> Asked:
        """The last frame of a connection. See `farewell`."""
        return self._ask(Kind.BYE)

    def farewell(self, attempt: int, message: Message) -> None:
        """Judge the answer to BYE: the server has handled everything that this side sent."""
        self._body_of(attempt, message)

    def close(self) -> None:
        """The connection is lost or closed: nothing in flight will be answered any more."""
        self.phase = Phase.CLOSED

    def owed(self) -> list[Named]:
        """Payloads that were delivered, of which no answer has proved that the server knows, and unanswered CONFIRMs.

        To be confirmed on the next connection to their ring.
        """
        unproved = [named for _, several in self._unproved for named in several]
        return unproved + self._delivered + [named for several in self._confirms.values() for named in several]

    # --- Inside ---

    def _number(self, following: int = 0) -> int:
        """The next attempt whose channel is free, and likewise those of so many that follow it."""
        awaited = self._awaited
        attempt = self._last + 1
        free = 0
        while free <= following:
            channel = (attempt + free) & MAX_CHANNEL
            if channel and channel not in awaited:
                free += 1
            else:
                attempt, free = attempt + free + 1, 0
        self._last = attempt
        return attempt

    def _ask(
        self,
        kind: Kind,
        attempt: int = 0,
        *,
        ring_id: bytes = bytes(frames.RING_ID_BYTES),
        flags: int = 0,
        word: int = 0,
        max_payloads: int = 0,
        wait_ms: int = 0,
        secret: bytes = bytes(frames.NONCE_BYTES),
        names: tuple[tuple[int, int, int, int, int], ...] = (),
    ) -> Asked:
        """Any frame but a FETCH."""
        attempt = attempt or self._number()
        self._sequence = sequence = self._sequence + 1
        self._awaited[attempt & MAX_CHANNEL] = (attempt, sequence, None, 0, False)
        ends = self._ends
        self._pass_ends(sequence)
        return Asked(
            encode_frame(
                Frame(kind, sequence, ring_id, flags, attempt, word, max_payloads, wait_ms, secret, names, tuple(ends))
            ),
            attempt,
        )

    def _pass_ends(self, sequence: int) -> None:
        """The ends that wait go with this frame."""
        self._ends = []
        if self._delivered:
            self._unproved.append((sequence, self._delivered))
            self._delivered = []

    def _answered(self, attempt: int) -> None:
        """An answer has come: what its frame and those before it said has been heard."""
        sequence = self._awaited.pop(attempt & MAX_CHANNEL)[1]
        while self._unproved and self._unproved[0][0] <= sequence:
            self._unproved.popleft()

    def _free_shared(self, shared: int) -> None:
        """The shared message has come; the first of its attempts that is judged frees its channel."""
        record = self._awaited.get(shared & MAX_CHANNEL)
        if record is not None and record[0] == shared:
            del self._awaited[shared & MAX_CHANNEL]

    def _body_of(self, attempt: int, message: Message) -> tuple[ReplyHeader, memoryview]:
        """Header and body of an answer that is no payload."""
        self.broken = True
        header = decode_header(message)
        if header.status is _OK:
            check_trailer(message, header)
        self.broken = False
        self._answered(attempt)
        if header.status is not _OK:
            _raise_status(header, message)
        return header, memoryview(message)[HEADER_BYTES : HEADER_BYTES + header.nbytes]

    def _misled(self, text: str, **facts: object) -> ProtocolError:
        """The error of an answer that no server of ours gives."""
        self.broken = True
        return ProtocolError(text, **facts)

    def _explain(self, record: _Record, message: Message) -> None:
        """Why `message` is not sealed as promised; returns when only its checksum is not the reference's."""
        self.broken = True
        header = decode_header(message)
        attempt, _, named, shared, is_taken = record
        assert named is not None
        if header.status is not _OK:
            self.broken = False
            self._answered(attempt)
            if shared:
                self._free_shared(shared)
            if is_taken:
                self._taken -= 1
            else:
                self._named -= 1
                self._named_bytes -= named.nbytes
            _raise_status(header, message)
        check_trailer(message, header)
        if (header.ring_id, header.slot, header.generation) != (named.ring_id, named.slot, named.generation):
            raise ProtocolError(
                "the server sent another payload than was asked for",
                asked=f"{named.slot}/{named.generation}",
                got=f"{header.slot}/{header.generation}",
            )
        if header.nbytes != named.nbytes or header.fingerprint != named.fingerprint:
            raise ProtocolError(
                "the payload is not what its reference promised",
                promised_bytes=named.nbytes,
                nbytes=header.nbytes,
                promised_fingerprint=named.fingerprint,
                fingerprint=header.fingerprint,
            )
        self.broken = False


_CONFIRMED: Final = {int(status): status for status in (Status.OK, Status.STALE, Status.BUSY)}


def _raise_status(header: ReplyHeader, message: Message) -> NoReturn:
    cls, words = _ERRORS[header.status]
    detail = error_text(message, header)
    facts = {"slot": header.slot, "generation": header.generation} if header.generation else {}
    raise cls(f"{words}: {detail}" if detail else words, status=header.status.name, **facts)
