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
from ucxx_transport.membership.keys import source_key

if TYPE_CHECKING:
    from tests.support.group_ranks import Ranks


class Calls:
    """What a monitor has called back with, in order; "all" for all gone."""

    def __init__(self) -> None:
        self.words: list[Hashable] = []

    def monitor(self, **settings: Any) -> ReplicaMonitor:
        return ReplicaMonitor(on_dead=self.words.append, on_all_gone=lambda: self.words.append("all"), **settings)


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


def test_nothing_fires_before_anybody_has_registered() -> None:
    calls = Calls()
    monitor = calls.monitor()
    monitor.removed("a")
    assert calls.words == []
    assert monitor.alive == frozenset()


def test_each_death_is_calls_once_and_then_that_all_are_gone() -> None:
    calls = Calls()
    monitor = calls.monitor()
    for name in ("a", "b"):
        monitor.added(name)
    monitor.removed("b")
    monitor.removed("b")
    assert calls.words == ["b"]
    monitor.removed("a")
    assert calls.words == ["b", "a", "all"]
    monitor.removed("a")
    assert calls.words == ["b", "a", "all"]


def test_who_registers_again_can_die_again() -> None:
    calls = Calls()
    monitor = calls.monitor()
    for _ in range(2):
        monitor.added("a")
        monitor.added("a")
        monitor.removed("a")
    assert calls.words == ["a", "all"] * 2


def test_a_callback_that_fails_stops_nothing(log_events: list[MutableMapping[str, Any]]) -> None:
    gone: list[str] = []

    def fails(name: Hashable) -> None:
        raise ValueError(name)

    monitor = ReplicaMonitor(on_dead=fails, on_all_gone=lambda: gone.append("all"))
    monitor.added("a")
    monitor.removed("a")
    assert gone == ["all"]
    assert [event["event"] for event in log_events] == ["replica_callback_failed"]


def test_callbacks_come_one_at_a_time_in_order_whatever_they_call() -> None:
    calls: list[Hashable] = []
    monitor = ReplicaMonitor(on_all_gone=lambda: calls.append("all"))

    def dead(name: Hashable) -> None:
        calls.append(("begins", name))
        if name == "a":
            monitor.removed("b")
        calls.append(("ends", name))

    monitor = ReplicaMonitor(on_dead=dead, on_all_gone=lambda: calls.append("all"))
    monitor.added("a")
    monitor.added("b")
    monitor.removed("a")
    assert calls == [("begins", "a"), ("ends", "a"), ("begins", "b"), ("ends", "b"), "all"]


def test_all_are_not_gone_when_one_has_come_back_before_it_could_be_calls() -> None:
    calls = Calls()

    def comes_back(name: Hashable) -> None:
        calls.words.append(name)
        monitor.added("b")

    monitor = ReplicaMonitor(on_dead=comes_back, on_all_gone=lambda: calls.words.append("all"))
    monitor.added("a")
    monitor.removed("a")
    assert calls.words == ["a"]
    assert monitor.alive == {"b"}


def test_a_callback_that_takes_its_time_does_not_hold_up_who_brings_further_news() -> None:
    is_in, go_on = threading.Event(), threading.Event()
    calls: list[Hashable] = []

    def slow(name: Hashable) -> None:
        calls.append(name)
        is_in.set()
        go_on.wait(30)

    monitor = ReplicaMonitor(on_dead=slow)
    for name in ("a", "b"):
        monitor.added(name)
    thread = threading.Thread(target=monitor.removed, args=("a",))
    thread.start()
    assert is_in.wait(10)
    monitor.removed("b")
    assert calls == ["a"]
    go_on.set()
    thread.join(10)
    assert calls == ["a", "b"]


def test_a_feed_is_followed_until_the_monitor_is_closed() -> None:
    feed, calls = Feed(), Calls()
    with calls.monitor(feed=feed) as monitor:
        feed.on_add(Source("w0"))
        feed.on_remove(Source("w0"))
        assert calls.words == ["w0", "all"]
        assert feed.subscribers == 1
    assert feed.subscribers == 0
    monitor.close()


def test_a_group_s_members_are_replicas(ranks: Ranks) -> None:
    first, second = ranks.joined(0, 1)
    calls = Calls()
    with calls.monitor(feed=first) as monitor:
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
        with calls.monitor(feed=watcher) as monitor:
            assert monitor.alive == {"w0", "w1"}, "those that were there before"
            store.revoke(first)
            wait_until(lambda: calls.words == ["w0"])
            store.put(source_key("w0"), record("w0", 2).to_bytes())
            wait_until(lambda: monitor.alive == {"w0", "w1"})
            store.put(source_key("w0"), record("w0", 3).to_bytes())
            wait_until(lambda: calls.words == ["w0", "w0"] and monitor.alive == {"w0", "w1"}, what="its next life")


def test_a_callback_that_exits_its_thread_keeps_no_other_death_from_being_reported() -> None:
    calls = Calls()

    def die(name: Hashable) -> None:
        calls.words.append(name)
        raise SystemExit

    monitor = ReplicaMonitor(on_dead=die, on_all_gone=lambda: calls.words.append("all"))
    for name in "ab":
        monitor.added(name)
    for name in "ab":
        with pytest.raises(SystemExit):
            monitor.removed(name)
    assert calls.words == ["a", "b", "all"]
