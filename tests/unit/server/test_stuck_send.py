"""A slot is given back only when its send is known to be over: by itself, with the connection, much later, or never."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Literal, cast

import pytest

from tests.support.raw_peer import NONCE
from tests.support.waiting import wait_until
from tests.unit.server.port_rig import PORT, Clock
from ucxx_transport.config import RingConfig, ServerConfig
from ucxx_transport.errors import DeadlineExceededError, PeerLostError
from ucxx_transport.link.base import EndpointEvents, OnDone, Operation
from ucxx_transport.link.endpoint import Endpoint, OnEndpoint
from ucxx_transport.link.reactor import Reactor
from ucxx_transport.machine import Wakeup
from ucxx_transport.ring import SharedRingBuffer, SlotState
from ucxx_transport.schema import SlotRef
from ucxx_transport.server.counters import BEAT, PortCounters, PortStatistics
from ucxx_transport.server.port import SWEEP_INTERVAL_S, Port, PortThread
from ucxx_transport.wire.codec import encode_frame
from ucxx_transport.wire.frames import Frame, Kind

LARGE = 1000
MINUTE = 60


class StuckOperation(Operation):
    """An operation that ends when the test says so."""

    def __init__(self, nbytes: int, on_done: OnDone | None) -> None:
        self.nbytes, self.on_done = nbytes, on_done

    def end(self, error: PeerLostError | None = None) -> None:
        if not self.completed:
            self.completed, self.error = True, error
            self.call_back()

    def give_up(self, error: PeerLostError) -> None:
        """Its owner is called back, although the link still has the buffer."""
        self.error = error
        self.call_back()

    def call_back(self) -> None:
        on_done, self.on_done = self.on_done, None
        if on_done is not None:
            on_done(self)


@dataclass(eq=False, slots=True)
class StuckEndpoint:
    """An `Endpoint` whose large sends never end by themselves, and whose close may not end them either."""

    close_ends_sends: bool
    peer: str = "stuck:1"
    alive: bool = True
    channels: int = 1 << 16
    large_sends: list[StuckOperation] = field(default_factory=list)
    is_closed: bool = False
    _receives: list[tuple[bytearray, StuckOperation]] = field(default_factory=list)
    _on_closed: Callable[[bool], None] | None = None

    def hear(self, frame: bytes) -> None:
        """The peer says `frame`."""
        buffer, operation = self._receives.pop(0)
        buffer[: len(frame)] = frame
        operation.end()

    def post_receive(self, buffer: object, on_done: OnDone, *, channel: int = 0) -> StuckOperation:
        assert isinstance(buffer, bytearray)
        assert channel == 0
        if not self.alive:
            raise PeerLostError("gone", reason="reset")
        operation = StuckOperation(len(buffer), on_done)
        self._receives.append((buffer, operation))
        return operation

    def post_send(self, buffer: object, *, channel: int = 0) -> StuckOperation:
        assert isinstance(buffer, bytes | memoryview)
        assert channel
        operation = StuckOperation(len(buffer), None)
        if len(buffer) > LARGE:
            self.large_sends.append(operation)
        else:
            operation.end()
        return operation

    def close(self, on_closed: Callable[[bool], None] | None = None) -> None:
        self.alive = False
        self._on_closed = on_closed or self._on_closed

    def finish_close(self) -> None:
        """What the link does in a later turn."""
        if self.alive or self.is_closed:
            return
        self.is_closed = True
        error = PeerLostError("closed", reason="closed")
        for _, operation in self._receives:
            operation.end(error)
        for operation in self.large_sends:
            if self.close_ends_sends:
                operation.end(error)
            elif not operation.completed:
                operation.give_up(error)
        if self._on_closed is not None:
            self._on_closed(all(operation.completed for operation in self.large_sends))

    def listener_has_answered(self) -> bool:
        return True


@dataclass(slots=True)
class OneListener:
    """A `Link` that only listens, and its `Listener`."""

    port: int = 0
    on_endpoint: OnEndpoint | None = None
    wakeup: Wakeup = field(default_factory=Wakeup)
    accepts_failed: int = 0

    def listen(self, port: int, on_endpoint: OnEndpoint) -> OneListener:
        self.port, self.on_endpoint = port, on_endpoint
        return self

    def connect(self, host: str, port: int, events: EndpointEvents) -> Endpoint:
        raise PeerLostError("no peer", host=host, port=port, events=events)

    def message(self, buffer: object) -> Any:
        return buffer

    def progress(self, spin_s: float = 0.0) -> bool:
        del spin_s
        return False

    def arm(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.wakeup.fileno()

    def transports(self) -> tuple[str, ...]:
        return ()

    def close(self) -> None:
        self.on_endpoint = None


class LockedRing:
    """A ring whose lock is held for as long as the test wants."""

    def __init__(self, ring: SharedRingBuffer, schema_bytes: bytes) -> None:
        self._ring = ring
        self.ring_id, self.fingerprint = ring.ring_id, 0
        self.schema = SimpleNamespace(to_bytes=lambda: schema_bytes)
        self.server_words = ring.server_words
        self.is_locked = False
        self.waits = 0
        self.on_wait: Callable[[], object] = lambda: None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ring, name)

    def wait(self) -> None:
        if self.is_locked:
            self.waits += 1
            self.on_wait()
            raise DeadlineExceededError("the ring's lock is held by a thread that does not get on (stopped?)")

    def reclaim_dead(self) -> int:
        self.wait()
        return self._ring.reclaim_dead()

    def acquire_slot(self, slot: int, generation: int, **others: Any) -> Any:
        self.wait()
        return LockedLease(self, self._ring.acquire_slot(slot, generation, **others))


class LockedLease:
    """A lease of it."""

    def __init__(self, ring: LockedRing, lease: Any) -> None:
        self._ring, self._lease = ring, lease

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lease, name)

    def mark_consumed(self) -> bool:
        self._ring.wait()
        return bool(self._lease.mark_consumed())

    def release_reading(self) -> bool:
        self._ring.wait()
        return bool(self._lease.release_reading())


class Serving:
    """One port, and `endpoint` connected, greeted, and one payload of 2000 bytes on its way to it."""

    def __init__(self, ring: SharedRingBuffer, endpoint: StuckEndpoint, schema_bytes: bytes) -> None:
        self.ring, self.endpoint = ring, endpoint
        self.locked = LockedRing(ring, schema_bytes)
        self.clock = Clock()
        self.reactor = Reactor(lambda _: cast(Any, OneListener()), spin_s=0.0, clock=self.clock)
        self.counters = PortCounters(ring.server_words, 0)
        self.port = Port(cast(Any, self.locked), ServerConfig(), 0, self.reactor)
        self.port.start(PORT)
        self.sequence = 0
        link: Any = self.reactor.link
        assert link.on_endpoint is not None
        link.on_endpoint(endpoint)
        self.hear(Kind.HELLO, attempt=1, word=1, secret=NONCE)
        self.ref: SlotRef = ring.write_raw(bytes(2000))
        self.hear(Kind.FETCH, ring_id=ring.ring_id, names=((self.ref.slot, 0, self.ref.generation, 2, 2000),))
        assert len(endpoint.large_sends) == 1

    def state(self) -> SlotState:
        return self.ring.slot_state(self.ref.slot)

    @property
    def counts(self) -> PortStatistics:
        return self.counters.snapshot()

    def hear(self, kind: Kind, **words: Any) -> None:
        self.sequence += 1
        self.endpoint.hear(encode_frame(Frame(kind, self.sequence, **words)))
        self.settle()

    def end(self, *, delivered: bool = True) -> None:
        self.hear(Kind.FETCH, ends=(2 << 1 | delivered,))

    def settle(self) -> None:
        while self.reactor.poll():
            pass
        self.endpoint.finish_close()

    def advance(self, seconds: float) -> None:
        until_s = self.clock.now_s + seconds
        while (due_s := self.reactor.next_timer_s) <= until_s:
            self.clock.now_s = max(due_s, self.clock.now_s)
            self.settle()
        self.clock.now_s = until_s
        self.settle()


@contextmanager
def serving(*, close_ends_sends: bool = True, schema_bytes: bytes = b"") -> Iterator[Serving]:
    with SharedRingBuffer.create(RingConfig(slots=1, slot_bytes=4096, prefault=False)) as ring:
        served = Serving(ring, StuckEndpoint(close_ends_sends), schema_bytes)
        try:
            yield served
        finally:
            served.port.stop()
            served.settle()
            assert served.port.stopped
            served.reactor.close()
            served.port.retire()


def test_an_acknowledgement_before_the_send_is_over_waits_for_it() -> None:
    with serving() as served:
        served.end()
        assert served.state() is SlotState.READING, "UCX may still read from the slot"
        served.endpoint.large_sends[0].end()
        assert served.state() is SlotState.FREE
        assert served.counts.delivered == 1


def test_an_acknowledged_payload_stays_delivered_when_its_send_fails_afterwards() -> None:
    with serving() as served:
        served.end()
        served.endpoint.large_sends[0].end(PeerLostError("reset", reason="reset"))
        served.settle()
        assert served.state() is SlotState.FREE
        assert served.counts.delivered == 1
        assert served.endpoint.is_closed


@pytest.mark.parametrize("delivered", [True, False])
def test_a_delivery_is_recorded_before_its_send_is_over(*, delivered: bool) -> None:
    """A port that dies in between gives the payload to no other reader."""
    with serving() as served:
        served.end(delivered=delivered)
        assert served.state() is SlotState.READING
        assert served.ring.statistics().consumed == delivered
        served.endpoint.large_sends[0].end()
        found = served.ring.statistics()
        assert (served.state() is SlotState.FREE, found.consumed, found.freed) == (delivered, delivered, delivered)
        assert (served.counts.delivered, served.counts.released) == (delivered, not delivered)


@pytest.mark.parametrize("send_is_over", [True, False])
def test_an_acknowledgement_counts_when_the_peer_is_gone_in_the_same_moment(*, send_is_over: bool) -> None:
    with serving() as served:
        if send_is_over:
            served.endpoint.large_sends[0].end()
        served.endpoint.alive = False  # before anything has looked at what came
        served.end()
        assert served.state() is SlotState.FREE
        assert (served.counts.delivered, served.counts.released) == (1, 0)


def test_closing_the_connection_ends_the_send_and_gives_the_slot_back() -> None:
    with serving() as served:
        served.advance(61.0)
        assert served.endpoint.is_closed
        assert served.state() is SlotState.READY
        assert served.counts.delivery_timeouts == 1


@pytest.mark.parametrize("delivered", [None, True, False])
def test_a_send_that_outlives_its_connection_keeps_its_slot_until_it_ends(
    *, delivered: bool | None, log_events: list[MutableMapping[str, Any]]
) -> None:
    with serving(close_ends_sends=False) as served:
        if delivered is not None:
            served.end(delivered=delivered)
        served.advance(3600.0)
        assert served.endpoint.is_closed
        assert served.counts.connections == 0
        assert served.state() is SlotState.READING, "UCX may still read from the slot"
        assert served.counts.stuck_sends == 1
        assert "send_stuck" in [event["event"] for event in log_events]
        served.endpoint.large_sends[0].completed = True
        served.advance(1.0)
        assert served.state() is (SlotState.FREE if delivered else SlotState.READY)


def test_a_peer_that_reads_no_large_answer_is_not_heard_until_it_does() -> None:
    schema = bytes(300_000)
    with serving(schema_bytes=schema) as served:
        served.endpoint.large_sends[0].end()
        served.end()
        for attempt in range(3, 8):
            if len(served.endpoint.large_sends) < 3:
                served.hear(Kind.DESCRIBE, attempt=attempt, ring_id=served.ring.ring_id)
        served.hear(Kind.DESCRIBE, attempt=8, ring_id=served.ring.ring_id)
        assert len(served.endpoint.large_sends) == 3, "two answers are on their way: enough"
        served.endpoint.large_sends[1].end()
        served.settle()
        assert len(served.endpoint.large_sends) == 4
        served.advance(3600.0)
        assert served.endpoint.is_closed, "and not for ever"


class PlayedLink(OneListener):
    """A link of a port's thread, in which a client comes, and goes with a send that never ends."""

    def __init__(self, ring: SharedRingBuffer) -> None:
        super().__init__()
        ref = ring.write_raw(bytes(2000))
        names = ((ref.slot, 0, ref.generation, 2, 2000),)
        self.endpoint = StuckEndpoint(close_ends_sends=False)
        self.frames = [
            encode_frame(Frame(Kind.HELLO, 1, attempt=1, word=1, secret=NONCE)),
            encode_frame(Frame(Kind.FETCH, 2, ring_id=ring.ring_id, names=names)),
        ]

    def progress(self, spin_s: float = 0.0) -> bool:
        if self.on_endpoint is not None:
            self.on_endpoint(cast(Any, self.endpoint))
            self.on_endpoint = None
        while self.frames and self.endpoint.alive:
            self.endpoint.hear(self.frames.pop(0))
        self.endpoint.finish_close()
        return super().progress(spin_s)


