"""A network in memory, for tests of programs that transport payloads.

Endpoints, loss and close are those of the link over UCX; in UCX's place a `MemoryFlight` matches messages and receives,
as there: small sends complete at once, larger ones when received; a shorter message is a silent success, a longer one
fails the receive alone, a closed end resets the other. Links of one network reach each other in any threads: what one
end does to the other lies in the inbox of the other's flight until its link progresses.
"""

from __future__ import annotations

import ctypes
import itertools
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

from ucxx_transport.errors import ConfigError, PeerLostError
from ucxx_transport.link.base import EndpointEvents, LostReason, Operation, Posted, Timers, lost
from ucxx_transport.link.endpoint import Endpoint, Link, OnEndpoint
from ucxx_transport.link.flight import CANCELLED, ENDS, ENDS_AT_ONCE, SPIN, TRUNCATED, Flight
from ucxx_transport.machine import Wakeup

EAGER_BYTES = 8191
"""Sends up to this size complete before they are received (measured of UCX over TCP with its default settings)."""

NO_TAG: Final = -1  # of a send, and of what goes by a stream
NEVER: Final = -2  # of a receive that never ends
_stream_tags: Final = itertools.count(-3, -1)


class Hold(threading.Event):
    """Keeps messages back until it is set, from any thread; `is_set()` says whether they pass."""

    def __init__(self) -> None:
        super().__init__()
        self._waiting: deque[Callable[[], object]] = deque()

    def set(self) -> None:
        """Let what was kept back pass, and all that follows."""
        super().set()
        while True:
            try:
                action = self._waiting.popleft()
            except IndexError:  # none is left; another thread may have taken the last one
                return
            action()

    def when_set(self, action: Callable[[], object]) -> None:
        """Call this when it is set: now, or by the thread that sets it."""
        self._waiting.append(action)
        if self.is_set():
            self.set()


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
        left = self.reset_after
        self.reset_after = left - 1 if left else None
        return left == 0

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


@dataclass(slots=True, kw_only=True)
class MemoryNetwork:
    """What several `MemoryLink`s share: the ports in use, and the faults.

    Attributes:
        faults: what goes wrong, from now on; nothing by default.
        listeners: by port. Of several networks, those that share this one reach each other, each with its own faults.
        free_ports: the next ones to listen on.
    """

    faults: Faults = field(default_factory=Faults)
    listeners: dict[int, MemoryListener] = field(default_factory=dict)
    free_ports: itertools.count[int] = field(default_factory=lambda: itertools.count(49152))

    def link(self, timers: Timers) -> MemoryLink:
        """A link of this network: `link_factory=network.link` for a server, a client or a reactor."""
        return MemoryLink(self, timers)


class MemoryArray:
    """A buffer, in the place of ucxx's `Array`; it is its own address."""

    def __init__(self, view: memoryview) -> None:
        self.ptr = view.cast("B") if view.nbytes else memoryview(b"")


class MemoryConnection:
    """One end of a connection, in the place of ucxx's `UCXEndpoint`. Messages go to the `other` one."""

    def __init__(self, flight: MemoryFlight, peer: str, other: MemoryConnection | None = None) -> None:
        self.flight = flight
        self.peer = peer
        self.other = other
        self.alive = True
        self.handle = self
        self.stream = next(_stream_tags)
        self._reason: LostReason = "reset"
        self._on_close: Callable[[], object] = lambda: None  # it may break before it has an endpoint
        self._outbox: deque[tuple[Hold | None, int, bytes, Operation]] = deque()

    def set_close_callback(self, callback: Callable[..., object], arguments: tuple[object, ...]) -> None:
        self._on_close = partial(callback, *arguments)

    def raise_on_error(self) -> None:
        raise lost(self._reason, peer=self.peer)

    def close_blocking(self) -> None:
        self._stop()
        if self.other is not None:
            self.other.flight.call(self.other.break_off, "reset")

    def break_off(self, reason: LostReason) -> None:
        """The other end is gone, or was never there."""
        if self.alive:
            self._stop()
            self._reason = reason
            self._on_close()

    def connect(self, other: MemoryConnection) -> None:
        if self.alive:
            self.other = other
            self._deliver()
        else:
            other.flight.call(other.break_off, "reset")

    def pass_on(self, operation: Operation, content: bytes, tag: int, hold: Hold | None = None) -> None:
        """Send what is not held back, nor behind such."""
        self._outbox.append((hold, tag, content, operation))
        if hold is not None:
            hold.when_set(lambda: self.flight.call(self._deliver))
        self._deliver()

    def _deliver(self) -> None:
        other, outbox = self.other, self._outbox
        while other is not None and outbox and (outbox[0][0] is None or outbox[0][0].is_set()):
            _, tag, content, operation = outbox.popleft()
            ended = partial(self.flight.call, self.end_send, operation)
            other.flight.call(other.flight.arrive, other.stream if tag == NO_TAG else tag, content, ended)

    def end_send(self, operation: Operation) -> None:
        """The other end has received it."""
        if self.alive:
            self.flight.end(operation, 0)

    def _stop(self) -> None:
        self.alive = False
        self._outbox.clear()


