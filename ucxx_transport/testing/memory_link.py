"""MemoryNetwork and MemoryLink: a link inside one process, for tests of programs that transport payloads.

It behaves as the UCX link does where callers can see it: small sends complete at once and larger ones when received, a
shorter message is a silent success, a longer one fails the receive alone, a closed end resets the other one. `Faults`
makes it misbehave on purpose.

Links of one network reach each other whatever threads run them: what one end does to the other lies in the inbox of the
other's link until that progresses. What a link has to call back waits in the same inbox.
"""

from __future__ import annotations

import itertools
import time
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from ucxx_transport.errors import ConfigError, TransportError
from ucxx_transport.link import base
from ucxx_transport.link.reactor import Reactor
from ucxx_transport.machine import Wakeup
from ucxx_transport.testing.faults import Faults, Hold

EAGER_BYTES = 8191
"""Sends up to this size complete before they are received (measured of UCX over TCP with its default settings)."""

CLOSING_ROUNDS = 10_000
"""How often `close` empties the inbox, which its own callbacks may fill."""


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

    def link(self, _reactor: Reactor) -> MemoryLink:
        """A link of this network: `link_factory=network.link` for a server, a client or a reactor."""
        return MemoryLink(self)


@dataclass(slots=True, eq=False)
class MemoryOperation:
    """One operation of a `MemoryEndpoint`. See `base.Operation`."""

    view: memoryview | None
    nbytes: int
    on_done: base.OnDone | None
    channel: int
    sending: bool
    immortal: bool = False
    completed: bool = False
    error: TransportError | None = None

    def call_back(self) -> None:
        """Call `on_done`, once."""
        on_done, self.on_done = self.on_done, None
        if on_done is not None:
            on_done(self)