def wait_for_a_beat(counters: PortCounters, port: PortThread) -> None:
    beat_ns = counters.words[BEAT]
    wait_until(lambda: counters.words[BEAT] > beat_ns or not port.alive, MINUTE, what="it is looked at")


@pytest.mark.may_leave("descriptors", reason="a send that never ends keeps its slot for the life of the process")
@pytest.mark.parametrize("mode", ["process", "thread"])
def test_a_port_s_process_ends_when_stuck_sends_hold_too_much_of_the_ring(
    mode: Literal["process", "thread"], log_events: list[MutableMapping[str, Any]]
) -> None:
    """Its end gives them back, and it is started again; a thread of the worker's own process serves on."""
    with SharedRingBuffer.create(RingConfig(slots=1, slot_bytes=4096, prefault=False)) as ring:
        config = ServerConfig(mode=mode, send_timeout_s=0.01)
        port = PortThread(ring, config, 0, PORT, lambda _: cast(Any, PlayedLink(ring)))
        counters = PortCounters(ring.server_words, 0)
        port.start()
        try:
            wait_until(lambda: counters.snapshot().stuck_sends == 1, MINUTE, what="a send is stuck")
            for _ in range(2):
                wait_for_a_beat(counters, port)
            if mode == "process":
                wait_until(lambda: not port.alive, MINUTE, what="the port ends")
            assert port.alive == (mode == "thread")
        finally:
            port.stop(time.monotonic() + MINUTE)
        clogged = [event["event"] for event in log_events if event["event"] == "port_clogged"]
        assert clogged == ["port_clogged"] * (mode == "process")