class MemoryFlight(Flight):
    """In the place of a UCX worker and of `native/flight.c`; what goes by a connection's stream has a tag, too."""

    def __init__(self, faults: Faults) -> None:
        super().__init__((ctypes.c_uint64 * (ENDS + ENDS_AT_ONCE))(), self, self)
        self.faults = faults
        self.wakeup = Wakeup()
        self._armed = False  # others notify only then
        self._inbox: deque[Callable[[], object]] = deque()
        self._receives: defaultdict[int, deque[tuple[Operation, memoryview]]] = defaultdict(deque)
        self._arrived: defaultdict[int, deque[tuple[bytes, Callable[[], None]]]] = defaultdict(deque)

    def call(self, action: Callable[..., object], *arguments: object) -> None:
        """Call this in a turn of this link. From any thread."""
        self._inbox.append(partial(action, *arguments))
        if self._armed:
            self.wakeup.notify()

    def arm(self) -> bool:
        self._armed = True
        return not self._inbox

    def post(self, operation: Operation, begin: Callable[..., Any], endpoint: Any, address: Any, tag: int) -> None:
        operation.owner.posted[operation] = operation
        begin(operation, address, endpoint, tag)

    def flight_send(self, operation: Operation, buffer: bytes | memoryview, end: MemoryConnection, tag: int) -> None:
        operation.index = NO_TAG
        if self.faults.breaks_connection():
            for broken in (end, end.other):
                if broken is not None:
                    broken.flight.call(broken.break_off, "reset")
        elif end.alive:
            left = self.faults.apply(bytes(buffer))
            if left is not None:
                end.pass_on(operation, left, tag, self.faults.hold)
            if left is None or operation.nbytes <= EAGER_BYTES:
                self._leave_at_once(operation)

    def flight_stream_send(self, operation: Operation, buffer: bytes, end: MemoryConnection, _: int) -> None:
        end.pass_on(operation, buffer, NO_TAG)
        self._leave_at_once(operation)

    def flight_receive(self, operation: Operation, buffer: memoryview, _: object, tag: int) -> None:
        if self.faults.never_complete and tag >= 0 and operation.on_done is not None:
            operation.index = NEVER  # but a hello ends, and an unexpected message
        else:
            operation.index = tag
            self._receives[tag].append((operation, buffer))
            self._match(tag)

    def flight_stream_receive(self, operation: Operation, buffer: memoryview, end: MemoryConnection, _: int) -> None:
        self.flight_receive(operation, buffer, end, end.stream)

    def cancel(self, owners: Iterable[Posted]) -> int:
        for owner in owners:
            for operation in owner.posted:
                if operation.index != NEVER:
                    self._receives.pop(operation.index, None)
                    self.end(operation, CANCELLED)
        return self.handled

    def flight_turn(self, words: ctypes.Array[ctypes.c_uint64]) -> int:
        if self._armed:
            self._armed = False
            self.wakeup.drain()
        until_ns = time.perf_counter_ns() + words[SPIN]
        while not (self.ended or self._inbox) and time.perf_counter_ns() < until_ns:
            time.sleep(0)
        return self.run_inbox() - 1

    def run_inbox(self) -> bool:
        """Do what lies in the inbox now; whether there was anything."""
        count = len(self._inbox)
        for _ in range(count):
            self._inbox.popleft()()
        return count > 0

    def arrive(self, tag: int, content: bytes, ended: Callable[[], None]) -> None:
        """A message has come; its sender hears of its end once it is received."""
        self._arrived[tag].append((content, ended))
        self._match(tag)

    def end(self, operation: Operation, status: int) -> None:
        """It is over; what comes after that changes nothing."""
        operation.status = status
        self.ended.append(operation)

    def unexpected_tag(self) -> int | None:
        return next((tag for tag in self._arrived if tag >= 0), None)

    def flight_has_ends(self, _: object) -> bool:
        return False

    flight_cancel = flight_probe = flight_close = flight_has_ends

    def _match(self, tag: int) -> None:
        """Bring what has arrived and the receives posted for it together."""
        receives, arrived = self._receives[tag], self._arrived[tag]
        while receives and arrived:
            (receive, buffer), (content, ended) = receives.popleft(), arrived.popleft()
            fits = len(content) <= receive.nbytes
            if fits:
                buffer[: len(content)] = content
            self.end(receive, 0 if fits else TRUNCATED)
            ended()
        if not receives:
            del self._receives[tag]
        if not arrived:
            del self._arrived[tag]

    def _leave_at_once(self, operation: Operation) -> None:
        operation.owner.posted.pop(operation, None)  # which a signal handler's close may have ended
        operation.completed, operation.buffer = True, None
        if operation.on_done is not None:  # it had waited
            self.ended.append(operation)


