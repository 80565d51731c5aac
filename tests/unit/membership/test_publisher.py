"""HeartbeatPublisher with something made up to publish, and a store that fails on purpose."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest

from tests.support.clock import Clock
from tests.support.fake_source import OFFER, FakeSource
from tests.support.memory_store import MemoryData
from tests.support.record_history import History
from tests.support.sidecars import sidecars_of
from tests.support.source_records import record
from tests.support.store_in_front import Call, StoreInFront
from tests.support.store_rigs import LocalRig
from tests.support.waiting import wait_until
from ucxx_transport.config import PublisherConfig, StoreConfig
from ucxx_transport.errors import (
    ConfigError,
    ConflictError,
    DeadlineExceededError,
    DuplicateSourceError,
    LeaseLostError,
    StorePermissionError,
    StoreUnavailableError,
    TransportError,
)
from ucxx_transport.membership import HeartbeatPublisher, PublisherState, SourceRecord, SourceStatus, Store
from ucxx_transport.membership.local_store import LocalStore

MINUTE = 60.0
KEY = "sources/w"
FAST = PublisherConfig(
    interval_s=0.02,
    keeper="thread",
    backoff_s=0.005,
    max_backoff_s=0.01,
    stop_timeout_s=MINUTE,
    publish_timeout_s=MINUTE,
)
IMPATIENT = replace(FAST, stop_timeout_s=0.1)


@pytest.fixture
def source() -> FakeSource:
    return FakeSource()


def stored(store: Store) -> SourceRecord | None:
    entry = store.get(KEY)
    return None if entry is None else SourceRecord.from_bytes(entry.value)


def is_put_of(call: Call, status: SourceStatus) -> bool:
    return call.name == "put" and call.key == KEY and SourceRecord.from_bytes(call.value).status is status


class Held:
    """Holds the calls of a kind, from the first one on, until `release`."""

    def __init__(self, wanted: Callable[[Call], bool]) -> None:
        self._wanted = wanted
        self._arrived = threading.Event()
        self._go = threading.Event()

    def __call__(self, call: Call) -> None:
        if self._wanted(call):
            self._arrived.set()
            assert self._go.wait(MINUTE), "never released"

    def wait_for_one(self) -> None:
        assert self._arrived.wait(MINUTE)

    def release(self) -> None:
        self._go.set()


def ended_thread() -> None:
    def running() -> bool:
        return any(thread.name == "ucxx-publisher" for thread in threading.enumerate())

    wait_until(lambda: not running(), MINUTE, what="the publisher's thread has ended")


def test_a_source_is_visible_first_then_bound_then_ready(store: Store, history: History, source: FakeSource) -> None:
    with HeartbeatPublisher(store, "w", source, FAST, meta={"gpu": 3}) as publisher:
        assert publisher.wait_published(MINUTE) == publisher.epoch == 1
        assert source.calls == ["held", "bound"]
        found = stored(store)
        assert found is not None
        assert (found.ring_id, found.ring_name, found.host_id) == (OFFER.ring_id, OFFER.ring_name, OFFER.host_id)
        assert (found.host, found.ports, found.meta) == (OFFER.host, OFFER.ports, {"gpu": 3})
        assert found.ttl_s >= FAST.ttl_s
        counts = publisher.statistics()
        assert (counts.state, counts.epoch, counts.attempts, counts.publications) == (PublisherState.LIVE, 1, 1, 1)
        assert (counts.losses, counts.outages, counts.keeper_restarts, counts.keeper_keeps) == (0, 0, 0, False)
        assert publisher.error is None
    assert history.look() == [(1, "starting"), (1, "ready"), (1, "stale"), "gone"]
    assert (source.serves, publisher.state.value) == ("released", "stopped")


@pytest.mark.parametrize("name", ["get", "grant", "put"])
def test_a_store_that_refuses_is_asked_exactly_once(
    store: Store, front: StoreInFront, source: FakeSource, name: str
) -> None:
    def refuse(call: Call) -> None:
        if call.name == name:
            raise StorePermissionError("not yours")

    front.before = refuse
    with HeartbeatPublisher(front, "w", source, FAST) as publisher:
        with pytest.raises(StorePermissionError, match="not yours"):
            publisher.wait_published(MINUTE)
        ended_thread()
        assert (publisher.state, publisher.statistics().attempts) == (PublisherState.FAILED, 1)
        assert isinstance(publisher.error, StorePermissionError)
        assert front.count(name) == 1
        assert stored(store) is None
        assert source.calls == ["held"]
    assert source.serves == "released"


def test_a_stop_between_visible_and_ready_removes_the_record(
    store: Store, history: History, source: FakeSource
) -> None:
    source.bind_error = DeadlineExceededError("the ring's lock")
    with HeartbeatPublisher(store, "w", source, FAST) as publisher:
        wait_until(lambda: stored(store), MINUTE, what="it is visible")
        assert publisher.state is PublisherState.STARTING
    assert history.look() == [(1, "starting"), (1, "stale"), "gone"]
    assert source.calls == ["held", "released"]


def test_a_source_that_cannot_be_bound_stays_starting_and_is_tried_again(
    store: Store, history: History, source: FakeSource
) -> None:
    source.bind_error = DeadlineExceededError("the ring's lock")
    with HeartbeatPublisher(store, "w", source, FAST) as publisher:
        wait_until(lambda: source.binds > 2, MINUTE, what="it is tried again")
        assert publisher.state is PublisherState.STARTING
        assert isinstance(publisher.error, DeadlineExceededError)
        source.bind_error = None
        assert publisher.wait_published(MINUTE) == 1
        assert publisher.statistics().attempts == source.binds > 3
        assert publisher.statistics().publications == 1
    assert history.statuses() == ["starting", "ready", "stale", "gone"]


def test_a_lease_lost_before_the_source_is_bound_is_taken_again(
    store: Store, history: History, source: FakeSource
) -> None:
    source.bind_error = DeadlineExceededError("the ring's lock")
    with HeartbeatPublisher(store, "w", source, FAST) as publisher:
        lease_id = wait_until(lambda: lease_of(store), MINUTE, what="it is visible")
        store.revoke(lease_id)
        wait_until(lambda: (2, "starting") in history.look(), MINUTE, what="it is visible again")
        source.bind_error = None
        assert publisher.wait_published(MINUTE) == 2


def lease_of(store: Store) -> int:
    entry = store.get(KEY)
    return 0 if entry is None or entry.lease_id is None else entry.lease_id


def test_a_ready_in_flight_at_a_stop_that_has_not_waited_is_withdrawn_all_the_same(
    front: StoreInFront, history: History, source: FakeSource
) -> None:
    front.before = held = Held(lambda call: is_put_of(call, SourceStatus.READY))
    publisher = HeartbeatPublisher(front, "w", source, IMPATIENT)
    publisher.start()
    held.wait_for_one()
    publisher.stop()
    assert publisher.state is PublisherState.STOPPED
    held.release()
    ended_thread()
    assert history.look() == [(1, "starting"), (1, "ready"), (1, "stale"), "gone"]
    assert source.serves == "released"


def test_a_stop_that_the_store_hears_in_part_is_the_last_word_whatever_was_in_flight(
    front: StoreInFront, history: History, source: FakeSource
) -> None:
    held = Held(lambda call: is_put_of(call, SourceStatus.READY))

    def before(call: Call) -> None:
        held(call)
        if call.name == "revoke":
            raise StoreUnavailableError("away")

    front.before = before
    publisher = HeartbeatPublisher(front, "w", source, IMPATIENT)
    publisher.start()
    held.wait_for_one()
    publisher.stop()
    held.release()
    ended_thread()
    assert front.calls[-1].name == "revoke"
    assert history.look() == [(1, "starting"), (1, "ready"), (1, "stale")]


@pytest.mark.parametrize("keeper", ["thread", "process"])
def test_a_record_in_flight_does_not_outlive_the_stop(
    tmp_path: Path, source: FakeSource, keeper: Literal["thread", "process"]
) -> None:
    config = replace(IMPATIENT, interval_s=20.0, keeper=keeper)
    with StoreInFront(LocalStore(tmp_path / "store.db")) as store:
        store.before = held = Held(lambda call: is_put_of(call, SourceStatus.STARTING))
        publisher = HeartbeatPublisher(store, "w", source, config)
        publisher.start()
        held.wait_for_one()
        publisher.stop()
        assert stored(store) is None
        held.release()
        ended_thread()
        assert stored(store) is None
        assert source.serves == "released"


def test_a_stop_is_bounded_while_the_store_hangs_and_says_so(
    tmp_path: Path, source: FakeSource, log_events: list[MutableMapping[str, Any]]
) -> None:
    host = LocalRig(tmp_path)
    patient = StoreConfig(timeout_s=MINUTE)
    publisher = HeartbeatPublisher(host.url, "w", source, IMPATIENT, store_config=patient)
    publisher.start()
    publisher.wait_published(MINUTE)
    host.stall()
    publisher.stop()  # while the store is down: that it returns is the point
    assert publisher.state is PublisherState.STOPPED
    assert "record_not_withdrawn" in [event["event"] for event in log_events]
    assert source.serves == "released"
    host.resume()
    ended_thread()


def test_health_is_reported_once_each_way(store: Store, history: History, source: FakeSource) -> None:
    with HeartbeatPublisher(store, "w", source, FAST) as publisher:
        publisher.wait_published(MINUTE)
        source.healthy = False
        wait_until(lambda: publisher.state is PublisherState.UNWELL, MINUTE, what="it is known to be unwell")
        with pytest.raises(DeadlineExceededError):
            publisher.wait_published(0.05)
        source.healthy = True
        assert publisher.wait_published(MINUTE) == 1
    assert history.look() == [(1, "starting"), (1, "ready"), (1, "stale"), (1, "ready"), (1, "stale"), "gone"]
    assert source.calls == ["held", "bound", "released"]


def test_a_source_that_was_closed_is_reported_stale(store: Store, history: History, source: FakeSource) -> None:
    with HeartbeatPublisher(store, "w", source, FAST) as publisher:
        publisher.wait_published(MINUTE)
        source.healthy, source.offered = False, None
        wait_until(lambda: history.statuses()[-1] == "stale", MINUTE, what="it is stale in the store")
        assert publisher.statistics().outages == 0


def test_other_ports_are_reported_under_the_same_epoch(store: Store, history: History, source: FakeSource) -> None:
    with HeartbeatPublisher(store, "w", source, FAST) as publisher:
        publisher.wait_published(MINUTE)
        source.move(6001, 6002)
        found = wait_until(
            lambda: (found := stored(store)) and found.ports == (6001, 6002) and found,
            MINUTE,
            what="they are stored",
        )
        assert isinstance(found, SourceRecord)
        assert (found.epoch, found.status) == (1, SourceStatus.READY)
    assert history.look()[:3] == [(1, "starting"), (1, "ready"), (1, "ready")]


def test_what_an_epoch_has_left_is_discarded_until_nothing_is_left(store: Store, source: FakeSource) -> None:
    source.old = 3
    with HeartbeatPublisher(store, "w", source, FAST):
        wait_until(lambda: source.old == 0, MINUTE, what="all of it is discarded")


def test_a_record_of_its_own_whose_answer_was_lost_is_no_double(
    front: StoreInFront, history: History, source: FakeSource
) -> None:
    def lose(call: Call) -> None:
        if call.name == "revoke":
            front.before = front.after = lambda _: None
            raise StoreUnavailableError("away")
        if is_put_of(call, SourceStatus.STARTING):
            front.before, front.after = lose, lambda _: None
            raise StoreUnavailableError("the answer was lost")

    front.after = lose
    with HeartbeatPublisher(front, "w", source, FAST) as publisher:
        assert publisher.wait_published(MINUTE) == publisher.statistics().attempts == 2
    assert history.look() == [(1, "starting"), "gone", (2, "starting"), (2, "ready"), (2, "stale"), "gone"]


def test_another_worker_of_this_id_is_left_alone_and_waited_for(store: Store, source: FakeSource) -> None:
    other = record("w", 7, session="f" * 32, ttl_s=1.0)
    store.put(KEY, other.to_bytes())
    clock = Clock()
    with HeartbeatPublisher(store, "w", source, FAST, clock=clock) as publisher:
        wait_until(lambda: publisher.statistics().attempts > 2, MINUTE, what="it looks again and again")
        assert publisher.state is PublisherState.PUBLISHING
        clock.now_s += 2 * other.ttl_s + 1.5  # longer than a dead one could stay
        with pytest.raises(DuplicateSourceError, match="another live worker"):
            publisher.wait_published(MINUTE)
        assert stored(store) == other
    assert stored(store) == other


def test_the_time_of_an_outage_makes_no_double_of_a_dead_worker(
    front: StoreInFront, store: Store, source: FakeSource
) -> None:
    other = record("w", 7, session="f" * 32, ttl_s=1.0)
    store.put(KEY, other.to_bytes())
    clock = Clock()
    with HeartbeatPublisher(front, "w", source, FAST, clock=clock) as publisher:

        def looks(times: int) -> None:
            before = publisher.statistics().attempts
            wait_until(lambda: publisher.statistics().attempts > before + times, MINUTE, what="it looks again")

        looks(1)
        front.reachable = False
        looks(1)
        clock.now_s += 2 * other.ttl_s + 1.5  # in which a store that restarts gives its leases their time again
        front.reachable = True
        looks(2)
        assert publisher.state is PublisherState.PUBLISHING
        store.delete(KEY)
        assert publisher.wait_published(MINUTE) == 1


def test_the_place_of_another_worker_that_ends_is_taken(store: Store, source: FakeSource) -> None:
    store.put(KEY, b"of another version")
    with HeartbeatPublisher(store, "w", source, FAST) as publisher:
        wait_until(lambda: publisher.statistics().attempts > 1, MINUTE, what="it has looked")
        store.delete(KEY)
        assert publisher.wait_published(MINUTE) == 1


def test_a_store_that_comes_up_after_the_time_to_publish_is_published_to(
    front: StoreInFront, source: FakeSource, log_events: list[MutableMapping[str, Any]]
) -> None:
    front.reachable = False
    clock = Clock()
    with HeartbeatPublisher(front, "w", source, FAST, clock=clock) as publisher:
        wait_until(lambda: publisher.error, MINUTE, what="the store has not answered")
        clock.now_s += FAST.publish_timeout_s
        late = ("source_not_published", "error")
        wait_until(
            lambda: late in [(event["event"], event["log_level"]) for event in log_events], MINUTE, what="it is late"
        )
        front.reachable = True
        assert publisher.wait_published(MINUTE) == 1


def test_a_worker_that_is_not_to_retry_fails_with_the_store_s_answer(front: StoreInFront, source: FakeSource) -> None:
    front.reachable = False
    clock = Clock()
    config = replace(FAST, on_timeout="stop")
    with HeartbeatPublisher(front, "w", source, config, clock=clock) as publisher:
        wait_until(lambda: publisher.error, MINUTE, what="the store has not answered")
        clock.now_s += config.publish_timeout_s
        with pytest.raises(StoreUnavailableError, match="the connection is cut"):
            publisher.wait_published(2 * config.publish_timeout_s)
        ended_thread()
        front.reachable = True
        assert publisher.state is PublisherState.FAILED


def test_a_wiped_store_is_published_to_again(data: MemoryData, store: Store, source: FakeSource) -> None:
    with HeartbeatPublisher(store, "w", source, FAST) as publisher:
        publisher.wait_published(MINUTE)
        data.wipe()
        wait_until(lambda: publisher.epoch == 2, MINUTE, what="it is published again, under a larger epoch")
        publisher.wait_published(MINUTE)
        found = stored(store)
        assert found is not None
        assert (found.epoch, found.status) == (2, SourceStatus.READY)


@pytest.mark.parametrize("how", ["lease", "record", "overwritten"])
def test_what_is_lost_is_published_again_under_a_larger_epoch(
    store: Store, history: History, source: FakeSource, how: str
) -> None:
    with HeartbeatPublisher(store, "w", source, FAST) as publisher:
        publisher.wait_published(MINUTE)
        if how == "lease":
            store.revoke(lease_of(store))
        elif how == "record":
            store.delete(KEY)
        else:
            store.put(KEY, record("w", 9).to_bytes(), lease_id=lease_of(store))
        wait_until(lambda: publisher.epoch == 2, MINUTE, what="it publishes again")
        assert publisher.wait_published(MINUTE) == 2
        assert source.calls == ["held", "bound", "held", "bound"]
        assert (publisher.statistics().losses, publisher.statistics().publications) == (1, 2)
    assert history.look()[-4:] == [(2, "starting"), (2, "ready"), (2, "stale"), "gone"]


def test_a_state_and_its_counts_change_at_once(store: Store, front: StoreInFront, source: FakeSource) -> None:
    seen: list[tuple[PublisherState, int, int, int]] = []

    def look(call: Call) -> None:
        if call.name in ("grant", "revoke"):
            now = publisher.statistics()
            seen.append((now.state, now.epoch, now.publications, now.losses))

    front.before = look
    publisher = HeartbeatPublisher(front, "w", source, FAST)
    with publisher:
        publisher.wait_published(MINUTE)
        store.revoke(lease_of(store))
        wait_until(lambda: publisher.epoch == 2, MINUTE, what="it is published again")
        publisher.wait_published(MINUTE)
    assert seen[:3] == [
        (PublisherState.PUBLISHING, 0, 0, 0),
        (PublisherState.PUBLISHING, 1, 1, 1),
        (PublisherState.PUBLISHING, 1, 1, 1),
    ]


def test_one_answer_that_there_is_no_lease_is_no_verdict(front: StoreInFront, source: FakeSource) -> None:
    refused = 0

    def refuse_once(call: Call) -> None:
        nonlocal refused
        if call.name == "keep_alive" and not refused:
            refused += 1
            raise LeaseLostError("a follower that lags behind")

    front.before = refuse_once
    with HeartbeatPublisher(front, "w", source, FAST) as publisher:
        publisher.wait_published(MINUTE)
        wait_until(lambda: front.count("keep_alive") > 2, MINUTE, what="it renews on")
        assert (publisher.statistics().losses, publisher.epoch, refused) == (0, 1, 1)


def test_an_outage_is_counted_once_and_costs_nothing(front: StoreInFront, source: FakeSource) -> None:
    with HeartbeatPublisher(front, "w", source, FAST) as publisher:
        publisher.wait_published(MINUTE)
        front.reachable = False
        renewals = front.count("keep_alive")
        wait_until(lambda: front.count("keep_alive") > renewals + 3, MINUTE, what="it tries on")
        front.reachable = True
        wait_until(lambda: front.count("get") > 4, MINUTE, what="it goes on")
        counts = publisher.statistics()
        assert (counts.state, counts.outages, counts.losses, counts.epoch) == (PublisherState.LIVE, 1, 0, 1)
        assert source.calls == ["held", "bound"]


def test_no_call_keeps_a_renewal_waiting_for_longer_than_a_third_of_the_lease(
    front: StoreInFront, source: FakeSource
) -> None:
    with HeartbeatPublisher(front, "w", source, FAST) as publisher:
        publisher.wait_published(MINUTE)
        front.calls.clear()
        source.move(6001, 6002)
        wait_until(lambda: front.count("get") and front.count("put"), MINUTE, what="it looks, and writes")
        calls = [call for call in front.calls if call.name in ("keep_alive", "get", "put")]
        assert {call.timeout_s for call in calls} == {FAST.ttl_s / 3}


def test_a_worker_that_is_not_to_retry_fails_while_another_has_its_name(store: Store, source: FakeSource) -> None:
    store.put(KEY, record("w", 7, session="f" * 32, ttl_s=2 * MINUTE).to_bytes())
    clock = Clock()
    with HeartbeatPublisher(store, "w", source, replace(FAST, on_timeout="stop"), clock=clock) as publisher:
        wait_until(lambda: publisher.error, MINUTE, what="the other one is seen")
        clock.now_s += FAST.publish_timeout_s
        with pytest.raises(ConflictError, match="still in the store"):
            publisher.wait_published(MINUTE)
        assert publisher.state is PublisherState.FAILED


def test_a_bug_of_the_source_is_raised_where_it_is_waited_for(store: Store, source: FakeSource) -> None:
    source.bind_error = ZeroDivisionError("a bug")
    with HeartbeatPublisher(store, "w", source, FAST) as publisher:
        with pytest.raises(TransportError, match="ZeroDivisionError: a bug"):
            publisher.wait_published(MINUTE)
        assert publisher.state is PublisherState.FAILED
    assert stored(store) is None


def test_waiting_says_why_it_was_in_vain(front: StoreInFront, source: FakeSource) -> None:
    front.reachable = False
    publisher = HeartbeatPublisher(front, "w", source, FAST)
    with pytest.raises(ConfigError, match="the publisher is new"):
        publisher.wait_published(MINUTE)
    with publisher:
        wait_until(lambda: publisher.error, MINUTE, what="the store has not answered")
        with pytest.raises(DeadlineExceededError, match="the connection is cut"):
            publisher.wait_published(0.01)
        assert publisher.state is PublisherState.PUBLISHING
    with pytest.raises(ConfigError, match="the publisher is stopped"):
        publisher.wait_published(MINUTE)


def test_waiting_names_the_loss_that_keeps_a_record_from_being_ready(front: StoreInFront, source: FakeSource) -> None:
    def lose(call: Call) -> None:
        if is_put_of(call, SourceStatus.READY):
            raise LeaseLostError("it ended in between")

    front.before = lose
    seldom = replace(FAST, backoff_s=MINUTE, max_backoff_s=MINUTE)
    with HeartbeatPublisher(front, "w", source, seldom) as publisher:
        wait_until(lambda: publisher.statistics().losses, MINUTE, what="the record was lost")
        with pytest.raises(DeadlineExceededError, match="it ended in between"):
            publisher.wait_published(0.01)
        assert isinstance(publisher.error, LeaseLostError)


def test_waiting_ends_with_the_stop(front: StoreInFront, source: FakeSource) -> None:
    front.reachable = False
    clock = Clock()
    outcome: list[BaseException] = []
    publisher = HeartbeatPublisher(front, "w", source, FAST, clock=clock)
    publisher.start()

    def wait() -> None:
        try:
            publisher.wait_published(100 * MINUTE)
        except TransportError as error:
            outcome.append(error)

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    wait_until(lambda: clock.asked_by.count(waiting) >= 2, MINUTE, what="it is about to wait")
    publisher.stop()
    waiting.join(MINUTE)
    assert [type(error) for error in outcome] == [ConfigError]


def test_a_publisher_is_used_once(store: Store, source: FakeSource) -> None:
    with HeartbeatPublisher(store, "w", source, FAST) as publisher, pytest.raises(ConfigError, match="make another"):
        publisher.start()
    with pytest.raises(ConfigError, match="make another"):
        publisher.start()
    publisher.stop()  # idempotent


@pytest.mark.parametrize(
    ("worker_id", "meta", "field"),
    [
        ("", {}, "worker_id"),
        ("w\n", {}, "worker_id"),
        ("w", {"x": object()}, "meta"),
        ("w", {"x": "y" * 70_000}, "meta"),
    ],
)
def test_what_cannot_be_published_is_refused_at_once_and_leaves_nothing(
    tmp_path: Path, source: FakeSource, worker_id: str, meta: dict[str, object], field: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        HeartbeatPublisher(f"local://{tmp_path}/store.db", worker_id, source, FAST, meta=meta)
    assert caught.value.facts["field"] == field
    assert source.calls == []


def test_a_publisher_that_was_never_started_leaves_nothing(store: Store, source: FakeSource) -> None:
    HeartbeatPublisher(store, "w", source, FAST)
    stopped = HeartbeatPublisher(store, "w", source, FAST)
    stopped.stop()
    assert stopped.state is PublisherState.STOPPED


class SlowToRelease(FakeSource):
    """Releases when a test lets it, and reports when it is about to."""

    def __init__(self) -> None:
        super().__init__()
        self.is_asked, self.go_on = threading.Event(), threading.Event()

    def release(self) -> None:
        self.is_asked.set()
        assert self.go_on.wait(MINUTE)
        super().release()


def test_two_threads_that_stop_it_end_it_once(store: Store) -> None:
    source = SlowToRelease()
    publisher = HeartbeatPublisher(store, "w", source, FAST)
    publisher.start()
    publisher.wait_published(MINUTE)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(publisher.stop)
        assert source.is_asked.wait(MINUTE)
        second = pool.submit(publisher.stop)
        source.go_on.set()
        first.result(MINUTE)
        second.result(MINUTE)
    assert source.calls.count("released") == 1
    assert stored(store) is None


class Interrupts(FakeSource):
    """Sends this process a signal in the middle of a stop, and goes on when that was handled."""

    def __init__(self) -> None:
        super().__init__()
        self.is_asked, self.was_handled = False, threading.Event()

    def release(self) -> None:
        super().release()
        if not self.is_asked:
            self.is_asked = True
            os.kill(os.getpid(), signal.SIGUSR1)
            assert self.was_handled.wait(MINUTE)


def test_a_signal_handler_may_stop_what_is_just_being_stopped(store: Store) -> None:
    source = Interrupts()
    publisher = HeartbeatPublisher(store, "w", source, FAST)

    def stop(_number: int, _frame: object) -> None:
        publisher.stop()
        source.was_handled.set()

    before = signal.signal(signal.SIGUSR1, stop)
    try:
        publisher.start()
        publisher.wait_published(MINUTE)
        publisher.stop()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert publisher.state is PublisherState.STOPPED
    assert source.calls.count("released") == 2, "once by each"
    assert stored(store) is None


def test_a_stop_in_a_forked_child_is_not_its_parent_s(store: Store, source: FakeSource) -> None:
    with HeartbeatPublisher(store, "w", source, FAST) as publisher:
        publisher.wait_published(MINUTE)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                publisher.stop()
                code = 7 if source.serves == "bound" else 2
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        assert stored(store) is not None
        assert publisher.state is PublisherState.LIVE


def test_a_sidecar_that_died_before_the_source_is_ready_is_replaced_once_and_causes_no_try(
    tmp_path: Path, source: FakeSource
) -> None:
    source.bind_error = DeadlineExceededError("the ring's lock")
    hour = 60 * MINUTE
    slow = replace(FAST, interval_s=5.0, keeper="process", publish_timeout_s=hour, backoff_s=hour, max_backoff_s=hour)
    with HeartbeatPublisher(f"local://{tmp_path}/store.db", "w", source, slow) as publisher:
        wait_until(lambda: publisher.statistics().keeper_keeps, MINUTE, what="its sidecar renews")
        assert publisher.state is PublisherState.STARTING
        (sidecar,) = sidecars_of(os.getpid())
        os.kill(sidecar, signal.SIGKILL)
        wait_until(lambda: publisher.statistics().keeper_restarts, MINUTE, what="it is missed")
        wait_until(lambda: publisher.statistics().keeper_keeps, MINUTE, what="another renews")
        counts = publisher.statistics()
        assert (counts.keeper_restarts, counts.attempts) == (1, 1)
