"""A store of each kind, reached through what can fail on purpose."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.group_ranks import ranks
from tests.support.record_history import History
from tests.support.store_fixtures import etcd_binary, fork_server, own_etcd, own_rig, rig
from tests.support.store_in_front import StoreInFront
from tests.support.store_rigs import LocalRig, StoreRig
from ucxx_transport.config import StoreConfig
from ucxx_transport.membership import Store
from ucxx_transport.membership.local import LocalStore

__all__ = ["etcd_binary", "fork_server", "own_etcd", "own_rig", "ranks", "rig"]


def opened(rig: StoreRig) -> Store:
    """One user's way to a store. In a file leases end by being revoked alone: no time passes for them."""
    if not isinstance(rig, LocalRig):
        return rig.open()
    settings: dict[str, Any] = rig.settings
    return rig.stack.enter_context(LocalStore(rig.path, StoreConfig(**settings), clock=lambda: 0.0))


@pytest.fixture
def store(rig: StoreRig) -> Store:
    """The store as everybody else sees it."""
    return opened(rig)


@pytest.fixture
def front(rig: StoreRig, store: Store) -> Iterator[StoreInFront]:
    """Another user's way to it."""
    store.identity()
    with StoreInFront(opened(rig)) as in_front:
        yield in_front


@pytest.fixture
def history(store: Store) -> Iterator[History]:
    store.identity()
    found = History(store)
    yield found
    found.close()
