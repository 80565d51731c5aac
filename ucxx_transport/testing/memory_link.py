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
from dataclasses import dataclass, field, replace

from ucxx_transport.errors import ConfigError
from ucxx_transport.link.base import EndpointEvents, LinkStatistics, OnEndpoint, byte_view, checked_port
from ucxx_transport.link.reactor import Reactor
from ucxx_transport.testing.memory_endpoint import Faults, LinkState, MemoryEndpoint

BURST = 256
"""What one `progress` takes out of the inbox."""

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

    def link(self, timers: Reactor) -> MemoryLink:
        """A link of this network: `link_factory=network.link` for a server, a client or a reactor."""
        return MemoryLink(timers, self)


class MemoryListener:
    """One port of a `MemoryNetwork`. See `base.Listener`."""

    def __init__(self, link: MemoryLink, port: int, on_endpoint: OnEndpoint) -> None:
        self.link = link
        self.port = port
        self._on_endpoint = on_endpoint

    def close(self) -> None:
        if self.link.network.listeners.get(self.port) is self:
            del self.link.network.listeners[self.port]

    def accept(self, near: MemoryEndpoint) -> None:
        """Take a connection, in the link's own turn.

        Args:
            near: the end of the one who connects.
        """
        if self.link.closed or self.link.network.listeners.get(self.port) is not self:
            near.link.call(near.lose, "refused")
            return
        far = MemoryEndpoint(self.link, f"memory:{id(near):x}", near)
        self.link.endpoints.add(far)
        near.link.call(near.connected, far)
        self.link.call(far.accepted)
        try:
            far.events = self._on_endpoint(far)
        finally:
            if far.events is None:
                far.close()


class MemoryLink(LinkState):
    """A `base.Link` whose peers are other links of the same network, and itself.

    Args:
        timers: of the reactor that drives it.
        network: shared with the links to talk to; a new one by default, on which the link can only reach itself.
    """

    def __init__(self, timers: Reactor, network: MemoryNetwork | None = None) -> None:
        self.timers = timers
        self.network = network if network is not None else MemoryNetwork()
        super().__init__(self.network.faults)
        self._listeners: list[MemoryListener] = []

    def connect(self, host: str, port: int, events: EndpointEvents) -> MemoryEndpoint:
        """See `base.Link.connect`; the host is only a name."""
        self.check_usable()
        near = MemoryEndpoint(self, f"{host}:{checked_port(port, lowest=1)}")
        near.events = events
        near.waits_for_ever = self.faults.hang_connect
        self.endpoints.add(near)
        listener = self.network.listeners.get(port)
        if near.waits_for_ever:
            pass
        elif listener is None or self.faults.refuse:
            self.call(near.lose, "refused")
        else:
            listener.link.call(listener.accept, near)
            if listener.link.closed:  # meanwhile, and it takes nothing any more
                self.call(near.lose, "refused")
        return near

    def listen(self, port: int, on_endpoint: OnEndpoint) -> MemoryListener:
        self.check_usable()
        checked_port(port, lowest=0)
        used = self.network.listeners
        chosen = port or next(number for number in self.network.free_ports if number not in used)
        listener = MemoryListener(self, chosen, on_endpoint)
        if used.setdefault(chosen, listener) is not listener:
            raise ConfigError("port is in use; choose another, or 0 for any free one", port=chosen)
        self._listeners.append(listener)
        return listener

    def message(self, buffer: object) -> memoryview:
        self.check_usable()
        return byte_view(buffer, writable=False)

    def progress(self, spin_s: float = 0.0) -> bool:
        self.check_usable()
        self.counters.turns += 1
        if self.armed:
            self.armed = False
            self.wakeup.drain()
        if not self.inbox and spin_s:
            end = time.perf_counter() + spin_s
            while not self.inbox and time.perf_counter() < end:
                time.sleep(0)
        return self._take()

    def arm(self) -> bool:
        self.armed = True
        if self.inbox:
            return False
        self.counters.sleeps += 1
        return True

    def fileno(self) -> int:
        return self.wakeup.fileno()

    def statistics(self) -> LinkStatistics:
        in_flight = sum(endpoint.in_flight for endpoint in self.endpoints)
        return replace(self.counters, endpoints_open=len(self.endpoints), in_flight=in_flight)

    def transports(self) -> tuple[str, ...]:
        """Always `("memory",)`."""
        return ("memory",)

    def close(self) -> None:
        if self.closed or self.forked:
            return
        self.closing = True
        for listener in self._listeners:
            listener.close()
        for _ in range(CLOSING_ROUNDS):
            for endpoint in list(self.endpoints):
                endpoint.close()
            if not self._take():
                break
        self.closing, self.closed = False, True
        while self.inbox:  # who connects meanwhile is refused, and who sends is reset
            action, arguments = self.inbox.popleft()
            if getattr(action, "__func__", None) is MemoryListener.accept:
                action(*arguments)

    def forget(self) -> None:
        self.forked = True

    def _take(self) -> bool:
        inbox = self.inbox
        moved = False
        for _ in range(min(len(inbox), BURST)):
            action, arguments = inbox.popleft()
            moved = True
            action(*arguments)
        return moved
