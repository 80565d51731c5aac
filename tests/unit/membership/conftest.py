"""A store in memory, and another user's connection to it that fails on purpose."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.group_ranks import ranks
from tests.support.memory_store import MemoryData, MemoryStore
from tests.support.record_history import History
from tests.support.store_fixtures import fork_server
from tests.support.store_in_front import StoreInFront

__all__ = ["fork_server", "ranks"]


@pytest.fixture
def data() -> MemoryData:
    """What the store keeps. Leases end by being revoked alone: no time passes for them."""
    return MemoryData(clock=lambda: 0.0)


@pytest.fixture
def store(data: MemoryData) -> MemoryStore:
    """The store as everybody else sees it."""
    return MemoryStore(data)


@pytest.fixture
def front(data: MemoryData) -> Iterator[StoreInFront]:
    """Another user's connection to it."""
    with StoreInFront(MemoryStore(data)) as in_front:
        yield in_front


@pytest.fixture
def history(store: MemoryStore) -> Iterator[History]:
    found = History(store)
    yield found
    found.close()
