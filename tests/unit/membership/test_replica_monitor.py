from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, MutableMapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.memory_store import MemoryStore
from tests.support.source_records import record
from tests.support.waiting import wait_until
from ucxx_transport.groups import RankState
from ucxx_transport.membership import ReplicaMonitor, SourceWatcher
from ucxx_transport.membership.entries import source_key

if TYPE_CHECKING:
    from tests.support.group_ranks import Ranks


@dataclass(frozen=True)
class Source:
    worker_id: str


class Feed:
    """A feed that is driven by hand."""

    def __init__(self) -> None:
        self.subscribers = 0

    def subscribe(
        self, *, on_add: Callable[[Source], object], on_remove: Callable[[Source], object]
    ) -> Callable[[], None]:
        self.on_add, self.on_remove = on_add, on_remove
        self.subscribers += 1

        def end() -> None:
            self.subscribers -= 1

        return end

    def add(self, *names: str) -> None:
        for name in names:
            self.on_add(Source(name))

    def remove(self, *names: str) -> None:
        for name in names:
            self.on_remove(Source(name))


class Calls:
    """What a monitor has called back with, in order; "all" for all gone."""

    def __init__(self) -> None:
        self.words: list[Hashable] = []

    def monitor(self, feed: Any) -> ReplicaMonitor:
        return ReplicaMonitor(feed=feed, on_dead=self.words.append, on_all_gone=lambda: self.words.append("all"))


def test_nothing_fires_before_anybody_has_registered() -> None:
    calls = Calls()
    with MemoryStore() as store, SourceWatcher(store) as watcher, calls.monitor(watcher) as monitor:
        wait_until(lambda: watcher.statistics().synced, what="it knows that there is none")
        store.put(source_key("w0"), record("w0").to_bytes())
        wait_until(lambda: monitor.alive == {"w0"})
        assert calls.words == []


def test_each_death_is_reported_once_and_then_that_all_are_gone() -> None:
    feed, calls = Feed(), Calls()
    calls.monitor(feed)
    feed.add("a", "b")
    feed.remove("b")
    assert calls.words == ["b"]
    feed.remove("a")
    assert calls.words == ["b", "a", "all"]


def test_who_registers_again_can_die_again() -> None:
    feed, calls = Feed(), Calls()
    calls.monitor(feed)
    for _ in range(2):
        feed.add("a")
        feed.remove("a")
    assert calls.words == ["a", "all"] * 2


def test_callbacks_that_fail_stop_nothing(log_events: list[MutableMapping[str, Any]]) -> None:
    called: list[tuple[Hashable, ...]] = []

    def fails(*names: Hashable) -> None:
        called.append(names)
        raise ValueError(names)

    with MemoryStore() as store, SourceWatcher(store) as watcher:
        for worker in ("a", "b"):
            store.put(source_key(worker), record(worker).to_bytes())
        watcher.wait_for(2, 60)
        with ReplicaMonitor(feed=watcher, on_dead=fails, on_all_gone=fails):
            store.delete(source_key("a"))
            store.delete(source_key("b"))
            wait_until(lambda: len(log_events) == 2, what="both failures are logged, once they are counted")
            assert watcher.statistics().listener_errors == 2
    assert called == [("a",), ("b",), ()]
    assert [event["event"] for event in log_events] == ["listener_failed"] * 2


def test_a_callback_that_takes_its_time_is_called_one_at_a_time_and_delays_no_watcher() -> None:
    is_in, go_on = threading.Event(), threading.Event()
    calls: list[tuple[str, Hashable]] = []

    def slow(name: Hashable) -> None:
        calls.append(("begins", name))
        is_in.set()
        go_on.wait(30)
        calls.append(("ends", name))

    with MemoryStore() as store, SourceWatcher(store) as watcher, ReplicaMonitor(feed=watcher, on_dead=slow):
        for worker in ("w0", "w1"):
            store.put(source_key(worker), record(worker).to_bytes())
        watcher.wait_for(2, 10)
        store.delete(source_key("w0"))
        assert is_in.wait(10)
        store.delete(source_key("w1"))
        wait_until(lambda: not watcher.sources(), what="the watcher goes on")
        assert calls == [("begins", "w0")]
        go_on.set()
        wait_until(lambda: len(calls) == 4)
        assert calls == [("begins", "w0"), ("ends", "w0"), ("begins", "w1"), ("ends", "w1")]


def test_a_feed_is_followed_until_the_monitor_is_closed() -> None:
    feed, calls = Feed(), Calls()
    with calls.monitor(feed) as monitor:
        feed.add("w0")
        feed.remove("w0")
        assert calls.words == ["w0", "all"]
        assert feed.subscribers == 1
    assert feed.subscribers == 0
    monitor.close()


def test_a_group_s_members_are_replicas(ranks: Ranks) -> None:
    first, second = ranks.joined(0, 1)
    calls = Calls()
    with calls.monitor(first) as monitor:
        wait_until(lambda: monitor.alive == {0, 1})
        ranks.data.kill(ranks.lease_of(second))
        wait_until(lambda: calls.words == [1])
        wait_until(lambda: second.state.state is RankState.GONE)
        second.join_group(10)
        wait_until(lambda: monitor.alive == {0, 1})
        second.leave()
        wait_until(lambda: calls.words == [1, 1])


def test_the_sources_of_a_watcher_are_replicas() -> None:
    calls = Calls()
    with MemoryStore() as store, SourceWatcher(store) as watcher:
        first = store.grant(60).lease_id
        for worker, lease_id in (("w0", first), ("w1", store.grant(60).lease_id)):
            store.put(source_key(worker), record(worker).to_bytes(), lease_id=lease_id)
        watcher.wait_for(2, 10)
        with calls.monitor(watcher) as monitor:
            assert monitor.alive == {"w0", "w1"}, "those that were there before"
            store.revoke(first)
            wait_until(lambda: calls.words == ["w0"])
            store.put(source_key("w0"), record("w0", 2).to_bytes())
            wait_until(lambda: monitor.alive == {"w0", "w1"})
            store.put(source_key("w0"), record("w0", 3).to_bytes())
            wait_until(lambda: calls.words == ["w0", "w0"] and monitor.alive == {"w0", "w1"}, what="its next life")


def test_a_callback_that_exits_its_thread_keeps_no_other_death_from_being_reported() -> None:
    feed, calls = Feed(), Calls()

    def die(name: Hashable) -> None:
        calls.words.append(name)
        raise SystemExit

    ReplicaMonitor(feed=feed, on_dead=die, on_all_gone=lambda: calls.words.append("all"))
    feed.add("a", "b")
    for name in "ab":
        with pytest.raises(SystemExit):
            feed.remove(name)
    assert calls.words == ["a", "b", "all"]