class MemoryEndpoint:
    """One end of a connection; `other` is the end its messages go to, once connected. See `base.Endpoint`.

    What is no part of that Protocol runs in a turn of its own link.
    """

    def __init__(self, link: MemoryLink, peer: str, other: MemoryEndpoint | None = None) -> None:
        self.link = link
        self.peer = peer
        self.other = other
        self.events: base.EndpointEvents | None = None
        self.alive = True
        self.channels = 1 << 16
        self.posted: dict[MemoryOperation, None] = {}
        self._outbox: deque[tuple[Hold | None, bytes, MemoryOperation]] = deque()
        self._arrived: defaultdict[int, deque[tuple[bytes, MemoryOperation]]] = defaultdict(deque)
        self._closed = False
        self._clean: bool | None = None
        self._on_closed: list[Callable[[bool], None]] = []
        link.endpoints.add(self)

    def post_receive(self, buffer: object, on_done: base.OnDone, *, channel: int = 0) -> MemoryOperation:
        operation = self._posted(base.byte_view(buffer, writable=True), on_done, channel, sending=False)
        operation.immortal = self.link.faults.never_complete
        if self._arrived[channel]:
            self.link.call(self._match, channel)
        return operation

    def post_send(self, buffer: object, *, channel: int = 0) -> MemoryOperation:
        operation = self._posted(base.byte_view(buffer, writable=False), None, channel, sending=True)
        if not self.alive:
            return operation
        assert operation.view is not None  # just made
        faults = self.link.faults
        if faults.breaks_connection():
            self._reset()
            return operation
        content = faults.apply(bytes(operation.view))
        if content is not None:
            self._outbox.append((faults.hold, content, operation))
        if content is None or (self.other is not None and operation.nbytes <= EAGER_BYTES):
            self._completed(operation)
        if faults.hold is None:
            self._deliver()
        else:
            faults.hold.when_set(lambda: self.link.call(self._deliver))
        return operation

    def close(self, on_closed: Callable[[bool], None] | None = None) -> None:
        if on_closed is not None:
            self._on_closed.append(on_closed)
        if not self._closed:
            self._closed = True
            self._stop()
            self._reset()
        self.link.call(self._finish_close)

    def listener_has_answered(self) -> bool:
        """Never: there is nothing between a listener and its endpoints."""
        return False

    def connected(self, other: MemoryEndpoint) -> None:
        """Both ends are there."""
        if not self.alive:
            other.link.call(other.lose, "reset")
            return
        self.other = other
        for operation in list(self.posted):
            if operation.sending and operation.nbytes <= EAGER_BYTES:
                self.end(operation)
        self._deliver()
        if self.events is not None:
            self.events.connected()

    def take(self, content: bytes, send: MemoryOperation) -> None:
        """A message of the other end has arrived."""
        if send.channel >= self.channels:
            self.link.counters.unexpected_messages += 1
            self._received(send)
        elif self.alive:
            self._arrived[send.channel].append((content, send))
            self._match(send.channel)

    def end(self, operation: MemoryOperation, error: TransportError | None = None) -> None:
        """End an operation, unless it has ended, and call back."""
        if not operation.completed:
            self._completed(operation, error)
            operation.call_back()

    def lose(self, reason: base.LostReason) -> None:
        """The other end is gone, or was never there."""
        if not self.alive:
            return
        self._stop()
        if self.events is not None:
            self.events.lost(base.lost(reason, peer=self.peer))
        self._end_all(reason)

    def _posted(self, view: memoryview, on_done: base.OnDone | None, channel: int, *, sending: bool) -> MemoryOperation:
        self.link.check_usable()
        if not (self.alive or self.link.closing):
            raise base.lost("closed" if self._closed else "reset", peer=self.peer)
        content = view.cast("B") if view.nbytes else memoryview(b"")
        operation = MemoryOperation(content, view.nbytes, on_done, channel, sending)
        self.posted[operation] = None
        if not self.alive:
            self.link.call(self.end, operation, base.lost("closed", peer=self.peer))
        return operation

    def _deliver(self) -> None:
        """Send what is not held back, nor behind such."""
        while self.other is not None and self._outbox and (self._outbox[0][0] is None or self._outbox[0][0].is_set()):
            _, content, operation = self._outbox.popleft()
            self.other.link.call(self.other.take, content, operation)

    def _match(self, channel: int) -> None:
        """Bring what has arrived and the receives posted for it together."""
        while arrived := self._arrived[channel]:
            posted = (one for one in self.posted if one.channel == channel and not one.sending)
            receive = next(posted, None)
            if receive is None or receive.immortal:
                return
            content, send = arrived.popleft()
            self._received(send)
            assert receive.view is not None  # in flight
            if len(content) > receive.nbytes:
                self.end(receive, base.lost("truncated", peer=self.peer))
            else:
                receive.view[: len(content)] = content
                self.end(receive)

    def _received(self, send: MemoryOperation) -> None:
        if self.other is not None:
            self.other.link.call(self.other.end, send)

    def _completed(self, operation: MemoryOperation, error: TransportError | None = None) -> None:
        operation.completed, operation.error, operation.view = True, error, None
        del self.posted[operation]

    def _end_all(self, reason: base.LostReason) -> None:
        for operation in list(self.posted):
            if operation.immortal:
                operation.error = base.lost(reason, peer=self.peer)
            else:
                self._completed(operation, base.lost(reason, peer=self.peer))
            self.link.call(operation.call_back)

    def _stop(self) -> None:
        self.alive = False
        self._outbox.clear()
        self.link.counters.unexpected_messages += sum(map(len, self._arrived.values()))
        self._arrived.clear()

    def _reset(self) -> None:
        """Both ends find their peer lost, if they are alive."""
        for end in (self, self.other):
            if end is not None:
                end.link.call(end.lose, "reset")

    def _finish_close(self) -> None:
        if self._clean is None:
            self._end_all("closed")
            self.link.counters.leaked_buffers += len(self.posted)
            self._clean = not self.posted
            self.link.endpoints.discard(self)
            self.link.call(self._finish_close)  # behind the callbacks
        elif self._on_closed:
            self.link.call(self._finish_close)
            self._on_closed.pop(0)(self._clean)


