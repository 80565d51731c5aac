"""A link inside one process and one event loop, for tests and examples.

It behaves as the UCX link does where callers can tell: small sends complete at once and larger ones when received, a
shorter message is a silent success, a longer one fails the receive alone, a closed end resets the other one. `Faults`
makes it misbehave on purpose.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from ucxx_transport.errors import ConfigError, PeerLostError
from ucxx_transport.link.base import LinkStatistics, OnEndpoint, checked_port, hand_over
from ucxx_transport.link.translate import lost
from ucxx_transport.testing.faults import Faults
from ucxx_transport.testing.memory_endpoint import MemoryEndpoint, MemoryPending

__all__ = ["Faults", "MemoryLink", "MemoryListener", "MemoryNetwork"]


@dataclass(slots=True, kw_only=True)
class MemoryNetwork:
    """What several `MemoryLink`s share: the ports in use, and the faults."""

    faults: Faults = field(default_factory=Faults)
    listeners: dict[int, MemoryListener] = field(default_factory=dict)
    free_ports: itertools.count[int] = field(default_factory=lambda: itertools.count(49152))


class MemoryListener:
    """One port of a `MemoryNetwork`."""

    def __init__(self, link: MemoryLink, port: int, on_endpoint: OnEndpoint) -> None:
        self.link = link
        self.port = port
        self.on_endpoint = on_endpoint

    async def close(self) -> None:
        """See `base.Listener.close`."""
        if self.link.network.listeners.get(self.port) is self:
            del self.link.network.listeners[self.port]


class MemoryLink:
    """A `Link` whose peers are other links of the same network, event loop and process.

    Args:
        network: shared with the links to talk to; a new one by default, on which the link can only reach itself.
    """

    def __init__(self, network: MemoryNetwork | None = None) -> None:
        self.network = network if network is not None else MemoryNetwork()
        self.closed = False
        self._thread = threading.get_ident()
        self._counts: dict[str, int] = {}
        self._endpoints: set[MemoryEndpoint] = set()
        self._listeners: list[MemoryListener] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def connect(self, host: str, port: int) -> MemoryEndpoint:
        """See `base.Link.connect`; the host is only a name."""
        self.check_owner()
        peer = f"{host}:{checked_port(port, lowest=1)}"
        if self.network.faults.hang_connect:
            await asyncio.get_running_loop().create_future()
        listener = self.network.listeners.get(port)
        if listener is None or self.network.faults.refuse:
            raise lost("refused", peer=peer)
        here = self.adopt(MemoryEndpoint(self, peer), "endpoints_connected")
        there = listener.link.adopt(MemoryEndpoint(listener.link, f"memory:{id(here):x}"), "endpoints_accepted")
        here.other, there.other = there, here
        failed = hand_over(there, listener.on_endpoint, asyncio.get_running_loop())
        if failed is not None:
            await failed
        return here

    async def listen(self, port: int, on_endpoint: OnEndpoint) -> MemoryListener:
        """See `base.Link.listen`."""
        self.check_owner()
        checked_port(port, lowest=0)
        used = self.network.listeners
        chosen = port or next(number for number in self.network.free_ports if number not in used)
        if chosen in used:
            raise ConfigError("port is in use; choose another, or 0 for any free one", port=chosen)
        used[chosen] = listener = MemoryListener(self, chosen, on_endpoint)
        self._listeners.append(listener)
        return listener

    def statistics(self) -> LinkStatistics:
        """See `base.Link.statistics`."""
        return LinkStatistics(endpoints_open=len(self._endpoints), **self._counts)

    def transports(self) -> tuple[str, ...]:
        """Always `("memory",)`."""
        return ("memory",)

    async def aclose(self) -> None:
        """See `base.Link.aclose`."""
        self.closed = True
        for listener in self._listeners:
            await listener.close()
        for endpoint in list(self._endpoints):
            await endpoint.close()

    def check_owner(self) -> None:
        """Refuse another thread, and a closed link."""
        if threading.get_ident() != self._thread:
            raise ConfigError("this link belongs to another thread; open one per event loop")
        if self.closed:
            raise ConfigError("this link is closed; open another")

    def count(self, **steps: int) -> None:
        """Add to counters of `LinkStatistics`, by name."""
        for name, step in steps.items():
            self._counts[name] = self._counts.get(name, 0) + step

    def count_end(self, pending: MemoryPending, error: PeerLostError | None) -> None:
        """Count the end of an operation."""
        if error is None:
            self.count(**{"sent_bytes" if pending.sending else "posted_receive_bytes": pending.nbytes})
        else:
            self.count(failed=1, truncated=int(error.facts["reason"] == "truncated"))
        self.count(in_flight=-1)

    def forget(self, endpoint: MemoryEndpoint) -> None:
        """Drop a closed endpoint."""
        self._endpoints.discard(endpoint)

    def adopt(self, endpoint: MemoryEndpoint, counter: str) -> MemoryEndpoint:
        """Count an endpoint among the open ones."""
        self._endpoints.add(endpoint)
        self.count(**{counter: 1})
        return endpoint
