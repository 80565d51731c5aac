"""A ring and a port before it, over the in-memory link; the test runs both sides, turn by turn, under its own clock.

`RawPeer` sends exactly what a test wants, byte by byte, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ucxx_transport.config import RingConfig, ServerConfig
from ucxx_transport.errors import TransportError
from ucxx_transport.link.base import Endpoint, Operation
from ucxx_transport.link.reactor import Reactor
from ucxx_transport.ring import SharedRingBuffer, SlotState
from ucxx_transport.schema import SlotRef
from ucxx_transport.server.counters import Binding, PortCounters, PortStatistics
from ucxx_transport.server.port import Port
from ucxx_transport.testing import Faults, MemoryLink, MemoryNetwork
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
from ucxx_transport.wire.server_side import SessionSource

HOST = "10.0.0.1"
PORT = 5001
ROOM_BYTES = receive_bytes(64 << 10)
NONCE = bytes(range(32))
READER = 5
TURNS = 10_000


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


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
        endpoint: as the link gave it.
        sequence: of the frame sent last.
        attempt: of the number used last.
    """

    rig: PortRig
    endpoint: Endpoint = field(init=False)
    error: TransportError | None = None
    sequence: int = 0
    attempt: int = 0

    def connected(self) -> None:
        """Nothing to do."""

    def lost(self, error: TransportError) -> None:
        """Keep why."""
        self.error = error

    def is_closed(self) -> bool:
        """Whether the port has broken the connection."""
        self.rig.settle()
        return not self.endpoint.alive

    def frame(self, kind: Kind, **words: Any) -> bytes:
        """The next frame."""
        self.sequence += 1
        return encode_frame(Frame(kind, self.sequence, **words))

    def say(self, message: bytes) -> None:
        """Send, and let nothing happen yet."""
        self.endpoint.post_send(message)

    def expect(self, channel: int, nbytes: int = ROOM_BYTES) -> Answer:
        """Post a receive."""
        answer = Answer(channel & 0xFFFF, bytearray(nbytes))
        answer.operation = self.endpoint.post_receive(answer.buffer, lambda _: None, channel=answer.channel)
        return answer

    def ask(self, kind: Kind, **words: Any) -> Answer:
        """Send a frame of any kind but FETCH; returns when nothing moves any more."""
        self.attempt += 1
        answer = self.expect(self.attempt)
        self.say(self.frame(kind, attempt=self.attempt, **words))
        self.rig.settle()
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
        """Ask for payloads, each in a message of its own; returns when nothing moves any more."""
        answers = self.begin_fetch(*refs, ends=ends, **changed)
        self.rig.settle()
        return answers

    def begin_fetch(self, *refs: SlotRef, ends: Sequence[tuple[int, bool]] = (), **changed: Any) -> list[Answer]:
        """The same; nothing has happened yet."""
        names = self.names(refs)
        if changed:
            order = ("slot", "zero", "generation", "attempt", "nbytes")
            names = tuple(tuple({**dict(zip(order, name, strict=True)), **changed}.values()) for name in names)
        answers = [self.expect(name[3]) for name in names]
        self.say(self.frame(Kind.FETCH, ring_id=self.rig.ring.ring_id, names=names, ends=self.ends(ends)))
        return answers

    def fetch_packed(self, *refs: SlotRef) -> tuple[bytes, list[int]]:
        """Ask for payloads in one message; returns it and their attempts."""
        self.attempt += 1
        shared, names = self.attempt, self.names(refs)
        answer = self.expect(shared, sum(message_bytes(ref.nbytes) for ref in refs))
        ring_id = self.rig.ring.ring_id
        self.say(self.frame(Kind.FETCH, ring_id=ring_id, flags=FLAG_PACKED, attempt=shared, names=names))
        self.rig.settle()
        assert answer.has_come
        return bytes(answer.buffer), [name[3] for name in names]

    def end(self, *attempts: int, delivered: bool = True) -> None:
        """End attempts, in a frame without names."""
        self.say(self.frame(Kind.FETCH, ends=self.ends([(attempt, delivered) for attempt in attempts])))
        self.rig.settle()

    @staticmethod
    def ends(ends: Sequence[tuple[int, bool]]) -> tuple[int, ...]:
        """As the frame has them."""
        return tuple(attempt << 1 | delivered for attempt, delivered in ends)

    def reset(self) -> None:
        """Be gone, as when the process dies."""
        self.endpoint.close()
        self.rig.settle()


