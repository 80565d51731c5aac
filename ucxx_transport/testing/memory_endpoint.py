"""MemoryEndpoint: one end of a connection of a `MemoryLink`, its messages and operations, and what goes wrong there."""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass

from ucxx_transport.errors import ConfigError, PeerLostError, TransportError
from ucxx_transport.link.base import CLOSED, FORKED, EndpointEvents, LinkStatistics, LostReason, OnDone, byte_view, lost
from ucxx_transport.link.reactor import Wakeup

EAGER_BYTES = 8191
"""Sends up to this size complete before they are received (measured of UCX over TCP with its default settings)."""


class Hold:
    """Keeps messages back until it is set, from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: list[Callable[[], object]] = []
        self._is_set = False

    def is_set(self) -> bool:
        """Whether messages pass."""
        return self._is_set

    def set(self) -> None:
        """Let what was kept back pass, and all that follows."""
        with self._lock:
            self._is_set = True
            waiting, self._waiting = self._waiting, []
        for action in waiting:
            action()

    def when_set(self, action: Callable[[], object]) -> None:
        """Call this when it is set: now, or by the thread that sets it."""
        with self._lock:
            if not self._is_set:
                self._waiting.append(action)
                return
        action()


@dataclass(slots=True, kw_only=True)
class Faults:
    """Switches of a `MemoryNetwork`; each message sent takes them in this order. All are off by default.

    Attributes:
        reset_after: this many further messages pass, then the connection of the next one breaks instead.
        spare: this many further messages pass, then the next three faults are looked at.
        drop: this many messages vanish; their sends succeed.
        truncate_to: the next message loses what is beyond this many bytes.
        flip_byte: the next message arrives with the byte at this offset inverted, if it has one.
        hold: messages are delivered only once it is set, in order.
        refuse: connections are refused.
        hang_connect: connections neither succeed nor fail.
        never_complete: further receives never end, not even by `close()`, which then is not clean.
    """

    reset_after: int | None = None
    spare: int = 0
    drop: int = 0
    truncate_to: int | None = None
    flip_byte: int | None = None
    hold: Hold | None = None
    refuse: bool = False
    hang_connect: bool = False
    never_complete: bool = False

    def breaks_connection(self) -> bool:
        """Whether the connection breaks in the place of the next message."""
        if self.reset_after is None:
            return False
        self.reset_after -= 1
        if self.reset_after >= 0:
            return False
        self.reset_after = None
        return True

    def apply(self, content: bytes) -> bytes | None:
        """What of the next message arrives; None when it vanishes."""
        if self.spare > 0:
            self.spare -= 1
            return content
        if self.drop > 0:
            self.drop -= 1
            return None
        if self.truncate_to is not None:
            content, self.truncate_to = content[: self.truncate_to], None
        if self.flip_byte is not None:
            flipped = bytearray(content)
            if self.flip_byte < len(flipped):
                flipped[self.flip_byte] ^= 0xFF
            content, self.flip_byte = bytes(flipped), None
        return content


class LinkState:
    """A `MemoryLink`, as its endpoints see it.

    Attributes:
        faults: of its network.
        closing: it is being closed, which the owners of its endpoints hear by their operations' ends alone.
    """

    def __init__(self, faults: Faults) -> None:
        self.faults = faults
        self.closed = self.closing = self.forked = False
        self.counters = LinkStatistics()
        self.endpoints: set[MemoryEndpoint] = set()
        self.inbox: deque[tuple[Callable[..., object], tuple[object, ...]]] = deque()
        self.wakeup = Wakeup()
        self.armed = False  # others notify only then

    def check_usable(self) -> None:
        """Refuse a closed link, and one of a parent process."""
        if self.forked:
            raise ConfigError(FORKED)
        if self.closed:
            raise ConfigError(CLOSED)

    def call(self, action: Callable[..., object], *arguments: object) -> None:
        """Call this in a turn of this link. From any thread."""
        self.inbox.append((action, arguments))
        if self.armed:
            self.wakeup.notify()


class MemoryOperation:
    """One operation of a `MemoryEndpoint`. See `base.Operation`."""

    __slots__ = ("completed", "error", "immortal", "nbytes", "on_done", "sending", "view")

    def __init__(self, view: memoryview, on_done: OnDone | None, *, sending: bool) -> None:
        self.view: memoryview | None = view.cast("B") if view.nbytes else memoryview(b"")
        self.nbytes = view.nbytes
        self.on_done = on_done
        self.sending = sending
        self.completed = False
        self.error: TransportError | None = None
        self.immortal = False


class MemoryEndpoint:
    """One end of a connection; `other` is the end its messages go to, once connected. See `base.Endpoint`."""

    def __init__(self, link: LinkState, peer: str, other: MemoryEndpoint | None = None) -> None:
        self.link = link
        self.peer = peer
        self.events: EndpointEvents | None = None
        self.alive = True
        self.channels = 1 << 16
        self.other = other
        self.waits_for_ever = False
        self._closed = False
        self._clean: bool | None = None
        self._on_closed: list[Callable[[bool], None]] = []
        self._in_flight: dict[MemoryOperation, None] = {}
        self._receives: defaultdict[int, deque[MemoryOperation]] = defaultdict(deque)
        self._arrived: defaultdict[int, deque[tuple[bytes, MemoryOperation]]] = defaultdict(deque)
        self._outbox: deque[tuple[int, bytes, MemoryOperation]] = deque()
        self._held = False

    def post_receive(self, buffer: object, on_done: OnDone, *, channel: int = 0) -> MemoryOperation:
        operation = self._posted(buffer, on_done, sending=False)
        operation.immortal = self.link.faults.never_complete
        self._receives[channel].append(operation)
        if channel in self._arrived:
            self.link.call(self._match, channel)
        return operation

    def post_send(self, buffer: object, on_done: OnDone | None = None, *, channel: int = 0) -> MemoryOperation:
        operation = self._posted(buffer, on_done, sending=True)
        if not self.alive:
            return operation
        assert operation.view is not None  # just made
        faults = self.link.faults
        if faults.breaks_connection():
            self.link.call(self.reset)
            return operation
        content = faults.apply(bytes(operation.view))
        if content is not None:
            self._outbox.append((channel, content, operation))
        if content is None or (self.other is not None and operation.nbytes <= EAGER_BYTES):
            self._completed(operation)
            self.link.call(self._call_done, operation)
        self._deliver(faults.hold)
        return operation

    def close(self, on_closed: Callable[[bool], None] | None = None) -> None:
        if on_closed is not None:
            self._on_closed.append(on_closed)
        if not self._closed:
            self._closed = True
            self._stop()
            self._reset_other()
            self.link.call(self._finish_close)
        elif self._clean is not None:
            self.link.call(self._call_closed)

    def listener_has_answered(self) -> bool:
        """Whether connecting goes further than to the listener, as `Faults.hang_connect` has it."""
        return self.waits_for_ever

    @property
    def in_flight(self) -> int:
        """Operations posted and not completed."""
        return len(self._in_flight)

    def connected(self, other: MemoryEndpoint) -> None:
        """The listener has taken the connection. In the link's own turn, as all that follows."""
        if not self.alive:
            other.link.call(other.lose, "reset")
            return
        self.other = other
        for operation in tuple(self._in_flight):
            if operation.sending and operation.nbytes <= EAGER_BYTES:
                self._end(operation)
        self._deliver(self.link.faults.hold)
        if self.events is not None:
            self.events.connected()

    def accepted(self) -> None:
        """Say to the owner that the connection is up, which it is from the start."""
        if self.alive and self.events is not None:
            self.events.connected()

    def take(self, channel: int, content: bytes, send: MemoryOperation) -> None:
        """A message of the other end has arrived; also while this end is being closed, as with UCX."""
        if channel >= self.channels:
            self.link.counters.unexpected_messages += 1
            if self.other is not None:
                self.other.link.call(self.other.sent, send)
        elif self.alive or (self._closed and self._clean is None):
            self._arrived[channel].append((content, send))
            self._match(channel)

    def sent(self, send: MemoryOperation) -> None:
        """A message of this end has been received."""
        self._end(send)

    def reset(self) -> None:
        """Break the connection, as a fault does: both ends find their peer lost."""
        self.lose("reset")
        self._reset_other()

    def lose(self, reason: LostReason) -> None:
        """The other end is gone, or was never there."""
        if not self.alive:
            return
        if self.other is not None:
            self.link.counters.peers_lost += 1
        self._stop()
        if self.events is not None:
            self.events.lost(lost(reason, peer=self.peer))
        self._end_all(reason)

    def _posted(self, buffer: object, on_done: OnDone | None, *, sending: bool) -> MemoryOperation:
        self.link.check_usable()
        if not (self.alive or self.link.closing):
            raise lost("closed" if self._closed else "reset", peer=self.peer)
        operation = MemoryOperation(byte_view(buffer, writable=not sending), on_done, sending=sending)
        self._in_flight[operation] = None
        if not self.alive:
            self.link.call(self._end, operation, lost("closed", peer=self.peer))
        return operation

    def _deliver(self, hold: Hold | None) -> None:
        if self._held or self.other is None:
            return  # what is kept back goes first
        if hold is not None and not hold.is_set():
            self._held = True
            hold.when_set(lambda: self.link.call(self._release))
            return
        other = self.other
        while self._outbox:
            other.link.call(other.take, *self._outbox.popleft())

    def _release(self) -> None:
        self._held = False
        self._deliver(None)

    def _match(self, channel: int) -> None:
        """Bring what has arrived and the receives posted for it together. In the link's own turn."""
        while (arrived := self._arrived.get(channel)) and (receives := self._receives[channel]):
            if receives[0].immortal:
                break
            content, send = arrived.popleft()
            if not arrived:
                del self._arrived[channel]
            if self.other is not None:
                self.other.link.call(self.other.sent, send)
            receive = receives.popleft()
            assert receive.view is not None  # in flight
            if len(content) > receive.nbytes:
                self._end(receive, lost("truncated", peer=self.peer))
            else:
                receive.view[: len(content)] = content
                self._end(receive)

    def _end(self, operation: MemoryOperation, error: PeerLostError | None = None) -> None:
        """End an operation and call back, in the link's own turn."""
        if not operation.completed:
            self._completed(operation, error)
            self._call_done(operation)

    def _completed(self, operation: MemoryOperation, error: PeerLostError | None = None) -> None:
        operation.completed = True
        operation.error = error
        operation.view = None
        del self._in_flight[operation]

    def _call_done(self, operation: MemoryOperation) -> None:
        on_done, operation.on_done = operation.on_done, None
        if on_done is not None:
            on_done(operation)

    def _end_all(self, reason: LostReason) -> None:
        self._receives.clear()
        for operation in tuple(self._in_flight):
            if operation.immortal:
                operation.error = lost(reason, peer=self.peer)
                self._call_done(operation)
            else:
                self._end(operation, lost(reason, peer=self.peer))

    def _stop(self) -> None:
        self.alive = False
        self._outbox.clear()
        self.link.counters.unexpected_messages += sum(map(len, self._arrived.values()))
        self._arrived.clear()

    def _reset_other(self) -> None:
        if self.other is not None:
            self.other.link.call(self.other.lose, "reset")

    def _finish_close(self) -> None:
        self._end_all("closed")
        self.link.counters.leaked_buffers += len(self._in_flight)
        self._clean = not self._in_flight
        self.link.endpoints.discard(self)
        self.link.call(self._call_closed)

    def _call_closed(self) -> None:
        while self._on_closed:
            self._on_closed.pop(0)(self._clean is True)
