"""The client's half of one connection: what to send, what to post, what an answer means. No I/O, no clock.

```
 phase       call               -> phase      what the caller does
 GREETING    hello()               GREETING   sends the frame; posts a receive on the attempt's channel
 GREETING    on_welcome()          OPEN       no token configured
 GREETING    on_welcome()          CHALLENGED a token is configured: sends the AUTH frame likewise
 CHALLENGED  on_authenticated()    OPEN
 OPEN        fetch(), take() …     OPEN       sends the frame and posts the receives, within one turn
 any         close()               CLOSED     confirms owed() on the next connection to the same ring
```
An attempt lives from `fetch()` (or from the offer that brings it) until `end()`, or until `verify()` raises because the
server refused it. Its end waits in a queue; the next frame of any kind takes all of them along. A delivery is *owed* as
long as no later answer has proved that the server handled the frame with its end.
"""

from __future__ import annotations

import hmac
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from ucxx_transport.errors import AuthenticationError, ProtocolError
from ucxx_transport.wire import codec, frames
from ucxx_transport.wire.codec import Message, Seal, encode_frame, pack_one_end, pack_one_name, seal_of
from ucxx_transport.wire.frames import END_MARK, HEADER_BYTES, MAX_CHANNEL, Frame, Kind, OfferedPayload, Status, Window

if TYPE_CHECKING:
    from ucxx_transport.schema import SlotRef

_CONFIRMED: Final = {int(status): status for status in (Status.OK, Status.STALE, Status.BUSY)}


class Asked(NamedTuple):
    """A frame to send, the attempt whose channel brings its answer, and the room that this needs."""

    frame: bytes
    attempt: int
    receive_bytes: int


class Offer(NamedTuple):
    """The answer to a TAKE, by attempt and sequence: what the server has picked; where that is nothing, maybe why."""

    attempt: int
    sequence: int
    ring_id: bytes
    fingerprint: int
    payloads: list[OfferedPayload]
    reason: str = ""


class Attempt:
    """One payload under way to this client. The shell's own attempts extend it: there is one object for each."""

    number = 0  # the session's, while it is under way
    sequence = 0  # of the frame that named it
    shared = 0  # the attempt of the message that it shares, if it does
    is_taken = False  # the server picked it
    has_arrived = False  # it was answered OK, and is to be ended
    seal: Seal | None = None  # what its answer has to look like, where there was time to work it out

    def __init__(self, ref: SlotRef) -> None:
        self.ref = ref