@dataclass(slots=True, eq=False)
class MemoryListener:
    """One port of a `MemoryNetwork`. See `Listener`."""

    link: MemoryLink
    port: int
    on_endpoint: OnEndpoint

    def close(self) -> None:
        self.link.listeners.discard(self)
        if self.link.network.listeners.get(self.port) is self:
            del self.link.network.listeners[self.port]

    def accept(self, near: MemoryConnection) -> None:
        """Take a connection, in the link's own turn."""
        if self not in self.link.listeners:
            near.flight.call(near.break_off, "refused")
        elif near.alive:
            far = MemoryConnection(self.link.flight, f"memory:{id(near):x}", near)
            near.flight.call(near.connect, far)
            self.link.ready.append(partial(self.link.hand_over, far, far.peer, self.on_endpoint))


class MemoryLink(Link):
    """A `Link` whose peers are the links of the same network, itself among them."""

    flight: MemoryFlight
    root = PeerLostError

    def __init__(self, network: MemoryNetwork, timers: Timers) -> None:
        self.network = network
        self.flight = self.worker = flight = MemoryFlight(network.faults)
        super().__init__(timers, flight, MemoryArray, flight.wakeup.fileno())

    def connect(self, host: str, port: int, events: EndpointEvents) -> Endpoint:
        """See `Link.connect`; the host is only a name."""
        self.check_usable()
        near, faults = MemoryConnection(self.flight, f"{host}:{port}"), self.network.faults
        listener = self.network.listeners.get(port)
        if not faults.hang_connect:
            if listener is not None and not faults.refuse:
                listener.link.flight.call(listener.accept, near)
            if listener is None or faults.refuse or listener.link.closed:  # it may have been closed meanwhile
                self.flight.call(near.break_off, "refused")
        return Endpoint(self, near, near.peer, events=events)

    def why_failed(self, exc: PeerLostError, *_: object, **__: object) -> PeerLostError:
        return exc.with_traceback(None)

    def listen(self, port: int, on_endpoint: OnEndpoint) -> MemoryListener:
        self.check_usable()
        used = self.network.listeners
        chosen = port or next(number for number in self.network.free_ports if number not in used)
        listener = MemoryListener(self, chosen, on_endpoint)
        if used.setdefault(chosen, listener) is not listener:
            raise ConfigError("port is in use; choose another, or 0 for any free one", port=chosen)
        self.listeners.add(listener)
        return listener

    def transports(self) -> tuple[str, ...]:
        """Always `("memory",)`."""
        return ("memory",)

    def release(self) -> None:
        while self.flight.run_inbox():  # who has connected meanwhile is refused
            pass
