"""A ring, its server ports and clients in one event loop, over the in-memory link, under a clock of the test's own.

Each port, and the client side, has its own `Faults`: what one side sends misbehaves without touching the other.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from ucxx_transport.client import UCXXClient
from ucxx_transport.client.membership import Watcher
from ucxx_transport.config import ClientConfig, RingConfig, ServerConfig
from ucxx_transport.link.base import Endpoint
from ucxx_transport.ring import SharedRingBuffer
from ucxx_transport.schema import SlotRef
from ucxx_transport.server.counters import Binding, PortCounters, PortStatistics
from ucxx_transport.server.port_server import PortServer
from ucxx_transport.server.session import SessionSource
from ucxx_transport.testing import Faults, MemoryLink, MemoryNetwork
from ucxx_transport.testing.memory_link import MemoryListener

__all__ = ["HOST", "ExchangeRig", "open_rig"]

HOST = "10.0.0.1"
MANY_PORTS = 840  # divisible by any number of ports up to 8


@dataclass(slots=True, kw_only=True)
class _Port:
    stop: asyncio.Event
    task: asyncio.Task[None]
    faults: Faults


@dataclass(kw_only=True)
class ExchangeRig:
    """See the module; made by `open_rig`.

    Attributes:
        ring: the ring that is served. server_config: of every port.
        faults: of what clients send. opened_links: links that clients have opened, in order.
    """

    ring: SharedRingBuffer
    server_config: ServerConfig
    faults: Faults = field(default_factory=Faults)
    opened_links: list[MemoryLink] = field(default_factory=list)
    _listeners: dict[int, MemoryListener] = field(default_factory=dict)
    _ports: dict[int, _Port] = field(default_factory=dict)
    _clients: list[UCXXClient] = field(default_factory=list)

    def client(self, *, watcher: Watcher | None = None, **settings: object) -> UCXXClient:
        """A client that reads everything over the link, its first read from the first port; closed with the rig."""
        values: Mapping[str, object] = {"local": "off", **settings}
        client = UCXXClient(ClientConfig(**values), watcher=watcher, link_factory=self.client_link)  # type: ignore[arg-type]  # checked at run time
        client._core.reader = MANY_PORTS * (1 + len(self._clients))  # noqa: SLF001 - otherwise random, as is the first port
        self._clients.append(client)
        return client

    def client_link(self) -> MemoryLink:
        """A link of the client side."""
        link = MemoryLink(MemoryNetwork(faults=self.faults, listeners=self._listeners))
        self.opened_links.append(link)
        return link

    async def start_port(self, port: int) -> None:
        """Serve the ring on `port`."""
        faults, up, stop = Faults(), asyncio.Event(), asyncio.Event()
        task = asyncio.get_running_loop().create_task(self._serve(port, faults, up, stop))
        self._ports[port] = _Port(stop=stop, task=task, faults=faults)
        await up.wait()

    async def stop_port(self, port: int) -> None:
        """End the server of `port` and every connection to it, as a death of its process does."""
        ended = self._ports.pop(port)
        ended.stop.set()
        await ended.task

    async def impostor(self, port: int, on_endpoint: Callable[[Endpoint], None]) -> None:
        """Something else listens on `port`: every connection to it is handed to `on_endpoint`."""
        await MemoryLink(MemoryNetwork(listeners=self._listeners)).listen(port, on_endpoint)

    def fail_accepts(self, port: int, count: int) -> None:
        """So many clients go away while the link of `port` takes them."""
        self._listeners[port].link.count(accepts_failed=count)

    def publish(self, *ports: int) -> None:
        """References written from now on name these ports; default all that serve."""
        self.ring.publish_address(HOST, ports or tuple(self._ports))

    def write(self, content: bytes) -> SlotRef:
        """A payload of a raw ring."""
        return self.ring.write_raw(content)

    def faults_of(self, port: int) -> Faults:
        """What happens to messages that this server port sends."""
        return self._ports[port].faults

    def statistics(self, port: int) -> PortStatistics:
        """The counts of one port; the ports are numbered from 1."""
        return PortCounters(self.ring.server_words, port - 1).snapshot()

    def requests(self) -> int:
        """READ frames that all ports have seen."""
        return sum(PortCounters(self.ring.server_words, index).snapshot().requests for index in range(8))

    async def _serve(self, port: int, faults: Faults, up: asyncio.Event, stop: asyncio.Event) -> None:
        ring, config = self.ring, self.server_config
        source = SessionSource(
            ring_id=ring.ring_id, fingerprint=ring.fingerprint, schema_bytes=ring.schema_bytes, token=config.token_bytes
        )
        server = PortServer(
            ring,
            source,
            config,
            PortCounters(ring.server_words, port - 1),
            Binding(ring.server_words),
            clock=asyncio.get_running_loop().time,
        )
        network = MemoryNetwork(faults=faults, listeners=self._listeners)
        async with MemoryLink(network) as link, server.listening(link, [port]):
            up.set()
            await stop.wait()

    async def close(self) -> None:
        """Clients first, then the ports."""
        self.faults.hold = None
        for client in self._clients:
            await client.aclose()
        for port in list(self._ports):
            await self.stop_port(port)


@asynccontextmanager
async def open_rig(
    *, ports: int = 2, ring: RingConfig | None = None, server: ServerConfig | None = None
) -> AsyncIterator[ExchangeRig]:
    """A rig whose ports 1 to `ports` serve and are published; closed at the end, whatever happened."""
    config = ring or RingConfig(slots=4, slot_bytes=64 << 10, prefault=False)
    with SharedRingBuffer.create(config) as made:
        rig = ExchangeRig(ring=made, server_config=server or ServerConfig(mode="thread"))
        try:
            for port in range(1, ports + 1):
                await rig.start_port(port)
            rig.publish()
            yield rig
        finally:
            await rig.close()
