"""Every link and every store under one roof: each kind of them, ready for use."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest

from tests.support.etcd_server import EtcdServer
from tests.support.store_fixtures import etcd_binary, etcd_server, fork_server
from tests.support.store_rigs import EtcdRig, LocalRig, MemoryRig, StoreRig
from ucxx_transport.errors import TransportError
from ucxx_transport.link.endpoint import Endpoint, Listener
from ucxx_transport.link.reactor import LinkFactory, Reactor
from ucxx_transport.link.ucx import UCXXLink
from ucxx_transport.testing import MemoryNetwork

__all__ = ["etcd_binary", "etcd_server", "fork_server", "rig", "shared_rig", "sides"]

HOST = "127.0.0.1"
DEADLINE_S = 20.0


@dataclass(kw_only=True)
class Owner:
    """What the owner of an endpoint has heard: the error it was lost with."""

    heard: list[TransportError] = field(default_factory=list)

    @property
    def error(self) -> TransportError | None:
        """What the endpoint was lost with."""
        return next(iter(self.heard), None)

    def lost(self, error: TransportError) -> None:
        self.heard.append(error)


@dataclass(frozen=True)
class Pair:
    """A connection: the client's end and the server's, and their owners."""

    near: Endpoint
    far: Endpoint
    near_owner: Owner
    far_owner: Owner


@dataclass(kw_only=True)
class Sides:
    """Two links of one kind that can reach each other, in one thread.

    Attributes:
        server: has `listener`. client: connects to it.
        accepted: endpoints that the listener handed over, in order, with their owners.
    """

    server: Reactor
    client: Reactor
    kind: str
    listener: Listener | None = None
    accepted: list[tuple[Endpoint, Owner]] = field(default_factory=list)

    @property
    def port(self) -> int:
        """The listener's."""
        return self.listen().port

    def listen(self) -> Listener:
        """The server's listener."""
        if self.listener is None:
            self.listener = self.server.link.listen(0, self.accept)
        return self.listener

    def accept(self, endpoint: Endpoint) -> Owner:
        """Own a connection."""
        owner = Owner()
        self.accepted.append((endpoint, owner))
        return owner

    def turn(self) -> None:
        """Both sides have a turn."""
        for side in (self.server, self.client):
            if not side.closed:
                side.poll()

    def until(self, condition: Callable[[], object], what: str = "the condition") -> None:
        """The condition has become true."""
        end = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < end, f"not in time: {what}"
            self.turn()

    def connect(self) -> Pair:
        """A connection that is up at both ends."""
        port = self.port
        known = len(self.accepted)
        owner = Owner()
        near = self.client.link.connect(HOST, port, owner)
        self.until(lambda: len(self.accepted) > known, "accepted")
        far, far_owner = self.accepted[-1]
        self.until(lambda: near.handle and far.handle, "connected")
        return Pair(near, far, owner, far_owner)


@pytest.fixture(params=["memory", "ucx-tcp", "ucx-shm"])
def sides(request: pytest.FixtureRequest) -> Iterator[Sides]:
    """Both sides of one kind of link; closed at the end."""
    kind: str = request.param
    factory: LinkFactory = MemoryNetwork().link
    if kind != "memory":
        factory = partial(UCXXLink, shm_lanes=kind == "ucx-shm")
    with closing(Reactor(factory)) as server, closing(Reactor(factory)) as client:
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
