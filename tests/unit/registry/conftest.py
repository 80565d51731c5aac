"""A store of the test's own: a file in its folder, reached through something that can fail on purpose."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.store_in_front import StoreInFront
from ucxx_transport.registry import Store
from ucxx_transport.registry.local import LocalStore


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """The store as everybody else sees it. Its leases end by being revoked alone: no time passes for them."""
    with LocalStore(tmp_path / "store.db", clock=lambda: 0.0) as opened:
        yield opened


@pytest.fixture
def front(tmp_path: Path, store: Store) -> Iterator[StoreInFront]:
    """Another user's way to it."""
    store.identity()
    with StoreInFront(LocalStore(tmp_path / "store.db", clock=lambda: 0.0)) as opened:
        yield opened