class PortRig:
    """See the module; made by `open_rig`.

    Attributes:
        ring: that is served. before: what the port is given in its place, if so. clock: of both sides.
        faults: of what the port sends. peer_faults: of what peers send.
    """

    RING: ClassVar = RingConfig(slots=4, slot_bytes=64 << 10, prefault=False)

    def __init__(self, ring: SharedRingBuffer, settings: ServerConfig, ring_before: Any = None) -> None:
        self.ring = ring
        self.before = ring_before
        self.clock = Clock()
        self.faults, self.peer_faults = Faults(), Faults()
        self._network = MemoryNetwork(faults=self.faults)
        peers = MemoryNetwork(faults=self.peer_faults, listeners=self._network.listeners)
        self.reactor = Reactor(self._network.link, spin_s=0.0, clock=self.clock)
        self._peers = Reactor(peers.link, spin_s=0.0, clock=self.clock)
        self.counters = PortCounters(ring.server_words, 0)
        source = SessionSource(
            ring_id=ring.ring_id,
            fingerprint=ring.fingerprint,
            schema_bytes=ring.schema_bytes,
            token=settings.token_bytes,
        )
        binding = Binding(ring.server_words)
        given: Any = ring_before or ring
        self.port = Port(given, source, settings, self.counters, binding, self.reactor, reclaims=True)
        self.port.start([PORT])

    def connect(self) -> RawPeer:
        """A connection that says nothing."""
        peer = RawPeer(self)
        peer.endpoint = self._peers.link.connect(HOST, PORT, peer)
        self.settle()
        return peer

    def peer(self, reader: int = READER) -> RawPeer:
        """A connection that has shaken hands."""
        peer = self.connect()
        assert peer.greet(reader).status is Status.OK
        return peer

    def write(self, content: bytes) -> SlotRef:
        """A payload."""
        return self.ring.write_raw(content)

    def states(self, *refs: SlotRef) -> list[SlotState]:
        """Of their slots."""
        return [self.ring.slot_state(ref.slot) for ref in refs]

    @property
    def counts(self) -> PortStatistics:
        """What the port has counted."""
        return self.counters.snapshot()

    def settle(self) -> None:
        """Both sides run until nothing moves."""
        for _ in range(TURNS):
            if not self._peers.poll() | self.reactor.poll():
                return
        raise AssertionError("the two sides never come to rest")

    def turns_until(self, condition: Callable[[], bool]) -> None:
        """Both sides run, turn by turn, until the condition holds."""
        for _ in range(TURNS):
            if condition():
                return
            self.reactor.poll()
            self._peers.poll()
        raise AssertionError("it never comes to that")

    def fail_accepts(self, count: int) -> None:
        """So many clients go away while the link takes them."""
        link = self.reactor.link
        assert isinstance(link, MemoryLink)
        link.counters.accepts_failed += count

    def advance(self, seconds: float) -> None:
        """Time passes, and whatever is due happens at its time."""
        until_s = self.clock.now_s + seconds
        self.settle()
        while (due_s := min(self.reactor.next_timer_s, self._peers.next_timer_s)) <= until_s:
            self.clock.now_s = max(self.clock.now_s, due_s)
            self.settle()
        self.clock.now_s = until_s
        self.settle()

    def stop(self) -> None:
        """Stop the port as its thread does."""
        self.port.stop()
        self.settle()
        assert self.port.stopped
        self.reactor.close()
        self.port.retire()

    def close(self) -> None:
        """The end of both sides."""
        if not self.reactor.closed:
            self.stop()
        self._peers.close()


@contextmanager
def open_rig(*, ring: RingConfig | None = None, before: Any = None, **settings: Any) -> Iterator[PortRig]:
    """A rig; closed at the end, whatever happened.

    Args:
        ring: of the ring; 4 raw slots of 64 KiB by default.
        before: makes of the ring what the port is given.
        settings: of the server.
    """
    with SharedRingBuffer.create(ring or PortRig.RING) as made:
        rig = PortRig(made, ServerConfig(mode="thread", **settings), before and before(made))
        try:
            yield rig
        finally:
            rig.close()