class ClientSession:
    """See the module.

    `reader` is this client's random id, 1 to 2**63 - 1: it counts once among a payload's `readers`. `nonce` is 32 fresh
    random bytes, the client's half of the challenge by the `token` (None: none is configured).
    """

    def __init__(self, *, reader: int, nonce: bytes, token: bytes | None) -> None:
        self._reader, self._nonce, self._token = reader, nonce, token
        self._proof = b""  # that the server knows the token
        self._last = 0  # attempt
        self._sequence = 0
        self._awaited: dict[int, Attempt | int] = {}  # by channel; where it is no payload, the frame's sequence
        self._takes: dict[int, tuple[int, int]] = {}  # by attempt: payloads and bytes at most
        self._confirms: dict[int, Sequence[SlotRef]] = {}
        self.named = 0  # of the window in use: attempts by name, their bytes, attempts by TAKE
        self.named_bytes = 0
        self._taken = 0
        self.ends: list[int] = []  # that wait for a frame
        self._delivered: list[SlotRef] = []  # of the ends that wait
        self._unproved: deque[tuple[int, list[SlotRef]]] = deque()  # by the sequence of the frame that brought the ends
        self.is_open = False  # the handshake is over
        self.broken = False  # an answer was not as the protocol has it: close the connection
        self.window = Window(0, 0)  # what the server lets this connection have in flight
        self.ring_id = bytes(frames.RING_ID_BYTES)  # of the ring behind it, as is the fingerprint
        self.fingerprint = 0

    def hello(self) -> Asked:
        """The first frame; its answer is for `on_welcome`."""
        return self._ask(Frame(Kind.HELLO, word=self._reader, secret=self._nonce))

    def on_welcome(self, message: Message) -> Asked | None:
        """Judge the answer to HELLO; the AUTH frame to send next, or None when the connection is open.

        An AuthenticationError: only one of the two sides has a token. A ProtocolError, BusyError: as the server says.
        """
        header, body = self._body_of(1, message)
        server_nonce, self.window = codec.unpack_welcome(body)
        self.ring_id, self.fingerprint = header.ring_id, header.fingerprint
        token = self._token
        if token is None:
            if header.token_required:
                raise AuthenticationError("the server asks for a token; set ClientConfig(token=…) to its secret")
            self.is_open = True
            return None
        if not header.token_required:
            raise AuthenticationError("this client has a token but the server asks for none; set ServerConfig(token=…)")
        self._proof = codec.token_mac(token, "server", self._nonce, server_nonce)
        return self._ask(Frame(Kind.AUTH, secret=codec.token_mac(token, "client", self._nonce, server_nonce)))

    def on_authenticated(self, message: Message) -> None:
        """Judge the answer to AUTH. An AuthenticationError: the server does not know the token, or refuses ours."""
        if not hmac.compare_digest(self._body_of(2, message)[1], self._proof):
            raise AuthenticationError("the server does not know the token; it may be an impostor")
        self.is_open = True

    def fetch(self, attempts: Sequence[Attempt], *, packed: bool = False) -> bytes:
        """Ask for 1 to 64 payloads of one ring, for which the window has room; each attempt gets its `number`.

        In the turn that sends the frame a receive is posted for each (`receive_bytes(nbytes)`). If they are `packed`,
        at least two of at most PACK_BYTES, one message brings all, on the channel of their `shared`: its receive has
        exactly the sum of `message_bytes(nbytes)`. `clear_trailer` goes before each.
        """
        self._sequence = sequence = self._sequence + 1
        awaited = self._awaited
        number, shared, nbytes = self._last, 0, 0
        if packed:
            shared = number = self._number()
            awaited[shared & MAX_CHANNEL] = sequence
        names: list[tuple[int, int, int, int, int]] = []
        for attempt in attempts:
            number += 1
            channel = number & MAX_CHANNEL
            while not channel or channel in awaited:
                number += 1
                channel = number & MAX_CHANNEL
            awaited[channel] = attempt
            attempt.number, attempt.sequence, attempt.shared = number, sequence, shared
            attempt.is_taken = False
            ref = attempt.ref
            nbytes += ref.nbytes
            names.append((ref.slot, 0, ref.generation, number, ref.nbytes))
        self._last = number
        self.named += len(attempts)
        self.named_bytes += nbytes
        ends = self.ends and self._pass_ends(sequence)
        frame = Frame(Kind.FETCH, sequence, attempts[0].ref.ring_id, int(packed), shared, names=names, ends=ends)
        return encode_frame(frame)

    def fetch_one(self, attempt: Attempt) -> bytes:
        """`fetch` of one that never was under way, in fewer steps: a read of a few KiB takes no longer than they do."""
        awaited = self._awaited
        number = self._last + 1
        channel = number & MAX_CHANNEL
        if self.ends or not channel or channel in awaited:
            return self.fetch((attempt,))
        self._sequence = attempt.sequence = sequence = self._sequence + 1
        self._last = attempt.number = number
        awaited[channel] = attempt
        ref = attempt.ref
        nbytes = ref.nbytes
        self.named += 1
        self.named_bytes += nbytes
        return pack_one_name(sequence, ref.ring_id, 1, 0, ref.slot, ref.generation, number, nbytes, END_MARK ^ sequence)

    def verify(self, attempt: Attempt, message: Message) -> None:
        """Check that `message` carries exactly the payload of the attempt, whole: it is `message[64 : 64 + nbytes]`.

        Of a shared message, the part of this attempt. Afterwards the attempt is to be ended, unless this raises what
        the server answers instead (a StaleSlotError, BusyError, NotReadyError …): the attempt is over then. A
        ProtocolError with the session `broken`: another name, another length, a missing trailer, or not our protocol.
        """
        channel = attempt.number & MAX_CHANNEL
        awaited = self._awaited
        if awaited[channel] is not attempt:
            raise KeyError(attempt.number)
        refusal = None
        header, trailer, end, whole = attempt.seal or seal_of(attempt.ref)
        if message[:HEADER_BYTES] != header or message[end:whole] != trailer:
            self.broken = True
            refusal = codec.refusal_in(attempt.ref, message)
            self.broken = False
        del awaited[channel]
        if attempt.shared:
            awaited.pop(attempt.shared & MAX_CHANNEL, None)  # it has come, and all its parts are judged together
        unproved = self._unproved
        while unproved and unproved[0][0] <= attempt.sequence:
            unproved.popleft()
        attempt.has_arrived = True
        if refusal is not None:
            self.end(attempt, delivered=False)
            self.ends.pop()  # the server has forgotten it
            raise refusal

    def end(self, attempt: Attempt, *, delivered: bool) -> None:
        """End an attempt that has arrived: consumed if `delivered`, otherwise the payload is READY again."""
        if not attempt.has_arrived:
            raise KeyError(attempt.number)  # it has had its end, or cannot have one
        attempt.has_arrived = False
        if attempt.is_taken:
            self._taken -= 1
        else:
            self.named -= 1
            self.named_bytes -= attempt.ref.nbytes
        self.ends.append(attempt.number << 1 | delivered)
        if delivered:
            self._delivered.append(attempt.ref)

    def conclude(self, attempt: Attempt, *, delivered: bool) -> bytes:
        """`verify` and `end` of one that shares no message and has come whole, and a frame with its end alone."""
        del self._awaited[attempt.number & MAX_CHANNEL]
        ref, unproved = attempt.ref, self._unproved
        while unproved and unproved[0][0] <= attempt.sequence:
            unproved.popleft()
        if attempt.is_taken:
            self._taken -= 1
        else:
            self.named -= 1
            self.named_bytes -= ref.nbytes
        self._sequence = sequence = self._sequence + 1
        if delivered:
            unproved.append((sequence, [ref]))
        return pack_one_end(sequence, self.ring_id, 0, 1, attempt.number << 1 | delivered, END_MARK ^ sequence)

    def ends_frame(self) -> bytes:
        """A frame that brings the ends that wait, and nothing else. It has no answer."""
        self._sequence = sequence = self._sequence + 1
        ends, self.ends = self.ends, []
        if self._delivered:  # as `_pass_ends`
            self._unproved.append((sequence, self._delivered))
            self._delivered = []
        if len(ends) == 1:
            return pack_one_end(sequence, self.ring_id, 0, 1, ends[0], END_MARK ^ sequence)
        return encode_frame(Frame(Kind.FETCH, sequence, self.ring_id, ends=ends))

    def take(self, max_payloads: int, max_bytes: int, *, newest: bool = False, wait_ms: int = 0) -> Asked:
        """Ask for what is there. See `on_offer`."""
        attempt = self._number(max_payloads)
        frame = Frame(Kind.TAKE, 0, self.ring_id, int(newest), attempt, max_bytes, max_payloads, wait_ms)
        asked = self._ask(frame, 8 + max_payloads * (frames.OFFERED_BYTES + frames.MAX_ENVELOPE_BYTES))
        for number in range(attempt + 1, attempt + 1 + max_payloads):
            self._awaited[number & MAX_CHANNEL] = self._sequence
        self._last = attempt + max_payloads
        self._takes[attempt] = (max_payloads, max_bytes)
        return asked

    def on_offer(self, attempt: int, message: Message) -> Offer:
        """What the server has picked, to `receive` at once; or the error that it answers, or a ProtocolError."""
        sequence, header, body = self._answer(attempt, message)
        max_payloads, max_bytes = self._takes.pop(attempt)
        for number in range(attempt + 1, attempt + 1 + max_payloads):
            del self._awaited[number & MAX_CHANNEL]
        if header.status is Status.EMPTY:
            return Offer(attempt, sequence, header.ring_id, 0, [], codec.error_text(message, header))
        if header.status is not Status.OK:
            raise codec.error_of(header, message)
        self.broken = True
        picked = codec.decode_offer(body)
        if (
            len(picked) > min(max_payloads, self.window.attempts - self._taken)
            or sum([payload.nbytes for payload in picked]) > max_bytes
            or len({(payload.slot, payload.generation) for payload in picked}) != len(picked)
        ):
            raise ProtocolError("an offer is more than was asked for", payloads=len(picked))
        self.broken = False
        return Offer(attempt, sequence, header.ring_id, header.fingerprint, picked)

    def receive(self, offer: Offer, attempts: Sequence[Attempt]) -> None:
        """These attempts, none under way, are for what the server has picked, in order; post a receive for each."""
        for number, attempt in enumerate(attempts, offer.attempt + 1):
            attempt.number, attempt.sequence = number, offer.sequence
            attempt.shared, attempt.is_taken = 0, True
            self._awaited[number & MAX_CHANNEL] = attempt
        self._taken += len(attempts)

    def confirm(self, refs: Sequence[SlotRef]) -> Asked:
        """Say again that payloads of one ring were delivered, or discard them unread; 1 to 64. See `confirmed`."""
        names = [(ref.slot, 0, ref.generation, 0, 0) for ref in refs]
        asked = self._ask(Frame(Kind.CONFIRM, ring_id=refs[0].ring_id, names=names), frames.MAX_NAMES)
        self._confirms[asked.attempt] = refs
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
        """Ask for a ring's schema. See `answered`."""
        return self._ask(Frame(Kind.DESCRIBE, ring_id=ring_id), frames.MAX_SCHEMA_BYTES)

    def bye(self) -> Asked:
        """The last frame of a connection. See `answered`."""
        return self._ask(Frame(Kind.BYE))

    def answered(self, attempt: int, message: Message) -> bytes:
        """The schema's msgpack, or a StaleSlotError: another ring's; nothing after BYE: what was sent is handled."""
        return self._body_of(attempt, message)[1]

    def close(self) -> None:
        """The connection is lost or closed: nothing in flight will be answered any more."""
        self._awaited.clear()

    def owed(self) -> list[SlotRef]:
        """Deliveries of which no answer has proved that the server knows, and what unanswered CONFIRMs name."""
        owed = [ref for _, several in self._unproved for ref in several]
        return owed + self._delivered + [ref for several in self._confirms.values() for ref in several]

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

    def _ask(self, frame: Frame, nbytes: int = 0) -> Asked:
        """Any frame but a FETCH, answered by so many bytes; sequence, ends and, if need be, attempt are filled in."""
        attempt = frame.attempt or self._number()
        self._sequence = sequence = self._sequence + 1
        self._awaited[attempt & MAX_CHANNEL] = sequence
        frame = frame._replace(sequence=sequence, attempt=attempt, ends=self._pass_ends(sequence))
        return Asked(encode_frame(frame), attempt, frames.receive_bytes(nbytes))

    def _pass_ends(self, sequence: int) -> list[int]:
        """The ends that wait; they go with this frame."""
        ends, self.ends = self.ends, []
        if self._delivered:
            self._unproved.append((sequence, self._delivered))
            self._delivered = []
        return ends

    def _answer(self, attempt: int, message: Message) -> tuple[int, frames.ReplyHeader, bytes]:
        """Of an answer that is no payload: what it answers is the sequence of, header and body."""
        self.broken = True
        header, body = codec.decode_header(message), b""
        if header.status is Status.OK:
            codec.check_trailer(message, header)
            body = bytes(message[HEADER_BYTES : HEADER_BYTES + header.nbytes])
        self.broken = False
        sequence = self._awaited.pop(attempt & MAX_CHANNEL)
        assert isinstance(sequence, int)
        while self._unproved and self._unproved[0][0] <= sequence:
            self._unproved.popleft()  # that frame and those before it have been handled
        return sequence, header, body

    def _body_of(self, attempt: int, message: Message) -> tuple[frames.ReplyHeader, bytes]:
        """The same where only OK will do."""
        _, header, body = self._answer(attempt, message)
        if header.status is not Status.OK:
            raise codec.error_of(header, message)
        return header, body
