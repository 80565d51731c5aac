"""SourceWatcher over a store that is cut off, compacted, wiped or refuses, just when it hurts."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.clock import Clock
from tests.support.memory_store import MemoryData, MemoryStore
from tests.support.source_records import record
from tests.support.store_in_front import Call, StoreInFront
from tests.support.waiting import wait_until
from ucxx_transport.errors import (
    ConfigError,
    DeadlineExceededError,
    RegistryError,
    StorePermissionError,
    StoreUnavailableError,
)
from ucxx_transport.membership import SourceRecord, SourceStatus, SourceWatcher, Store
from ucxx_transport.membership.entries import source_key
from ucxx_transport.membership.local_store import LocalStore

MINUTE = 60.0


class Heard:
    """What a listener heard: "+a1" for an addition of `a` in epoch 1, "-a1" for its removal, "~a1" for an update."""

    def __init__(self) -> None:
        self.words: list[str] = []

    def add(self, source: SourceRecord) -> None:
        self.words.append(f"+{source.worker_id}{source.epoch}")

    def update(self, source: SourceRecord) -> None:
        self.words.append(f"~{source.worker_id}{source.epoch}")

    def remove(self, source: SourceRecord) -> None:
        self.words.append(f"-{source.worker_id}{source.epoch}")

    def wait_for(self, *words: str) -> None:
        wait_until(lambda: self.words == list(words), MINUTE, what=f"{words} are heard, not {self.words}")


def watcher_of(store: Store | str, heard: Heard, **settings: Any) -> SourceWatcher:
    return SourceWatcher(store, on_add=heard.add, on_update=heard.update, on_remove=heard.remove, **settings)


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest.fixture
def watcher(front: StoreInFront, store: Store, heard: Heard) -> Iterator[SourceWatcher]:
    """Follows a store that has `a` and `b`, and has seen both."""
    for worker_id in "ab":
        publish(store, worker_id)
    with watcher_of(front, heard) as watcher:
        heard.wait_for("+a1", "+b1")
        yield watcher


def publish(store: Store, worker_id: str, epoch: int = 1, *, lease_id: int | None = None, **fields: object) -> None:
    store.put(source_key(worker_id), record(worker_id, epoch, **fields).to_bytes(), lease_id=lease_id)


def ids(watcher: SourceWatcher) -> list[str]:
    return [f"{source.worker_id}{source.epoch}" for source in watcher.sources(status=None)]


@contextmanager
def cut_off(front: StoreInFront, watcher: SourceWatcher) -> Iterator[None]:
    front.reachable = False
    wait_until(lambda: watcher.statistics().failures, MINUTE, what="the watcher has noticed")
    yield
    front.reachable = True


def once(name: str, action: Callable[[], None]) -> Callable[[Call], None]:
    """Do it at the first call of that name."""
    waiting = [action]

    def hook(call: Call) -> None:
        if call.name == name and waiting:
            waiting.pop()()

    return hook


def test_sources_are_reported_as_they_come_change_and_go(store: Store, watcher: SourceWatcher, heard: Heard) -> None:
    publish(store, "c")
    publish(store, "a", ports=(7,))
    publish(store, "b", epoch=2)
    store.delete("sources/c")
    heard.wait_for("+a1", "+b1", "+c1", "~a1", "-b1", "+b2", "-c1")
    assert ids(watcher) == ["a1", "b2"]
    counts = watcher.statistics()
    assert (counts.sources, counts.adds, counts.updates, counts.removes) == (2, 4, 1, 2)
    assert (counts.resyncs, counts.resets, counts.failures, counts.malformed) == (1, 0, 0, 0)
    assert counts.synced
    assert watcher.error is None


def test_who_is_reported_to_hears_what_is_known_and_every_change_before_it_is_seen(
    store: Store, watcher: SourceWatcher, heard: Heard
) -> None:
    reported: list[tuple[str, str, bool]] = []
    end = watcher.report_to(
        lambda change: reported.append((change.kind, change.record.worker_id, bool(heard.words[2:])))
    )
    assert reported == [("add", "a", False), ("add", "b", False)]
    publish(store, "a", epoch=2)
    heard.wait_for("+a1", "+b1", "-a1", "+a2")
    assert reported[2:] == [("remove", "a", False), ("add", "a", False)]
    end()
    store.delete("sources/b")
    heard.wait_for("+a1", "+b1", "-a1", "+a2", "-b1")
    assert len(reported) == 4


def test_sources_are_asked_for_by_status(store: Store, watcher: SourceWatcher, heard: Heard) -> None:
    publish(store, "a", status=SourceStatus.STALE)
    heard.wait_for("+a1", "+b1", "~a1")
    assert [source.worker_id for source in watcher.sources()] == ["b"]
    assert [source.worker_id for source in watcher.sources(status=SourceStatus.STALE)] == ["a"]
    assert ids(watcher) == ["a1", "b1"]


def test_a_store_that_cannot_be_reached_is_no_dead_source(
    front: StoreInFront, watcher: SourceWatcher, heard: Heard
) -> None:
    with cut_off(front, watcher):
        wait_until(lambda: watcher.statistics().failures > 2, MINUTE, what="it tries on")
        error = watcher.error
        assert isinstance(error, StoreUnavailableError)
        assert not watcher.statistics().synced
        assert ids(watcher) == ["a1", "b1"]
        assert len(watcher.wait_for(2, MINUTE)) == 2
    wait_until(lambda: watcher.statistics().synced, MINUTE, what="it follows again")
    assert watcher.error is None
    assert heard.words == ["+a1", "+b1"]
    assert watcher.statistics().resyncs == 1  # it went on where it was cut off


def test_what_changes_while_it_is_cut_off_is_reported_after_it(
    front: StoreInFront, store: Store, watcher: SourceWatcher, heard: Heard
) -> None:
    publish(store, "c")
    heard.wait_for("+a1", "+b1", "+c1")
    with cut_off(front, watcher):
        store.delete("sources/a")
        publish(store, "b", epoch=2)
        publish(store, "d")
    heard.wait_for("+a1", "+b1", "+c1", "-a1", "-b1", "+b2", "+d1")


def test_after_a_compaction_while_it_was_cut_off_exactly_what_is_there_is_known(
    data: MemoryData, front: StoreInFront, store: Store, watcher: SourceWatcher, heard: Heard
) -> None:
    with cut_off(front, watcher):
        store.delete("sources/a")
        publish(store, "b", epoch=2)
        publish(store, "c")
        data.compact()
    wait_until(lambda: watcher.statistics().resyncs == 2, MINUTE, what="it takes a snapshot")
    heard.wait_for("+a1", "+b1", "-b1", "+b2", "+c1", "-a1")
    assert ids(watcher) == ["b2", "c1"]
    assert watcher.statistics().resets == 0
    publish(store, "d")
    heard.wait_for("+a1", "+b1", "-b1", "+b2", "+c1", "-a1", "+d1")


@pytest.mark.parametrize("epoch", [1, 2])
def test_a_source_deleted_and_added_between_snapshot_and_watch_is_there(
    front: StoreInFront, store: Store, heard: Heard, epoch: int
) -> None:
    publish(store, "a")

    def delete_and_add() -> None:
        store.delete("sources/a")
        publish(store, "a", epoch)

    front.before = once("watch", delete_and_add)
    with watcher_of(front, heard) as watcher:
        heard.wait_for("+a1", "-a1", f"+a{epoch}")
        assert ids(watcher) == [f"a{epoch}"]


def test_a_source_deleted_and_added_before_the_snapshot_is_reported_once(
    front: StoreInFront, store: Store, heard: Heard
) -> None:
    publish(store, "a")
    store.delete("sources/a")
    publish(store, "a", 2)
    with watcher_of(front, heard):
        heard.wait_for("+a2")
        publish(store, "b")
        heard.wait_for("+a2", "+b1")  # and so nothing of before came over the watch


def test_of_two_keys_that_end_at_once_none_is_lost_when_the_connection_is_cut_in_between(
    front: StoreInFront, store: Store, heard: Heard
) -> None:
    lease_id = store.grant(MINUTE).lease_id
    for worker_id in "ab":
        publish(store, worker_id, lease_id=lease_id)
    publish(store, "c")
    with watcher_of(front, heard) as watcher:
        heard.wait_for("+a1", "+b1", "+c1")

        with cut_after_next(front):
            store.revoke(lease_id)
            wait_until(lambda: watcher.statistics().failures, MINUTE, what="an answer was lost")
        heard.wait_for("+a1", "+b1", "+c1", "-a1", "-b1")
        assert ids(watcher) == ["c1"]


@contextmanager
def cut_after_next(front: StoreInFront) -> Iterator[None]:
    """What a watch hears from here on is lost, with the connection."""

    def lose(call: Call) -> None:
        if call.name == "next":
            raise StoreUnavailableError("cut while the answer was on its way")

    front.after = lose
    yield
    front.after = lambda _: None


def test_the_sources_of_a_wiped_store_have_time_to_publish_themselves_again(
    data: MemoryData, store: Store, heard: Heard
) -> None:
    for worker_id in "abc":
        publish(store, worker_id)
    clock = Clock()
    with watcher_of(MemoryStore(data), heard, reset_grace_s=10.0, clock=clock) as watcher:
        heard.wait_for("+a1", "+b1", "+c1")
        data.wipe()
        wait_until(lambda: watcher.statistics().resets == 1, MINUTE, what="it notices")
        wait_until(lambda: watcher.statistics().synced, MINUTE, what="it follows the new one")
        assert ids(watcher) == ["a1", "b1", "c1"]
        publish(store, "a", 1)
        publish(store, "b", 2)
        heard.wait_for("+a1", "+b1", "+c1", "-b1", "+b2")
        clock.now_s += 10.0
        heard.wait_for("+a1", "+b1", "+c1", "-b1", "+b2", "-c1")
        assert ids(watcher) == ["a1", "b2"]


def test_a_store_wiped_while_it_was_cut_off_is_noticed_however_far_the_new_one_has_come(
    data: MemoryData, store: Store, front: StoreInFront, heard: Heard
) -> None:
    publish(store, "a")
    with watcher_of(front, heard) as watcher:
        heard.wait_for("+a1")
        with cut_off(front, watcher):
            data.wipe()
            for epoch in range(1, 10):
                publish(store, "a", epoch)
        wait_until(lambda: watcher.statistics().resets == 1, MINUTE, what="it notices")
        wait_until(lambda: "a9" in ids(watcher), MINUTE, what="it knows what is there")


def test_what_is_known_and_its_counts_change_at_once(
    data: MemoryData, front: StoreInFront, store: Store, watcher: SourceWatcher, heard: Heard
) -> None:
    seen: list[tuple[int, int, int]] = []

    def look(_: SourceRecord) -> None:
        counts = watcher.statistics()
        seen.append((counts.sources, counts.removes, counts.resyncs))

    watcher.subscribe(on_remove=look)
    with cut_off(front, watcher):
        store.delete("sources/a")
        data.compact()
    heard.wait_for("+a1", "+b1", "-a1")
    wait_until(lambda: seen, MINUTE, what="the other listener has heard, too")
    assert seen == [(1, 1, 2)]


def test_a_store_that_refuses_is_shown_and_tried_again(front: StoreInFront, store: Store, heard: Heard) -> None:
    publish(store, "a")

    def refuse(_: Call) -> None:
        raise StorePermissionError("not yours")

    front.before = refuse
    with watcher_of(front, heard) as watcher:
        error = wait_until(lambda: watcher.error, MINUTE, what="it is reported")
        assert isinstance(error, StorePermissionError)
        with pytest.raises(DeadlineExceededError, match="not yours"):
            watcher.wait_for(1, 0.01)
        front.before = lambda _: None
        assert [source.worker_id for source in watcher.wait_for(1, MINUTE)] == ["a"]
        assert watcher.error is None


def test_a_bug_of_the_store_is_shown_and_costs_no_source(front: StoreInFront, watcher: SourceWatcher) -> None:
    def fail(_: Call) -> None:
        raise ZeroDivisionError("a bug")

    front.before = fail
    error = wait_until(lambda: watcher.error, MINUTE, what="it is reported")
    assert isinstance(error, RegistryError)
    assert "ZeroDivisionError: a bug" in str(error)
    assert not watcher.statistics().synced
    assert watcher.statistics().failures == 1
    assert ids(watcher) == ["a1", "b1"]


def test_what_is_no_record_is_counted(store: Store, watcher: SourceWatcher, heard: Heard) -> None:
    store.put("sources/a", b"{}")
    store.put("sources/z", b"nonsense")
    publish(store, "c")
    heard.wait_for("+a1", "+b1", "+c1")
    assert watcher.statistics().malformed == 2
    assert ids(watcher) == ["a1", "b1", "c1"]


def test_a_listener_that_fails_is_counted_and_blinds_nobody(store: Store, watcher: SourceWatcher, heard: Heard) -> None:
    def fail(_: SourceRecord) -> None:
        raise ZeroDivisionError("a bug")

    watcher.subscribe(on_add=fail, on_remove=fail)
    after = Heard()
    watcher.subscribe(on_add=after.add)
    assert watcher.statistics().listener_errors == 2  # of those known already
    publish(store, "c")
    store.delete("sources/c")
    heard.wait_for("+a1", "+b1", "+c1", "-c1")
    after.wait_for("+a1", "+b1", "+c1")
    wait_until(lambda: watcher.statistics().listener_errors == 4, MINUTE, what="every failure is counted")
    assert watcher.error is None


def test_who_subscribes_late_hears_what_is_known_and_then_what_changes(store: Store, watcher: SourceWatcher) -> None:
    late = Heard()
    watcher.subscribe(on_add=late.add, on_remove=late.remove)
    assert late.words == ["+a1", "+b1"]
    store.delete("sources/a")
    late.wait_for("+a1", "+b1", "-a1")


def test_who_has_unsubscribed_hears_nothing_more(store: Store, watcher: SourceWatcher, heard: Heard) -> None:
    former = Heard()
    end = watcher.subscribe(on_add=former.add)
    end()
    end()  # idempotent
    publish(store, "c")
    heard.wait_for("+a1", "+b1", "+c1")
    assert former.words == ["+a1", "+b1"]


def test_a_listener_may_end_another_s_subscription_and_its_own(
    store: Store, watcher: SourceWatcher, heard: Heard
) -> None:
    other = Heard()
    own: list[str] = []
    ends: list[Callable[[], None]] = []
    ended = threading.Event()

    def end_all(source: SourceRecord) -> None:
        own.append(source.worker_id)
        if source.worker_id == "c":
            for end in ends:
                end()
            ended.set()

    ends.append(watcher.subscribe(on_add=end_all))
    ends.append(watcher.subscribe(on_add=other.add))
    publish(store, "c")
    assert ended.wait(MINUTE)
    publish(store, "d")
    heard.wait_for("+a1", "+b1", "+c1", "+d1")
    assert own == ["a", "b", "c"]
    assert other.words in (["+a1", "+b1"], ["+a1", "+b1", "+c1"])  # it may have heard of c before it was ended


def test_who_is_subscribed_by_a_listener_hears_of_every_source_once(
    data: MemoryData, front: StoreInFront, store: Store, watcher: SourceWatcher, heard: Heard
) -> None:
    inner = Heard()

    def subscribe_inner(source: SourceRecord) -> None:
        if source.worker_id == "c":
            watcher.subscribe(on_add=inner.add, on_remove=inner.remove)

    watcher.subscribe(on_add=subscribe_inner)
    with cut_off(front, watcher):
        store.delete("sources/a")
        publish(store, "c")
        publish(store, "d")
        data.compact()  # so that all of it comes at once, as the difference to a snapshot
    heard.wait_for("+a1", "+b1", "+c1", "+d1", "-a1")
    inner.wait_for("+b1", "+c1", "+d1")


def test_waiting_ends_when_enough_are_ready(store: Store, watcher: SourceWatcher) -> None:
    publish(store, "c", status=SourceStatus.STARTING)
    found: list[int] = []
    waiting = threading.Thread(target=lambda: found.append(len(watcher.wait_for(3, MINUTE))))
    waiting.start()
    wait_until(lambda: "c1" in ids(watcher), MINUTE, what="it is known, and not ready")
    assert found == []
    publish(store, "c")
    waiting.join()
    assert found == [3]
    assert len(watcher.wait_for(1, 0.0)) == 3


def test_waiting_in_vain_says_how_many_there_were(watcher: SourceWatcher, front: StoreInFront) -> None:
    with pytest.raises(DeadlineExceededError, match="2 of 3 sources were ready") as caught:
        watcher.wait_for(3, 0.01)
    assert (caught.value.facts["store"], caught.value.facts["store_error"]) == (front.url, "none")


def test_waiting_for_a_watcher_that_does_not_run_is_refused(front: StoreInFront) -> None:
    watcher = SourceWatcher(front)
    with pytest.raises(ConfigError, match="start"):
        watcher.wait_for(1, MINUTE)
    with watcher:
        pass
    with pytest.raises(ConfigError, match="stopped"):
        watcher.wait_for(1, MINUTE)


def test_a_stop_ends_the_waiting(front: StoreInFront) -> None:
    clock = Clock()
    watcher = SourceWatcher(front, clock=clock)
    watcher.start()
    errors: list[BaseException] = []

    def wait() -> None:
        try:
            watcher.wait_for(1, 100 * MINUTE)
        except ConfigError as error:
            errors.append(error)

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    wait_until(lambda: clock.asked_by.count(waiting) >= 2, MINUTE, what="it is about to wait")
    watcher.stop()
    waiting.join(MINUTE)
    assert ["stopped" in str(error) for error in errors] == [True]


@pytest.mark.anyio
async def test_an_event_loop_waits_without_being_blocked(front: StoreInFront, store: Store) -> None:
    watcher = SourceWatcher(front)
    async with watcher:
        waiting = asyncio.ensure_future(asyncio.to_thread(watcher.wait_for, 1, MINUTE))
        await asyncio.sleep(0)  # the loop turns on
        publish(store, "a")
        assert [source.worker_id for source in await waiting] == ["a"]
        with pytest.raises(DeadlineExceededError):
            await asyncio.to_thread(watcher.wait_for, 2, 0.01)
        waiting = asyncio.ensure_future(asyncio.to_thread(watcher.wait_for, 2, MINUTE))
        await asyncio.to_thread(watcher.stop)
        with pytest.raises(ConfigError, match="stopped"):
            await waiting


def test_a_listener_may_stop_the_watcher(front: StoreInFront, store: Store) -> None:
    stopped = threading.Event()
    following = SourceWatcher(front)

    def stop(_: SourceRecord) -> None:
        following.stop()
        stopped.set()

    following.subscribe(on_add=stop)
    following.start()
    publish(store, "a")
    assert stopped.wait(MINUTE)
    following.stop()  # from here it waits for the thread; idempotent
    assert ids(following) == ["a1"]
    assert "ucxx-watcher" not in {thread.name for thread in threading.enumerate()}


def test_a_watcher_is_used_once_and_what_it_knew_stays_readable(
    front: StoreInFront, store: Store, heard: Heard
) -> None:
    publish(store, "a")
    with watcher_of(front, heard) as watcher:
        heard.wait_for("+a1")
        with pytest.raises(ConfigError, match="make another"):
            watcher.start()
    with pytest.raises(ConfigError, match="make another"):
        watcher.start()
    assert ids(watcher) == ["a1"]
    publish(store, "b")
    assert ids(watcher) == ["a1"]
    assert heard.words == ["+a1"]


def test_a_store_given_by_its_url_is_the_watcher_s_own(tmp_path: Path, heard: Heard) -> None:
    with LocalStore(tmp_path / "own.db") as store:
        publish(store, "a")
        with watcher_of(store.url, heard) as watcher:
            heard.wait_for("+a1")
        watcher.stop()


def test_a_watcher_that_was_never_started_stops(front: StoreInFront) -> None:
    SourceWatcher(front).stop()
