"""Fixtures of stores, for the conftests that need them: `own_rig`, `rig`, and what these need."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.etcd_server import EtcdServer, find_etcd
from tests.support.store_processes import start_server
from tests.support.store_rigs import EtcdRig, LocalRig, StoreRig

__all__ = ["etcd_binary", "fork_server", "own_etcd", "own_rig", "rig", "shared_server"]

STORES = ["local", "etcd"]
NO_ETCD = "no etcd to run: install one (Debian, Ubuntu: etcd-server), or let scripts/test fetch it"


@pytest.fixture(scope="session", autouse=True)
def fork_server() -> None:
    """The server that forks other users of a store, there before the first test that would be blamed for it."""
    start_server()


@pytest.fixture(scope="session")
def etcd_binary() -> None:
    """There is an etcd, and the library to reach it."""
    pytest.importorskip("httpx", reason="httpx is not installed: pip install 'ucxx_transport[etcd]'")
    if find_etcd() is None:
        pytest.skip(NO_ETCD)


@pytest.fixture(scope="session", params=STORES)
def shared_server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[EtcdServer | None]:
    """Of each kind of store the server that all tests share that do it no harm; a file needs none."""
    if request.param == "local":
        yield None
        return
    request.getfixturevalue("etcd_binary")
    with EtcdServer(tmp_path_factory.mktemp("etcd")) as server:
        yield server


@pytest.fixture
def own_etcd(etcd_binary: None, tmp_path: Path) -> Iterator[EtcdServer]:  # noqa: ARG001 - skips where no etcd is
    """A server for one test alone."""
    with EtcdServer(tmp_path) as server:
        yield server


@pytest.fixture
def rig(shared_server: EtcdServer | None, tmp_path: Path) -> Iterator[StoreRig]:
    """A store of one kind. Nothing may be done to it that others would notice: its server is shared."""
    rig = LocalRig(tmp_path) if shared_server is None else EtcdRig(shared_server)
    with rig.stack:
        yield rig


@pytest.fixture(params=STORES)
def own_rig(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[StoreRig]:
    """A store of one kind for one test alone, which may wipe, stall and restart it."""
    rig = LocalRig(tmp_path) if request.param == "local" else EtcdRig(request.getfixturevalue("own_etcd"))
    with rig.stack:
        yield rig
