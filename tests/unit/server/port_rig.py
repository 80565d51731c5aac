"""A ring and a port before it, over the in-memory link; a test runs both sides, turn by turn, under its own clock."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from tests.support.raw_peer import READER, RawPeer
from ucxx_transport.config import RingConfig, ServerConfig
from ucxx_transport.link.reactor import Reactor
from ucxx_transport.ring import SharedRingBuffer, SlotState
from ucxx_transport.schema import SlotRef
from ucxx_transport.server.counters import PortCounters, PortStatistics
from ucxx_transport.server.port import Port
from ucxx_transport.testing import Faults, MemoryLink, MemoryNetwork
from ucxx_transport.wire.frames import Status

HOST = "10.0.0.1"
PORT = 5001
TURNS = 10_000


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class PortRig:
    """See the module; made by `open_rig`.

    Attributes:
        ring: that is served. before: what the port is given in its place, if so. clock: of both sides.
        faults: of what the port sends. peer_faults: of what peers send.
        reactor: of the port. peers: of the other side.
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
        self.peers = Reactor(peers.link, spin_s=0.0, clock=self.clock)
        self.counters = PortCounters(ring.server_words, 0)
        given: Any = ring_before or ring
        self.port = Port(given, settings, 0, self.reactor)
        self.port.start(PORT)

    def connect(self) -> RawPeer:
        """A connection that says nothing."""
        peer = RawPeer(lambda _: self.settle(), self.ring.ring_id)
        peer.endpoint = self.peers.link.connect(HOST, PORT, peer)
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
            if not self.peers.poll() | self.reactor.poll():
                return
        raise AssertionError("the two sides never come to rest")

    def turns_until(self, condition: Callable[[], bool]) -> None:
        """Both sides run, turn by turn, until the condition holds."""
        for _ in range(TURNS):
            if condition():
                return
            self.reactor.poll()
            self.peers.poll()
        raise AssertionError("it never comes to that")

    def fail_accepts(self, count: int) -> None:
        """So many clients go away while the link takes them."""
        link = self.reactor.link
        assert isinstance(link, MemoryLink)
        link.accepts_failed += count

    def advance(self, seconds: float) -> None:
        """Time passes, and whatever is due happens at its time."""
        until_s = self.clock.now_s + seconds
        self.settle()
        while (due_s := min(self.reactor.next_timer_s, self.peers.next_timer_s)) <= until_s:
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
        self.peers.close()


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