@pytest.mark.may_leave("descriptors", reason="a send that never ends keeps its slot for the life of the process")
def test_a_stopping_port_waits_for_nothing_that_never_ends() -> None:
    with serving(close_ends_sends=False) as served:
        assert served.state() is SlotState.READING
    assert served.endpoint.is_closed


@pytest.mark.parametrize("delivered", [True, False])
def test_an_attempt_whose_end_the_ring_s_lock_holds_up_ends_later(*, delivered: bool) -> None:
    with serving() as served:
        served.endpoint.large_sends[0].end()
        served.locked.is_locked = True
        served.end(delivered=delivered)
        served.advance(1.0)
        assert served.state() is SlotState.READING
        assert not served.endpoint.is_closed
        served.locked.is_locked = False
        served.advance(1.0)
        assert served.state() is (SlotState.FREE if delivered else SlotState.READY)
        assert served.ring.statistics().late_finalise == 0


def test_a_lock_that_is_not_to_be_had_is_waited_for_once_a_turn() -> None:
    with serving() as served:
        served.endpoint.large_sends[0].end()
        served.end()
        served.locked.is_locked = True
        names = tuple((0, 0, 1, attempt, 100) for attempt in range(3, 43))
        served.hear(Kind.FETCH, ring_id=served.ring.ring_id, names=names)
        assert served.locked.waits == 1
        assert served.counts.busy == 40


def test_a_sweep_waits_for_the_lock_once_and_shows_before_that_the_loop_turns() -> None:
    beats: list[int] = []

    def look() -> None:
        beats.append(served.counters.words[BEAT])
        served.counters.words[BEAT] = 0

    with serving() as served:
        served.endpoint.large_sends[0].end()
        served.locked.is_locked = True
        served.end()
        served.locked.on_wait = look
        served.counters.words[BEAT] = 0
        served.advance(2 * SWEEP_INTERVAL_S)
        assert len(beats) == 2
        assert all(beats), "two waits in a row would pass stall_timeout_s"
        served.locked.is_locked = False
