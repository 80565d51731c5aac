"""Ranks of one group, each with its own connection to one store in memory."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

import pytest

from tests.support.memory_store import MemoryData, MemoryStore
from ucxx_transport.config import PublisherConfig
from ucxx_transport.groups import RankGroup
from ucxx_transport.groups.view import MemberRecord

__all__ = ["Ranks", "ranks"]

T = TypeVar("T")

CONFIG = PublisherConfig(keeper="thread", backoff_s=0.01, max_backoff_s=0.05, stop_timeout_s=2.0)
"""Leases as they are by default: no test's load ends one."""

HURRY = 50.0
"""How much faster time passes for a hurried rank: it waits out a lease in a fraction of a second."""


def hurried_clock() -> float:
    """Seconds that pass `HURRY` times as fast."""
    return HURRY * time.monotonic()


class Ranks:
    """Ranks of one group, each with its own way to one store; all leave at the end."""

    def __init__(self) -> None:
        self.data = MemoryData()
        self.admin = MemoryStore(self.data)
        self.groups: list[RankGroup] = []
        self.stores: dict[RankGroup, MemoryStore] = {}
        self.threads: list[threading.Thread] = []

    def make(self, rank: int, **settings: Any) -> RankGroup:
        """A rank that has not joined."""
        store = self.admin.beside()
        group = RankGroup(store, "trainers", rank, **{"config": CONFIG, **settings})
        self.groups.append(group)
        self.stores[group] = store
        return group

    def hurried(self, rank: int) -> RankGroup:
        """A rank that has not joined, and whose seconds are short: `join_group(100)` takes at most two."""
        return self.make(rank, clock=hurried_clock, ack_timeout_s=1e6)

    def joined(self, *ranks: int, **settings: Any) -> list[RankGroup]:
        """Ranks that have joined, one after the other."""
        groups = [self.make(rank, **settings) for rank in ranks]
        for group in groups:
            group.join_group(10)
        return groups

    def in_thread(self, call: Callable[[], T]) -> Future[T]:
        """Call it in a thread."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(call())
            except Exception as error:  # noqa: BLE001 - the test asks for it
                future.set_exception(error)

        thread = threading.Thread(target=run)
        self.threads.append(thread)
        thread.start()
        return future

    def lease_of(self, group: RankGroup) -> int:
        """The lease that keeps a rank's key."""
        lease_id = self.data.entries[f"groups/trainers/members/{group.rank}"].lease_id
        assert lease_id is not None
        return lease_id

    def record_of(self, group: RankGroup) -> MemberRecord:
        """What a rank has published."""
        return MemberRecord.from_bytes(self.data.entries[f"groups/trainers/members/{group.rank}"].value)

    def close(self) -> None:
        for group in self.groups:
            self.stores[group].reachable = True
            with contextlib.suppress(Exception):
                group.leave()
        for thread in self.threads:
            thread.join(60)


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    ranks = Ranks()
    yield ranks
    ranks.close()
