"""Every link and every store under one roof: each kind of them, ready for use."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

import anyio
import anyio.lowlevel
import pytest

from tests.support.store_fixtures import etcd_binary, fork_server, own_etcd, own_rig, rig, shared_server
from ucxx_transport.link.base import Endpoint, Link, Listener
from ucxx_transport.link.ucxx import UCXXLink
from ucxx_transport.testing import MemoryLink, MemoryNetwork

__all__ = ["etcd_binary", "fork_server", "own_etcd", "own_rig", "rig", "shared_server", "sides"]

HOST = "127.0.0.1"


@dataclass(kw_only=True)
class Sides:
    """Two links of one kind that can reach each other, in one event loop.

    Attributes:
        server: has `listener`. client: connects to it.
        accepted: endpoints that the listener handed over, in order.
    """

    server: Link
    client: Link
    kind: str
    listener: Listener | None = None
    accepted: list[Endpoint] = field(default_factory=list)

    @property
    def port(self) -> int:
        """The listener's."""
        assert self.listener is not None
        return self.listener.port

    async def connect(self) -> tuple[Endpoint, Endpoint]:
        """A connection: the client's end and the server's."""
        if self.listener is None:
            self.listener = await self.server.listen(0, self.accepted.append)
        known = len(self.accepted)
        near = await self.client.connect(HOST, self.port)
        end = anyio.current_time() + 10
        while len(self.accepted) == known:
            assert anyio.current_time() < end, "connected, but not accepted"
            await anyio.lowlevel.checkpoint()
        return near, self.accepted[-1]


@pytest.fixture(params=["memory", "ucx-tcp", "ucx-shm"])
async def sides(request: pytest.FixtureRequest) -> AsyncIterator[Sides]:
    """Both sides of one kind of link; closed at the end."""
    kind: str = request.param
    async with AsyncExitStack() as stack:
        server: Link
        client: Link
        if kind == "memory":
            network = MemoryNetwork()
            server = await stack.enter_async_context(MemoryLink(network))
            client = await stack.enter_async_context(MemoryLink(network))
        else:
            shm_lanes = kind == "ucx-shm"
            server = await stack.enter_async_context(UCXXLink.open(shm_lanes=shm_lanes, spin_s=0.0))
            client = await stack.enter_async_context(UCXXLink.open(shm_lanes=shm_lanes, spin_s=0.0))
        yield Sides(server=server, client=client, kind=kind)
