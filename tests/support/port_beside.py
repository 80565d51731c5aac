"""A ring and a port before it, in a thread beside the test, and clients of both kinds over the in-memory link."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from ucxx_transport.client import SyncUCXXClient, UCXXClient
from ucxx_transport.client.reads import Watcher
from ucxx_transport.config import ClientConfig, RingConfig, ServerConfig
from ucxx_transport.link.reactor import Reactor
from ucxx_transport.ring import SharedRingBuffer
from ucxx_transport.server.port import PortThread
from ucxx_transport.testing import Faults, MemoryLink, MemoryNetwork

__all__ = ["PortBeside", "port_beside"]


@dataclass
class PortBeside:
    """See the module; made by `port_beside`.

    Attributes:
        faults: of what the port sends. client_faults: of what clients send.
        links_opened: by clients.
    """

    ring: SharedRingBuffer
    faults: Faults = field(default_factory=Faults)
    client_faults: Faults = field(default_factory=Faults)
    links_opened: int = 0

    def __post_init__(self) -> None:
        self.network = MemoryNetwork(faults=self.faults)

    def link(self, reactor: Reactor) -> MemoryLink:
        """A client's."""
        self.links_opened += 1
        return MemoryLink(MemoryNetwork(faults=self.client_faults, listeners=self.network.listeners), reactor)

    def client(self, *, watcher: Watcher | None = None, **settings: object) -> SyncUCXXClient:
        """A blocking client that reads everything over the link, unless `settings` say otherwise."""
        return SyncUCXXClient(self._config(settings), watcher=watcher, link_factory=self.link)

    def async_client(self, **settings: object) -> UCXXClient:
        """The same, asyncio."""
        return UCXXClient(self._config(settings), link_factory=self.link)

    @staticmethod
    def _config(settings: dict[str, Any]) -> ClientConfig:
        return ClientConfig(**{"local": "off", **settings})


@contextmanager
def port_beside(*, slots: int = 16, slot_bytes: int = 64 << 10) -> Iterator[PortBeside]:
    """Raw slots, served at one port."""
    with SharedRingBuffer.create(RingConfig(slots=slots, slot_bytes=slot_bytes, prefault=False)) as ring:
        made = PortBeside(ring)
        port = PortThread(ring, ServerConfig(ports=[5001], mode="thread"), 0, 5001, made.network.link)
        try:
            port.start()
            port.up.result(30.0)
            ring.publish_address("10.0.0.1", (5001,))
            yield made
        finally:
            port.stop(time.monotonic() + 30.0)
