"""What every store does the same: each method and each error of the Store protocol."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from typing import Any

import pytest

from tests.support.exhaustive import exhaustive
from tests.support.store_processes import elsewhere, fork, hold_lease, increment, increments, take_once
from tests.support.store_rigs import StoreRig, error_of
from tests.support.waiting import wait_until
from ucxx_transport.errors import (
    CompactedError,
    ConfigError,
    ConflictError,
    LeaseLostError,
    StoreResetError,
    StoreUnavailableError,
)
from ucxx_transport.membership.entries import MAX_KEY_BYTES, MAX_VALUE_BYTES, Batch, Entry, Event
from ucxx_transport.membership.store import Store, Watch

DEADLINE_S = 20.0


@pytest.fixture
def store(rig: StoreRig) -> Store:
    store = rig.open()
    store.snapshot()  # its identity is given when it is first asked for, and may count as a change
    return store


def next_batch(watch: Watch) -> Batch:
    """The next batch; fails when none comes."""
    batch = watch.next(DEADLINE_S)
    assert batch is not None
    return batch


def keys_of(batch: Batch) -> list[tuple[str, str]]:
    return [(event.kind, event.key) for event in batch.events]


# keys and values


def test_a_key_has_its_value_and_the_revision_of_its_last_change(store: Store) -> None:
    assert store.get("a") is None
    first = store.put("a", b"1")
    assert store.get("a") == Entry(key="a", value=b"1", revision=first, lease_id=None)
    second = store.put("a", b"2")
    assert second > first
    assert store.get("a") == Entry(key="a", value=b"2", revision=second, lease_id=None)


def test_a_key_is_created_once(store: Store) -> None:
    revision = store.put("a", b"1", expected=0)
    with pytest.raises(ConflictError):
        store.put("a", b"2", expected=0)
    assert store.get("a") == Entry(key="a", value=b"1", revision=revision, lease_id=None)


def test_a_change_that_expects_another_revision_changes_nothing(store: Store) -> None:
    stale = store.put("a", b"1")
    revision = store.put("a", b"2", expected=stale)
    for wrong in (stale, revision + 1, 0):
        with pytest.raises(ConflictError):
            store.put("a", b"3", expected=wrong)
        with pytest.raises(ConflictError):
            store.delete("a", expected=wrong)
    with pytest.raises(ConflictError):
        store.put("missing", b"", expected=stale)
    snapshot = store.snapshot()
    assert [(entry.key, entry.value, entry.revision) for entry in snapshot] == [("a", b"2", revision)]
    assert snapshot.revision == revision


def test_a_deleted_key_is_gone_and_can_be_made_again(store: Store) -> None:
    revision = store.put("a", b"1")
    assert store.delete("a", expected=revision)
    assert store.get("a") is None
    assert not store.delete("a")
    assert not store.delete("a", expected=revision)
    assert store.put("a", b"2", expected=0) > revision
    assert store.delete("a")


def test_deleting_what_is_not_there_is_no_change(store: Store) -> None:
    before = store.put("a", b"")
    store.delete("b")
    assert store.snapshot().revision == before


def test_keys_of_every_kind_come_back(store: Store) -> None:
    keys = ("a", "a/b", "weiß/你好/🙂", "with space", "quote'\"`;--", "percent%2F", "\x00", "x" * MAX_KEY_BYTES)
    for key in keys:
        with store.watch(key, after=store.snapshot().revision) as watch:
            revision = store.put(key, b"value")
            assert [entry.key for entry in store.snapshot(key)] == [key]
            assert next_batch(watch).events == (Event(kind="put", key=key, value=b"value", revision=revision),)
        assert store.delete(key), key


def test_values_of_every_kind_come_back(store: Store) -> None:
    for value in (b"", b"\x00", bytes(range(256)) * 4, os.urandom(MAX_VALUE_BYTES)):
        store.put("key", value)
        found = store.get("key")
        assert found is not None
        assert found.value == value, value[:8]


def test_what_is_no_key_is_refused(store: Store) -> None:
    wrong: list[Any] = ["", "/a", "x" * (MAX_KEY_BYTES + 1), "\udc80", b"bytes"]
    for key in wrong:
        for call in (partial(store.put, key, b""), partial(store.get, key), partial(store.delete, key)):
            with pytest.raises(ConfigError):
                call()


def test_what_is_no_value_lease_or_revision_is_refused(store: Store) -> None:
    text: Any = "text"
    calls: list[Callable[[], object]] = [
        lambda: store.put("a", bytes(MAX_VALUE_BYTES + 1)),
        lambda: store.put("a", text),
        lambda: store.put("a", b"", lease_id=0),
        lambda: store.put("a", b"", expected=-1),
        lambda: store.keep_alive(-1),
        lambda: store.revoke(0),
        lambda: store.grant(0),
        lambda: store.grant(float("nan")),
        lambda: store.snapshot("/a"),
        lambda: store.watch("/a", after=0),
    ]
    for call in calls:
        with pytest.raises(ConfigError):
            call()
    assert store.get("a") is None


def test_a_snapshot_has_the_keys_below_its_prefix_in_order(store: Store) -> None:
    for key in ("b/2", "b/1", "b", "b0", "a", "c", "b/ü", "b/10"):
        store.put(key, key.encode())
    lone = store.snapshot("b/")
    assert [entry.key for entry in lone] == ["b/1", "b/10", "b/2", "b/ü"]
    assert [entry.value for entry in lone] == [entry.key.encode() for entry in lone]
    assert [entry.key for entry in store.snapshot("b")] == ["b", "b/1", "b/10", "b/2", "b/ü", "b0"]
    assert [entry.key for entry in store.snapshot()] == ["a", "b", "b/1", "b/10", "b/2", "b/ü", "b0", "c"]
    assert store.snapshot("d").entries == ()
    assert store.snapshot("d").revision == store.snapshot().revision


def test_a_large_snapshot_is_whole(store: Store) -> None:
    for number in range(40):
        store.put(f"large/{number:02}", bytes([number]) * 100_000)
    found = store.snapshot("large/")
    assert [entry.value[:1] for entry in found] == [bytes([number]) for number in range(40)]


def test_namespaces_do_not_see_each_other(rig: StoreRig) -> None:
    name = str(rig.settings["namespace"])
    one, other = rig.open(), rig.open(namespace=f"{name}0")
    with other.watch(after=other.snapshot().revision) as watch:
        one.put("key", b"one")
        assert other.get("key") is None
        assert other.snapshot().entries == ()
        other.put("key", b"other", expected=0)
        assert [event.value for event in next_batch(watch).events] == [b"other"]
    assert [entry.value for entry in one.snapshot()] == [b"one"]


# leases


def test_a_lease_lives_at_least_as_long_as_asked_for(store: Store) -> None:
    assert store.grant(2.5).ttl_s >= 2.5
    lease = store.grant(5)
    assert lease.ttl_s >= 5
    assert lease.lease_id != 0
    assert store.keep_alive(lease.lease_id) >= 5
    assert store.grant(5).lease_id != lease.lease_id


def test_the_keys_of_a_lease_that_runs_out_go_in_one_batch_and_not_before(rig: StoreRig) -> None:
    store = rig.open()
    with store.watch(after=store.snapshot().revision) as watch:
        asked = time.monotonic()
        lease = store.grant(rig.ttl_s)
        for key in ("z", "a", "m"):
            store.put(key, b"", lease_id=lease.lease_id)
            assert keys_of(next_batch(watch)) == [("put", key)]
        batch = next_batch(watch)
        took = time.monotonic() - asked
    assert sorted(keys_of(batch)) == [("delete", "a"), ("delete", "m"), ("delete", "z")]
    assert {(event.value, event.lease_id, event.revision) for event in batch.events} == {(b"", None, batch.revision)}
    assert took >= rig.ttl_s
    assert store.snapshot().entries == ()
    with pytest.raises(LeaseLostError):
        store.keep_alive(lease.lease_id)
    with pytest.raises(LeaseLostError):
        store.put("a", b"late", lease_id=lease.lease_id)
    assert store.get("a") is None
    store.revoke(lease.lease_id)


def test_a_lease_that_is_renewed_lives(rig: StoreRig) -> None:
    store = rig.open()
    lease = store.grant(rig.ttl_s)
    store.put("kept", b"", lease_id=lease.lease_id)
    other = store.grant(rig.ttl_s)
    store.put("left", b"", lease_id=other.lease_id)
    with store.watch(after=store.snapshot().revision) as watch:
        end = time.monotonic() + DEADLINE_S
        while (batch := watch.next(rig.ttl_s / 5)) is None:
            assert time.monotonic() < end
            assert store.keep_alive(lease.lease_id) >= rig.ttl_s
        assert keys_of(batch) == [("delete", "left")]
        found = store.get("kept")
        assert found is not None
        assert found.lease_id == lease.lease_id


def test_an_unknown_lease_is_lost(store: Store) -> None:
    with pytest.raises(LeaseLostError):
        store.keep_alive(12345)
    with pytest.raises(LeaseLostError):
        store.put("a", b"", lease_id=12345)
    with pytest.raises(LeaseLostError):
        store.put("a", b"", lease_id=12345, expected=0)
    assert store.snapshot().entries == ()
    store.revoke(12345)


def test_revoking_a_lease_removes_its_keys_in_one_batch(store: Store) -> None:
    lease = store.grant(60)
    count = 300
    for number in range(count):
        store.put(f"many/{number:03}", b"", lease_id=lease.lease_id)
    revision = store.put("other", b"")
    with store.watch("many/", after=revision) as watch:
        store.revoke(lease.lease_id)
        batch = next_batch(watch)
        assert sorted(keys_of(batch)) == [("delete", f"many/{number:03}") for number in range(count)]
        assert {event.revision for event in batch.events} == {batch.revision}
        assert store.snapshot().revision == batch.revision
    store.revoke(lease.lease_id)
    assert [entry.key for entry in store.snapshot()] == ["other"]


def test_a_key_dies_with_the_lease_of_its_last_put_alone(store: Store) -> None:
    first, second = store.grant(60), store.grant(60)
    for key in ("moved", "freed", "stays"):
        store.put(key, b"", lease_id=first.lease_id)
    store.put("moved", b"", lease_id=second.lease_id)
    store.put("freed", b"")
    store.revoke(first.lease_id)
    assert [(entry.key, entry.lease_id) for entry in store.snapshot()] == [
        ("freed", None),
        ("moved", second.lease_id),
    ]
    store.revoke(second.lease_id)
    assert [entry.key for entry in store.snapshot()] == ["freed"]


def test_a_lease_without_keys_ends_without_a_revision(store: Store) -> None:
    before = store.put("a", b"")
    store.revoke(store.grant(60).lease_id)
    assert store.snapshot().revision == before


# watches


def test_a_watch_after_a_snapshot_misses_nothing_and_repeats_nothing(store: Store) -> None:
    store.put("w/before", b"")
    snapshot = store.snapshot("w/")
    lease = store.grant(60)
    one = store.put("w/a", b"1", lease_id=lease.lease_id)
    store.put("elsewhere", b"")
    with store.watch("w/", after=snapshot.revision) as watch:
        two = store.put("w/b", b"2")
        store.delete("w/a")
        assert next_batch(watch) == Batch(
            revision=one,
            events=(Event(kind="put", key="w/a", value=b"1", revision=one, lease_id=lease.lease_id),),
        )
        assert next_batch(watch) == Batch(
            revision=two, events=(Event(kind="put", key="w/b", value=b"2", revision=two, lease_id=None),)
        )
        assert keys_of(next_batch(watch)) == [("delete", "w/a")]
        assert watch.next(0.05) is None
        assert watch.next(0) is None


def test_a_watch_goes_on_where_another_was_cut_off(store: Store) -> None:
    after = store.snapshot().revision
    revisions = [store.put("w", str(number).encode()) for number in range(30)]
    seen: list[int] = []
    while len(seen) < len(revisions):
        with store.watch("w", after=after) as watch:
            for _ in range(7):
                if len(seen) == len(revisions):
                    break
                after = next_batch(watch).revision
                seen.append(after)
    assert seen == revisions


def test_a_watch_receives_changes_while_it_waits(rig: StoreRig) -> None:
    store, other = rig.open(), rig.open()
    with store.watch("w/", after=store.snapshot().revision) as watch, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(lambda: [next_batch(watch).revision for _ in range(20)])
        revisions = [(store if number % 2 else other).put(f"w/{number}", b"now") for number in range(20)]
        assert waiting.result() == revisions


def test_many_watches_of_one_store_each_receive_everything(store: Store) -> None:
    after = store.snapshot().revision
    with ExitStack() as stack:
        watches = [stack.enter_context(store.watch(f"w/{number % 2}/", after=after)) for number in range(6)]
        revisions = [store.put(f"w/{number % 2}/key", b"") for number in range(20)]
        for number, watch in enumerate(watches):
            assert [next_batch(watch).revision for _ in range(10)] == revisions[number % 2 :: 2]


def test_large_changes_come_whole_and_in_order(store: Store) -> None:
    with store.watch("w/", after=store.snapshot().revision) as watch:
        revisions = [store.put(f"w/{number}", bytes([number]) * (MAX_VALUE_BYTES // 2)) for number in range(12)]
        batches = [next_batch(watch) for _ in revisions]
    assert [batch.revision for batch in batches] == revisions
    assert [batch.events[0].value for batch in batches] == [
        bytes([number]) * (MAX_VALUE_BYTES // 2) for number in range(12)
    ]


def test_a_watch_closed_by_another_thread_ends(store: Store) -> None:
    watch = store.watch(after=store.snapshot().revision)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(watch.next, 10 * DEADLINE_S)
        threading.Timer(0.05, watch.close).start()
        with pytest.raises(StoreUnavailableError):
            waiting.result(timeout=DEADLINE_S)
    watch.close()
    with pytest.raises(StoreUnavailableError):
        watch.next(1)


def test_a_watch_that_is_never_waited_for_is_closed_too(store: Store) -> None:
    watch = store.watch(after=0)
    watch.close()
    with pytest.raises(StoreUnavailableError):
        watch.next(0)


def test_a_compacted_revision_is_an_error_and_a_snapshot_is_the_remedy(rig: StoreRig) -> None:
    store = rig.open()
    old = store.put("a", b"1")
    store.put("a", b"2")
    rig.compact(store)
    with store.watch(after=old) as watch:
        assert isinstance(error_of(watch), CompactedError)
    snapshot = store.snapshot("a")
    with store.watch("a", after=snapshot.revision) as watch:
        store.put("a", b"3")
        assert [event.value for event in next_batch(watch).events] == [b"3"]


def test_a_watch_that_receives_nothing_outlives_a_compaction(rig: StoreRig) -> None:
    store = rig.open()
    with store.watch("quiet/", after=store.snapshot().revision) as watch:
        rig.compact(store, between=lambda: watch.next(0))
        revision = store.put("quiet/a", b"")
        assert next_batch(watch).revision == revision


def test_a_revision_that_the_store_has_not_reached_is_a_reset(store: Store) -> None:
    with store.watch(after=store.snapshot().revision + 1000) as watch:
        assert isinstance(error_of(watch), StoreResetError)


# wiped, started again, stalled, closed


@pytest.mark.may_leave("processes", reason="the server that all tests share, started again")
def test_a_wiped_store_ends_its_watches_and_starts_over(rig: StoreRig) -> None:
    store = rig.open()
    identity = store.snapshot().identity
    lease = store.grant(60)
    store.put("a", b"1", lease_id=lease.lease_id)
    with store.watch(after=store.snapshot().revision) as idle:
        assert idle.next(0.1) is None
        rig.wipe()
        assert isinstance(error_of(idle), StoreResetError)
    with store.watch(after=0) as again:  # a user that starts over need not have asked anything else
        assert again.next(0.1) is None
    assert wait_until(lambda: answer(lambda: store.snapshot().identity), DEADLINE_S) != identity
    assert store.snapshot().entries == ()
    with pytest.raises(LeaseLostError):
        store.keep_alive(lease.lease_id)
    revision = store.put("a", b"2", expected=0)
    with store.watch(after=revision) as watch:
        store.put("b", b"")
        assert keys_of(next_batch(watch)) == [("put", "b")]


def answer(call: Callable[[], str]) -> str | None:
    """What the store answers, None while it cannot be reached."""
    try:
        return call()
    except StoreUnavailableError:
        return None


@pytest.mark.may_leave("processes", reason="the server that all tests share, started again")
def test_a_watch_begun_before_a_wipe_and_used_after_it_is_reset(rig: StoreRig) -> None:
    store = rig.open()
    store.put("a", b"1")
    found = store.snapshot()
    revision = found.revision
    watch = store.watch(after=revision, identity=found.identity)
    rig.wipe()
    with watch:
        wait_until(lambda: answer(lambda: rig.open().snapshot().identity), DEADLINE_S)
        for _ in range(revision + 5):
            rig.open().put("b", b"")
        assert isinstance(error_of(watch), StoreResetError)


@pytest.mark.may_leave("processes", reason="the server that all tests share, started again")
def test_a_store_started_again_has_its_data(shared_rig: StoreRig) -> None:
    store = shared_rig.open()
    identity = store.snapshot().identity
    lease = store.grant(60)
    revision = store.put("a", b"1", lease_id=lease.lease_id)
    shared_rig.restart()
    store = shared_rig.open()
    assert wait_until(lambda: answer(lambda: store.snapshot().identity), DEADLINE_S) == identity
    assert store.get("a") == Entry(key="a", value=b"1", revision=revision, lease_id=lease.lease_id)
    assert store.keep_alive(lease.lease_id) >= 60
    with store.watch(after=revision - 1) as watch:
        assert next_batch(watch).revision == revision
        store.put("b", b"")
        assert keys_of(next_batch(watch)) == [("put", "b")]


def test_a_stalled_store_is_unavailable_at_the_deadline_and_serves_again_after(shared_rig: StoreRig) -> None:
    store = shared_rig.open()
    lease = store.grant(60)
    store.put("a", b"1")
    calls: list[Callable[[], object]] = [
        lambda: store.put("a", b"2", timeout_s=0.1),
        lambda: store.delete("a", timeout_s=0.1),
        lambda: store.grant(5, timeout_s=0.1),
        lambda: store.keep_alive(lease.lease_id, timeout_s=0.1),
        lambda: store.revoke(lease.lease_id, timeout_s=0.1),
    ]
    if shared_rig.kind == "etcd":  # the readers of a file wait for no writer
        calls += [
            lambda: store.get("a", timeout_s=0.1),
            lambda: store.snapshot(timeout_s=0.1),
        ]
    shared_rig.stall()
    try:
        for call in calls:
            began = time.monotonic()
            with pytest.raises(StoreUnavailableError):
                call()
            assert 0.05 < time.monotonic() - began < 5
    finally:
        shared_rig.resume()
    assert store.put("b", b"3") > 0
    assert {entry.key for entry in store.snapshot()} <= {"a", "b"}


def test_the_configured_time_limit_counts_where_a_call_names_none(shared_rig: StoreRig) -> None:
    store = shared_rig.open(timeout_s="200ms")
    store.put("a", b"1")
    shared_rig.stall()
    try:
        with pytest.raises(StoreUnavailableError):
            store.put("a", b"2")
    finally:
        shared_rig.resume()


def test_a_closed_store_refuses_and_its_watches_end(rig: StoreRig) -> None:
    store = rig.open()
    lease = store.grant(60)
    store.put("a", b"", lease_id=lease.lease_id)
    watch = store.watch(after=store.snapshot().revision)
    assert watch.next(0.05) is None
    store.close()
    store.close()
    with pytest.raises(StoreUnavailableError):
        watch.next(1)
    for call in (lambda: store.get("a"), lambda: store.put("a", b""), lambda: store.watch(after=0)):
        with pytest.raises(ConfigError, match="closed"):
            call()
    found = rig.open().get("a")
    assert found is not None
    assert found.lease_id == lease.lease_id


def test_the_identity_is_the_same_for_every_user(rig: StoreRig) -> None:
    identity = rig.open().snapshot().identity
    assert len(identity) >= 16
    assert rig.open().snapshot("a/").identity == identity


# processes and threads


@pytest.mark.parametrize("shared_kind", ["local", exhaustive("etcd")], indirect=True)
def test_a_killed_lease_holders_keys_go_in_one_batch(shared_rig: StoreRig) -> None:
    store = shared_rig.open()
    keys = ["h/1", "h/2", "h/3"]
    with elsewhere(hold_lease, shared_rig.url, shared_rig.settings, shared_rig.ttl_s, keys) as (process, pipe):
        lease = pipe.recv()
        assert [entry.lease_id for entry in store.snapshot("h/")] == [lease.lease_id] * 3
        with store.watch("h/", after=store.snapshot().revision) as watch:
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
            assert sorted(keys_of(next_batch(watch))) == [("delete", key) for key in keys]
    assert store.snapshot().entries == ()


def ready(pipes: list[Any]) -> None:
    """Start all at the same moment."""
    for pipe in pipes:
        assert pipe.recv() == "ready"
    for pipe in pipes:
        pipe.send("go")


@pytest.fixture
def crowd(shared_rig: StoreRig) -> Iterator[Callable[..., list[Any]]]:
    """Starts a target in several processes at once; returns what each answers."""
    with ExitStack() as stack:

        def run(target: Callable[..., None], words: list[tuple[object, ...]]) -> list[Any]:
            pipes = [
                stack.enter_context(elsewhere(target, shared_rig.url, shared_rig.settings, *each))[1] for each in words
            ]
            ready(pipes)
            return [pipe.recv() for pipe in pipes]

        yield run


def test_of_processes_that_make_the_same_keys_each_key_has_one_maker(
    shared_rig: StoreRig, crowd: Callable[..., list[Any]]
) -> None:
    keys = [f"race/{number}" for number in range(25)]
    won = crowd(take_once, [(keys, str(number)) for number in range(3)])
    assert sorted(key for each in won for key in each) == sorted(keys)
    for entry in shared_rig.open().snapshot("race/"):
        assert entry.key in won[int(entry.value)]


def test_processes_that_count_by_expected_revisions_lose_no_count(
    shared_rig: StoreRig, crowd: Callable[..., list[Any]]
) -> None:
    assert crowd(increment, [("count", 20)] * 3) == ["done"] * 3
    found = shared_rig.open().get("count")
    assert found is not None
    assert int(found.value) == 60


def test_threads_share_a_store(rig: StoreRig) -> None:
    store = rig.open()

    def use(number: int) -> None:
        increments(store, "count", 10)
        store.put(f"own/{number}", b"")

    with store.watch("own/", after=store.snapshot().revision) as watch, ThreadPoolExecutor(6) as pool:
        list(pool.map(use, range(6)))
        batches = [next_batch(watch) for _ in range(6)]
    assert sorted(event.key for batch in batches for event in batch.events) == [f"own/{number}" for number in range(6)]
    assert [batch.revision for batch in batches] == sorted(batch.revision for batch in batches)
    found = store.get("count")
    assert found is not None
    assert int(found.value) == 60


def test_a_forked_child_has_connections_of_its_own(shared_rig: StoreRig) -> None:
    with elsewhere(fork, shared_rig.url, shared_rig.settings) as (_process, pipe):
        assert pipe.recv() == 0
    store = shared_rig.open()
    found = store.get("count")
    assert found is not None
    assert int(found.value) == 40
    assert {"before", "after", "own"} <= {entry.key for entry in store.snapshot()}