class MemoryListener:
    """One port of a `MemoryNetwork`. See `base.Listener`."""

    def __init__(self, link: MemoryLink, port: int, on_endpoint: base.OnEndpoint) -> None:
        self.link = link
        self.port = port
        self._on_endpoint = on_endpoint

    def close(self) -> None:
        if self.link.network.listeners.get(self.port) is self:
            del self.link.network.listeners[self.port]

    def accept(self, near: MemoryEndpoint) -> None:
        """Take the connection of `near`, in the link's own turn."""
        if self.link.closed or self.link.network.listeners.get(self.port) is not self:
            near.link.call(near.lose, "refused")
            return
        far = MemoryEndpoint(self.link, f"memory:{id(near):x}", near)
        near.link.call(near.connected, far)
        self.link.call(far.connected, near)
        try:
            far.events = self._on_endpoint(far)
        finally:
            if far.events is None:
                far.close()


class MemoryLink(base.Usable):
    """A `base.Link` whose peers are the links of the same network, itself among them."""

    def __init__(self, network: MemoryNetwork) -> None:
        super().__init__()
        self.network = network
        self.faults = network.faults
        self.counters = base.LinkCounters()
        self.endpoints: set[MemoryEndpoint] = set()
        self._inbox: deque[tuple[Callable[..., object], tuple[object, ...]]] = deque()
        self._wakeup = Wakeup()
        self._armed = False  # others notify only then

    def call(self, action: Callable[..., object], *arguments: object) -> None:
        """Call this in a turn of this link. From any thread."""
        self._inbox.append((action, arguments))
        if self._armed:
            self._wakeup.notify()

    def connect(self, host: str, port: int, events: base.EndpointEvents) -> MemoryEndpoint:
        """See `base.Link.connect`; the host is only a name."""
        self.check_usable()
        near = MemoryEndpoint(self, f"{host}:{base.checked_port(port, lowest=1)}")
        near.events = events
        listener = self.network.listeners.get(port)
        if self.faults.hang_connect:
            return near
        if listener is not None and not self.faults.refuse:
            listener.link.call(listener.accept, near)
        if listener is None or self.faults.refuse or listener.link.closed:  # it may have been closed meanwhile
            self.call(near.lose, "refused")
        return near

    def listen(self, port: int, on_endpoint: base.OnEndpoint) -> MemoryListener:
        self.check_usable()
        base.checked_port(port, lowest=0)
        used = self.network.listeners
        chosen = port or next(number for number in self.network.free_ports if number not in used)
        listener = MemoryListener(self, chosen, on_endpoint)
        if used.setdefault(chosen, listener) is not listener:
            raise ConfigError("port is in use; choose another, or 0 for any free one", port=chosen)
        return listener

    def message(self, buffer: object) -> memoryview:
        self.check_usable()
        return base.byte_view(buffer, writable=False)

    def progress(self, spin_s: float = 0.0) -> bool:
        self.check_usable()
        if self._armed:
            self._armed = False
            self._wakeup.drain()
        end = time.perf_counter() + spin_s
        while not self._inbox and time.perf_counter() < end:
            time.sleep(0)
        return self._take()

    def arm(self) -> bool:
        self._armed = True
        return not self._inbox

    def fileno(self) -> int:
        return self._wakeup.fileno()

    def transports(self) -> tuple[str, ...]:
        """Always `("memory",)`."""
        return ("memory",)

    def close(self) -> None:
        if self.closed or self.forked:
            return
        self.closing = True
        for listener in [one for one in tuple(self.network.listeners.values()) if one.link is self]:
            listener.close()
        for _ in range(CLOSING_ROUNDS):
            for endpoint in list(self.endpoints):
                endpoint.close()
            if not self._take():
                break
        self.closing, self.closed = False, True
        while self._take():  # who has connected meanwhile is refused
            pass

    def _take(self) -> bool:
        """Do what lies in the inbox now; whether there was anything."""
        count = len(self._inbox)
        for _ in range(count):
            action, arguments = self._inbox.popleft()
            action(*arguments)
        return count > 0
