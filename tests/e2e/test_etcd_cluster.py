"""A cluster of three etcds that loses a member, loses one to the network, and loses most: real processes."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Self

import pytest

from tests.support.etcd_server import EtcdCluster
from tests.support.fake_source import FakeSource
from tests.support.namespaces import hosts_beside_this_one
from tests.support.waiting import wait_until
from ucxx_transport import HeartbeatPublisher, PublisherConfig, SourceWatcher
from ucxx_transport.config import StoreConfig
from ucxx_transport.errors import StoreUnavailableError
from ucxx_transport.membership import SourceRecord, open_store

MINUTE = 60
OFTEN = PublisherConfig(interval_s=1.5, backoff_s=0.05, max_backoff_s=0.5, keeper="thread")
SETTINGS = StoreConfig(timeout_s=2.0)

pytestmark = pytest.mark.usefixtures("etcd_binary")


class News:
    """What a trainer's watcher has heard of a cluster."""

    def __init__(self, url: str) -> None:
        self._lock = threading.Lock()
        self._heard: list[tuple[str, str, int]] = []
        self._store = open_store(url, SETTINGS)
        self.watcher = SourceWatcher(
            self._store,
            on_add=lambda record: self._note("add", record),
            on_remove=lambda record: self._note("remove", record),
        )

    def _note(self, kind: str, record: SourceRecord) -> None:
        with self._lock:
            self._heard.append((kind, record.worker_id, record.epoch))

    def __contains__(self, change: tuple[str, str, int]) -> bool:
        with self._lock:
            return change in self._heard

    @property
    def changes(self) -> list[tuple[str, str, int]]:
        with self._lock:
            return list(self._heard)

    def __enter__(self) -> Self:
        self.watcher.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self.watcher.stop()
        self._store.close()


@contextmanager
def worker(cluster: EtcdCluster, worker_id: str) -> Iterator[HeartbeatPublisher]:
    with HeartbeatPublisher(cluster.url, worker_id, FakeSource(), OFTEN, store_config=SETTINGS) as publisher:
        publisher.wait_published(MINUTE)
        yield publisher


def outlive_the_lease() -> None:
    """Wait until a lease that is not renewed has run out: etcd counts in real time."""
    until_s = time.monotonic() + 1.5 * OFTEN.ttl_s
    wait_until(lambda: time.monotonic() > until_s, MINUTE, what="the lease would have run out")


def test_a_killed_leader_costs_no_lease_and_no_news(tmp_path: Path) -> None:
    with EtcdCluster(tmp_path) as cluster, News(cluster.url) as news, worker(cluster, "early") as early:
        wait_until(lambda: ("add", "early", 1) in news, MINUTE, what="the worker is seen")
        cluster.leader().kill()
        with worker(cluster, "late"):
            wait_until(lambda: ("add", "late", 1) in news, MINUTE, what="a worker that came meanwhile is seen")
            outlive_the_lease()
        wait_until(lambda: ("remove", "late", 1) in news, MINUTE, what="its end is seen")
        assert (early.epoch, early.statistics().losses) == (1, 0)
        assert news.changes == [("add", "early", 1), ("add", "late", 1), ("remove", "late", 1)]


def test_a_member_that_is_cut_off_from_the_others_keeps_no_client(tmp_path: Path) -> None:
    with ExitStack() as stack:
        hosts = stack.enter_context(hosts_beside_this_one(3))
        cluster = stack.enter_context(EtcdCluster(tmp_path, hosts))
        news = stack.enter_context(News(cluster.url))
        early = stack.enter_context(worker(cluster, "early"))
        wait_until(lambda: ("add", "early", 1) in news, MINUTE, what="the worker is seen")
        hosts[0].cut_off(hosts[1:])  # the member that all of them ask first: it answers them, and knows nothing new
        outlive_the_lease()
        with worker(cluster, "late"):
            wait_until(lambda: ("add", "late", 1) in news, MINUTE, what="a worker that came meanwhile is seen")
        wait_until(lambda: ("remove", "late", 1) in news, MINUTE, what="its end is seen")
        hosts[0].heal()
        outlive_the_lease()
        assert (early.epoch, early.statistics().losses) == (1, 0)
        assert news.changes == [("add", "early", 1), ("add", "late", 1), ("remove", "late", 1)]


@pytest.mark.exhaustive
def test_without_most_members_calls_fail_in_time_and_what_was_known_stays(tmp_path: Path) -> None:
    with EtcdCluster(tmp_path) as cluster, News(cluster.url) as news, worker(cluster, "w") as publisher:
        wait_until(lambda: ("add", "w", 1) in news, MINUTE, what="the worker is seen")
        lost = [member for member in cluster.members if not member.leads]
        for member in lost:
            member.kill()
        store = open_store(cluster.url, SETTINGS)
        with store, pytest.raises(StoreUnavailableError):
            store.put("x", b"")
        outlive_the_lease()
        assert publisher.statistics().outages == 1
        assert news.changes == [("add", "w", 1)]
        lost[0].launch()
        lost[0].wait_until_it_serves()
        outlive_the_lease()
        assert news.changes == [("add", "w", 1)]
        assert (publisher.epoch, publisher.statistics().losses) == (1, 0)
