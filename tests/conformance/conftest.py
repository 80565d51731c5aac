"""Every link and every store under one roof: each kind of them, ready for use."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

import anyio
import anyio.lowlevel
import pytest

from tests.support.etcd_server import EtcdServer
from tests.support.store_fixtures import etcd_binary, etcd_server, fork_server
from tests.support.store_rigs import EtcdRig, LocalRig, MemoryRig, StoreRig
from ucxx_transport.link.base import Endpoint, Link, Listener
from ucxx_transport.link.ucxx import UCXXLink
from ucxx_transport.testing import MemoryLink, MemoryNetwork

__all__ = ["etcd_binary", "etcd_server", "fork_server", "rig", "shared_rig", "sides"]

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


Kind = tuple[str, EtcdServer | None]
"""A kind of store, and the server of it."""


def kind_of(request: pytest.FixtureRequest) -> Kind:
    return request.param, request.getfixturevalue("etcd_server") if request.param == "etcd" else None


@pytest.fixture(scope="session", params=["memory", "local", "etcd"])
def kind(request: pytest.FixtureRequest) -> Kind:
    """Each kind of store. Its server is there before a test that could be blamed for it."""
    return kind_of(request)


@pytest.fixture(scope="session", params=["local", "etcd"])
def shared_kind(request: pytest.FixtureRequest) -> Kind:
    """Each kind that other processes can reach."""
    return kind_of(request)


def opened_rig(kind: Kind, folder: Path) -> StoreRig:
    name, server = kind
    if server is not None:
        return EtcdRig(server)
    return MemoryRig() if name == "memory" else LocalRig(folder)


@pytest.fixture
def rig(kind: Kind, tmp_path: Path) -> Iterator[StoreRig]:
    """A store of each kind."""
    rig = opened_rig(kind, tmp_path)
    with rig.stack:
        yield rig


@pytest.fixture
def shared_rig(shared_kind: Kind, tmp_path: Path) -> Iterator[StoreRig]:
    """A store of each kind that other processes can reach, and that can stall and be started again."""
    rig = opened_rig(shared_kind, tmp_path)
    with rig.stack:
        yield rig
