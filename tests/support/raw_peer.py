"""A peer without manners: it sends the frames that it is given, byte by byte, over any link."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from ucxx_transport import SlotRef, TransportError
from ucxx_transport.link.base import EndpointEvents, Operation
from ucxx_transport.link.endpoint import Endpoint
from ucxx_transport.link.reactor import Reactor
from ucxx_transport.link.ucx import UCXXLink
from ucxx_transport.wire.codec import decode_header, encode_frame
from ucxx_transport.wire.frames import (
    FLAG_PACKED,
    HEADER_BYTES,
    Frame,
    Kind,
    ReplyHeader,
    Status,
    message_bytes,
    receive_bytes,
)

__all__ = ["NONCE", "READER", "Answer", "RawPeer", "raw_peer"]

ROOM_BYTES = receive_bytes(64 << 10)
NONCE = bytes(range(32))
READER = 5
MINUTE = 60.0


@dataclass(slots=True)
class Answer:
    """What is received on one channel.

    Attributes:
        channel: which one.
        buffer: as it arrived.
        operation: its receive; None before it is posted.
    """

    channel: int
    buffer: bytearray
    operation: Operation | None = None

    @property
    def has_come(self) -> bool:
        """Whether a message has arrived."""
        return self.operation is not None and self.operation.completed and self.operation.error is None

    @property
    def header(self) -> ReplyHeader:
        """Of the message."""
        assert self.has_come
        return decode_header(self.buffer)

    @property
    def status(self) -> Status:
        """Of the message."""
        return self.header.status

    @property
    def body(self) -> bytes:
        """What follows the header: the body, or the text of an error."""
        return bytes(self.buffer[HEADER_BYTES : HEADER_BYTES + self.header.nbytes])


@dataclass(eq=False)
class RawPeer:
    """One connection to a port, and the events of its endpoint.

    Attributes:
        run_until: runs the links until a condition holds, or nothing moves any more.
        ring_id: of the ring behind the port.
        endpoint: as the link gave it.
        error: why the connection is lost.
        sequence: of the frame sent last.
        attempt: of the number used last.
    """

    run_until: Callable[[Callable[[], bool]], None]
    ring_id: bytes = bytes(16)
    endpoint: Endpoint = field(init=False)
    error: TransportError | None = None
    sequence: int = 0
    attempt: int = 0

    def lost(self, error: TransportError) -> None:
        """Keep why."""
        self.error = error

    def is_closed(self) -> bool:
        """Whether the port has broken the connection."""
        self.run_until(lambda: not self.endpoint.alive)
        return not self.endpoint.alive

    def frame(self, kind: Kind, **words: Any) -> bytes:
        """The next frame."""
        self.sequence += 1
        return encode_frame(Frame(kind, self.sequence, **words))

    def say(self, message: bytes) -> Operation:
        """Send, and let nothing happen yet."""
        return self.endpoint.post_send(message)

    def expect(self, channel: int, nbytes: int = ROOM_BYTES) -> Answer:
        """Post a receive."""
        answer = Answer(channel & 0xFFFF, bytearray(nbytes))
        answer.operation = self.endpoint.post_receive(answer.buffer, lambda _: None, channel=answer.channel)
        return answer

    def ask(self, kind: Kind, **words: Any) -> Answer:
        """Send a frame of any kind but FETCH; returns when the answer is here."""
        self.attempt += 1
        answer = self.expect(self.attempt)
        self.say(self.frame(kind, attempt=self.attempt, **words))
        self.wait_for(answer)
        return answer

    def greet(self, reader: int = READER) -> Answer:
        """Shake hands without a token."""
        return self.ask(Kind.HELLO, word=reader, secret=NONCE)

    def names(self, refs: Sequence[SlotRef]) -> tuple[tuple[int, int, int, int, int], ...]:
        """These payloads, each with an attempt of its own."""
        names = []
        for ref in refs:
            self.attempt += 1
            names.append((ref.slot, 0, ref.generation, self.attempt, ref.nbytes))
        return tuple(names)

    def fetch(self, *refs: SlotRef, ends: Sequence[tuple[int, bool]] = (), **changed: Any) -> list[Answer]:
        """Ask for payloads, each in a message of its own; returns when the answers are here."""
        answers = self.begin_fetch(*refs, ends=ends, **changed)
        self.wait_for(*answers)
        return answers

    def begin_fetch(self, *refs: SlotRef, ends: Sequence[tuple[int, bool]] = (), **changed: Any) -> list[Answer]:
        """The same; nothing has happened yet."""
        names = self.names(refs)
        if changed:
            order = ("slot", "zero", "generation", "attempt", "nbytes")
            names = tuple(tuple({**dict(zip(order, name, strict=True)), **changed}.values()) for name in names)
        answers = [self.expect(name[3], receive_bytes(max(name[4] & 0xFFFFFFF, 64 << 10))) for name in names]
        self.say(self.frame(Kind.FETCH, ring_id=self.ring_id, names=names, ends=self.ends(ends)))
        return answers

    def fetch_packed(self, *refs: SlotRef) -> tuple[bytes, list[int]]:
        """Ask for payloads in one message; returns it and their attempts."""
        self.attempt += 1
        shared, names = self.attempt, self.names(refs)
        answer = self.expect(shared, sum(message_bytes(ref.nbytes) for ref in refs))
        self.say(self.frame(Kind.FETCH, ring_id=self.ring_id, flags=FLAG_PACKED, attempt=shared, names=names))
        self.wait_for(answer)
        assert answer.has_come
        return bytes(answer.buffer), [name[3] for name in names]

    def end(self, *attempts: int, delivered: bool = True) -> None:
        """End attempts, in a frame without names."""
        send = self.say(self.frame(Kind.FETCH, ends=self.ends([(attempt, delivered) for attempt in attempts])))
        self.run_until(lambda: send.completed)

    @staticmethod
    def ends(ends: Sequence[tuple[int, bool]]) -> tuple[int, ...]:
        """As the frame has them."""
        return tuple(attempt << 1 | delivered for attempt, delivered in ends)

    def reset(self) -> None:
        """Be gone, as when the process dies."""
        closed: list[bool] = []
        self.endpoint.close(closed.append)
        self.run_until(lambda: bool(closed))

    def wait_for(self, *answers: Answer) -> None:
        """Run until they are here, or the connection is lost."""
        self.run_until(lambda: self.error is not None or all(answer.has_come for answer in answers))


@contextmanager
def raw_peer(port: int, ring_id: bytes = bytes(16)) -> Iterator[RawPeer]:
    """A connection over UCX to a port of this host, which says nothing yet."""
    reactor = Reactor(UCXXLink)

    def run_until(condition: Callable[[], bool]) -> None:
        until_s = monotonic() + MINUTE
        while not condition():
            assert monotonic() < until_s, "it never comes to that"
            reactor.run_once(until_s)

    try:
        peer = RawPeer(run_until, ring_id)
        events: EndpointEvents = peer
        peer.endpoint = reactor.link.connect("127.0.0.1", port, events)
        yield peer
    finally:
        reactor.close()
