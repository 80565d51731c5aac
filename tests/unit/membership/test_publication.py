"""One life of a record: what every step leaves in the store when it succeeds, fails, or its answer is lost."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.support.record_history import History
from tests.support.rows import row
from tests.support.source_records import record
from tests.support.store_in_front import Call, StoreInFront
from ucxx_transport.errors import (
    ConflictError,
    LeaseLostError,
    StorePermissionError,
    StoreUnavailableError,
    TransportError,
)
from ucxx_transport.membership import Offer, SourceRecord, SourceStatus, Store
from ucxx_transport.membership.sources import Publication, next_epoch

KEY = "sources/w"
RECORD = record("w", 3)
OFFER = Offer(ring_id=RECORD.ring_id, ring_name=RECORD.ring_name, host_id="x", host="10.0.0.9", ports=(7,))


def begun(store: Store) -> Publication:
    return Publication(store, RECORD, ttl_s=6.0)


def stored(store: Store) -> SourceRecord | None:
    entry = store.get(KEY)
    return None if entry is None else SourceRecord.from_bytes(entry.value)


def failing(name: str, error: TransportError, times: int = 1) -> Callable[[Call], None]:
    left = times

    def hook(call: Call) -> None:
        nonlocal left
        if call.name == name and left:
            left -= 1
            raise error

    return hook


AWAY = StoreUnavailableError("away")


def test_a_record_begins_as_starting_under_a_lease_of_its_own(store: Store) -> None:
    publication = begun(store)
    found, entry = stored(store), store.get(KEY)
    assert found is not None
    assert entry is not None
    assert (found.status, found.epoch, found.ttl_s) == (SourceStatus.STARTING, 3, publication.lease.ttl_s)
    assert entry.lease_id == publication.lease.lease_id
    store.revoke(publication.lease.lease_id)
    assert stored(store) is None


def test_a_record_that_is_there_already_is_left_alone(store: Store) -> None:
    store.put(KEY, b"another's")
    with pytest.raises(ConflictError):
        begun(store)
    assert (found := store.get(KEY)) is not None
    assert found.value == b"another's"


@pytest.mark.parametrize(
    "error", [AWAY, StorePermissionError("no"), LeaseLostError("gone")], ids=lambda e: type(e).__name__
)
@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_beginning_that_fails_leaves_no_lease_and_no_record(
    store: Store, front: StoreInFront, error: TransportError, moment: str
) -> None:
    setattr(front, moment, failing("put", error))
    with pytest.raises(type(error)):
        begun(front)
    assert stored(store) is None
    assert [call.name for call in front.calls] == ["grant", "put", "revoke"]
    begun(front)  # and so the next try may do


def test_a_beginning_without_a_lease_writes_nothing(front: StoreInFront) -> None:
    front.before = failing("grant", AWAY)
    with pytest.raises(StoreUnavailableError):
        begun(front)
    assert [call.name for call in front.calls] == ["grant"]


def test_an_update_is_written_only_where_it_is_new(store: Store, front: StoreInFront) -> None:
    publication = begun(front)
    assert publication.update(SourceStatus.READY, OFFER)
    found = stored(store)
    assert found is not None
    assert (found.status, found.host, found.ports) == (SourceStatus.READY, "10.0.0.9", (7,))
    puts = front.count("put")
    assert not publication.update(SourceStatus.READY, OFFER)
    assert not publication.update(SourceStatus.READY)
    assert front.count("put") == puts
    assert publication.update(SourceStatus.STALE)
    assert stored(store) == publication.record
    assert publication.record.ports == (7,)


def test_a_write_that_did_not_arrive_is_made_again(history: History, front: StoreInFront) -> None:
    publication = begun(front)
    front.before = failing("put", AWAY)
    with pytest.raises(StoreUnavailableError):
        publication.update(SourceStatus.READY)
    assert publication.record.status is SourceStatus.STARTING
    assert publication.update(SourceStatus.READY)
    assert history.statuses() == ["starting", "ready"]


def test_a_write_whose_answer_was_lost_is_recognised(history: History, front: StoreInFront) -> None:
    publication = begun(front)
    front.after = failing("put", AWAY)
    with pytest.raises(StoreUnavailableError):
        publication.update(SourceStatus.READY)
    assert publication.update(SourceStatus.READY)
    assert publication.update(SourceStatus.STALE)  # its revision is known, too
    assert history.statuses() == ["starting", "ready", "stale"]


def test_a_write_without_an_answer_never_arrives_behind_the_one_that_takes_it_back(
    store: Store, history: History, front: StoreInFront
) -> None:
    for withdrawn in (False, True):
        with row(withdrawn=withdrawn):
            publication = begun(front)
            publication.update(SourceStatus.STALE)
            entry = store.get(KEY)
            assert entry is not None
            front.before = failing("put", AWAY)
            with pytest.raises(StoreUnavailableError):
                publication.update(SourceStatus.READY)
            late = replace(publication.record, status=SourceStatus.READY).to_bytes()

            def arrive(call: Call, late: bytes = late, revision: int = entry.revision) -> None:
                if call.name == "revoke":
                    with pytest.raises(ConflictError):
                        store.put(KEY, late, expected=revision)

            front.before = arrive
            if not withdrawn:
                assert publication.update(SourceStatus.STALE)
                assert not publication.update(SourceStatus.STALE)
                arrive(Call(name="revoke"))
            publication.withdraw(1.0)
    assert history.statuses() == ["starting", "stale", "stale", "gone"] * 2


def test_another_s_record_is_never_overwritten(store: Store) -> None:
    publication = begun(store)
    other = record("w", 4, session="f" * 32)
    store.put(KEY, other.to_bytes())
    with pytest.raises(ConflictError):
        publication.update(SourceStatus.READY)
    assert stored(store) == other


def test_nothing_is_written_under_a_lease_that_has_ended(store: Store) -> None:
    publication = begun(store)
    store.revoke(publication.lease.lease_id)
    with pytest.raises((ConflictError, LeaseLostError)):
        publication.update(SourceStatus.READY)
    assert stored(store) is None


def test_whether_the_record_is_there_is_looked_for_by_its_content(store: Store) -> None:
    publication = begun(store)
    publication.require_there()
    publication.update(SourceStatus.READY)
    publication.require_there()
    store.put(KEY, record("w", 4).to_bytes())
    with pytest.raises(LeaseLostError):
        publication.require_there()
    store.delete(KEY)
    with pytest.raises(LeaseLostError):
        publication.require_there()


def test_a_withdrawal_says_stale_and_then_the_record_goes(store: Store, history: History) -> None:
    publication = begun(store)
    publication.update(SourceStatus.READY)
    publication.withdraw(1.0)
    assert history.statuses() == ["starting", "ready", "stale", "gone"]
    with pytest.raises(LeaseLostError):
        store.keep_alive(publication.lease.lease_id)


def test_a_withdrawal_leaves_another_s_record_alone(store: Store) -> None:
    publication = begun(store)
    other = record("w", 4, session="f" * 32)
    store.put(KEY, other.to_bytes(), lease_id=store.grant(60.0).lease_id)
    publication.withdraw(1.0)
    assert stored(store) == other
    with pytest.raises(LeaseLostError):
        store.keep_alive(publication.lease.lease_id)


def test_a_withdrawal_after_the_lease_has_ended_is_none(store: Store) -> None:
    publication = begun(store)
    store.revoke(publication.lease.lease_id)
    publication.withdraw(1.0)
    assert stored(store) is None


def test_a_withdrawal_that_cannot_say_stale_for_a_conflict_still_ends_the_lease(
    store: Store, front: StoreInFront
) -> None:
    publication = begun(front)
    front.after = failing("put", AWAY)
    with pytest.raises(StoreUnavailableError):
        publication.update(SourceStatus.READY)  # it arrived, and so the next write expects too old a revision
    publication.withdraw(1.0)
    assert stored(store) is None


def test_a_withdrawal_that_the_store_does_not_hear_says_so(history: History, front: StoreInFront) -> None:
    publication = begun(front)
    front.reachable = False
    with pytest.raises(StoreUnavailableError):
        publication.withdraw(1.0)
    assert history.statuses() == ["starting"]


def test_a_withdrawal_without_time_asks_for_none(front: StoreInFront) -> None:
    publication = begun(front)
    publication.withdraw(0.0)
    assert [(call.name, call.timeout_s) for call in front.calls[-2:]] == [("put", 0.0), ("revoke", 0.0)]


def test_epochs_count_up_from_the_last_one_ever(store: Store) -> None:
    assert [next_epoch(store, "w", known=0) for _ in range(3)] == [1, 2, 3]
    assert next_epoch(store, "another/w", known=0) == 1


def test_an_epoch_is_larger_than_those_of_a_store_that_was_wiped(store: Store) -> None:
    assert next_epoch(store, "w", known=41) == 42
    assert next_epoch(store, "w", known=7) == 43


def test_an_epoch_outlives_leases_and_records(store: Store) -> None:
    publication = Publication(store, record("w", next_epoch(store, "w", known=0)), ttl_s=6.0)
    publication.withdraw(1.0)
    assert next_epoch(store, "w", known=0) == 2


def test_an_epoch_is_given_even_over_a_malformed_one(store: Store) -> None:
    store.put("epochs/w", b"\xffnonsense")
    assert next_epoch(store, "w", known=4) == 5
    assert (found := store.get("epochs/w")) is not None
    assert found.value == b"5"


def test_no_epoch_is_given_twice_to_those_who_race_for_it(store: Store) -> None:
    given: list[int] = []
    start = threading.Barrier(4)

    def take() -> None:
        start.wait(60)
        mine: list[int] = []
        while len(mine) < 10:
            try:
                mine.append(next_epoch(store, "w", known=mine[-1] if mine else 0))
            except ConflictError:
                continue
        assert mine == sorted(mine)
        given.extend(mine)

    racers = [threading.Thread(target=take) for _ in range(4)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    assert sorted(given) == list(range(1, 41))


def test_a_lost_race_for_an_epoch_is_a_conflict(store: Store, front: StoreInFront) -> None:
    def overtaken(call: Call) -> None:
        if call.name == "put":
            front.before = lambda _: None
            next_epoch(store, "w", known=0)

    front.before = overtaken
    with pytest.raises(ConflictError):
        next_epoch(front, "w", known=0)
    assert next_epoch(front, "w", known=0) == 2
