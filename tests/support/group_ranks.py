"""Ranks of one group, each with its own connection to one store in memory."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, TypeVar

import pytest

from tests.support.memory_store import MemoryData, MemoryStore
from ucxx_transport.config import PublisherConfig
from ucxx_transport.groups.group import RankGroup
from ucxx_transport.groups.member_record import MemberRecord

__all__ = ["Ranks", "ranks"]

T = TypeVar("T")

CONFIG = PublisherConfig(keeper="thread", backoff_s=0.01, max_backoff_s=0.05, stop_timeout_s=2.0)
"""Leases as they are by default: no test's load ends one."""

SHORT_LIVED = replace(CONFIG, interval_s=0.4)
"""For tests in which a lease must end by itself, or be seen to outlive its time."""


class Ranks:
    """Ranks of one group, each with its own way to one store; all leave at the end."""

    def __init__(self) -> None:
        self.data = MemoryData()
        self.admin = MemoryStore(self.data)
        self.groups: list[RankGroup] = []
        self.stores: dict[RankGroup, MemoryStore] = {}
        self.threads: list[threading.Thread] = []

    def make(self, rank: int, *, short_lived: bool = False, **settings: Any) -> RankGroup:
        """A rank that has not joined."""
        store = self.admin.beside()
        group = RankGroup(store, "trainers", rank, **{"config": SHORT_LIVED if short_lived else CONFIG, **settings})
        self.groups.append(group)
        self.stores[group] = store
        return group

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
            thread.join(10)


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    ranks = Ranks()
    yield ranks
    ranks.close()
