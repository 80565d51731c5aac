"""SourceView: its table, row by row."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest

from tests.support.source_records import delete_event, entry_of, put_event, record
from ucxx_transport.membership import Batch, Entry, Event, Snapshot, SourceRecord, SourceStatus
from ucxx_transport.membership.sources import SourceChange, SourceView

A, B = record("a"), record("b")


def snapshot(*entries: Entry) -> Snapshot:
    return Snapshot(revision=1, entries=entries, identity="")


def batch(*events: Event) -> Batch:
    return Batch(revision=2, events=events)


def pairs(changes: Iterable[SourceChange]) -> list[tuple[str, SourceRecord]]:
    return [(change.kind, change.record) for change in changes]


@pytest.fixture
def view() -> SourceView:
    """Knows A."""
    view = SourceView()
    assert pairs(view.take_snapshot(snapshot(entry_of(A)), now=0.0)) == [("add", A)]
    return view


def test_a_record_is_added(view: SourceView) -> None:
    assert pairs(view.take_batch(batch(put_event(B)))) == [("add", B)]
    assert view.sources == (A, B)


def test_the_same_record_again_is_no_news(view: SourceView) -> None:
    assert view.take_batch(batch(put_event(A))) == []
    assert view.take_snapshot(snapshot(entry_of(A)), now=0.0) == []


@pytest.mark.parametrize(
    "words",
    [{"status": SourceStatus.STALE}, {"ports": (1,)}, {"host": "10.0.0.2"}, {"meta": {"a": 1}}, {"ttl_s": 9.0}],
    ids=lambda words: next(iter(words)),
)
def test_other_words_of_one_epoch_are_an_update(view: SourceView, words: dict[str, Any]) -> None:
    other = replace(A, **words)
    assert pairs(view.take_batch(batch(put_event(other)))) == [("update", other)]
    assert view.sources == (other,)


@pytest.mark.parametrize(
    "life", [{"epoch": 2}, {"session": "f" * 32}, {"ring_id": b"x" * 16}], ids=lambda life: next(iter(life))
)
def test_another_life_is_a_removal_and_an_addition(view: SourceView, life: dict[str, Any]) -> None:
    other = replace(A, **life)
    assert pairs(view.take_batch(batch(put_event(other)))) == [("remove", A), ("add", other)]
    assert view.sources == (other,)


def test_a_deleted_record_is_removed_as_it_was_known(view: SourceView) -> None:
    assert pairs(view.take_batch(batch(delete_event("a")))) == [("remove", A)]
    assert view.sources == ()


def test_what_was_never_known_is_never_removed(view: SourceView) -> None:
    assert view.take_batch(batch(delete_event("b"))) == []
    assert view.sources == (A,)


def test_what_a_snapshot_lacks_is_removed(view: SourceView) -> None:
    assert pairs(view.take_snapshot(snapshot(entry_of(B)), now=0.0)) == [("add", B), ("remove", A)]


def test_a_source_that_died_and_came_back_unseen_is_told_so(view: SourceView) -> None:
    again = replace(A, epoch=2)
    assert pairs(view.take_snapshot(snapshot(entry_of(again)), now=0.0)) == [("remove", A), ("add", again)]


def test_a_batch_is_taken_in_its_order(view: SourceView) -> None:
    again = replace(A, epoch=2)
    assert pairs(view.take_batch(batch(delete_event("a"), put_event(again), put_event(B)))) == [
        ("remove", A),
        ("add", again),
        ("add", B),
    ]


def test_after_a_reset_a_source_is_missed_only_when_its_grace_is_over(view: SourceView) -> None:
    assert view.take_snapshot(snapshot(), now=100.0, grace_s=10.0) == []
    assert view.sources == (A,)
    assert view.expire(109.9) == []
    assert pairs(view.expire(110.0)) == [("remove", A)]
    assert view.expire(200.0) == []


def test_a_source_that_is_back_within_its_grace_is_never_missed(view: SourceView) -> None:
    view.take_snapshot(snapshot(), now=100.0, grace_s=10.0)
    assert view.take_batch(batch(put_event(A))) == []
    assert view.expire(1000.0) == []
    assert view.sources == (A,)


def test_a_source_that_is_back_under_a_new_epoch_is_a_removal_and_an_addition(view: SourceView) -> None:
    view.take_snapshot(snapshot(), now=100.0, grace_s=10.0)
    again = replace(A, epoch=2)
    assert pairs(view.take_batch(batch(put_event(again)))) == [("remove", A), ("add", again)]
    assert view.expire(1000.0) == []


def test_a_second_reset_does_not_prolong_the_grace(view: SourceView) -> None:
    view.take_snapshot(snapshot(), now=100.0, grace_s=10.0)
    view.take_snapshot(snapshot(), now=105.0, grace_s=10.0)
    assert pairs(view.expire(110.0)) == [("remove", A)]


def test_a_resync_within_the_grace_does_not_cut_it_short(view: SourceView) -> None:
    view.take_batch(batch(put_event(B)))
    view.take_snapshot(snapshot(entry_of(B)), now=100.0, grace_s=10.0)
    # the changes since were compacted: of the two that it lacks only one is under grace
    assert pairs(view.take_snapshot(snapshot(), now=101.0)) == [("remove", B)]
    assert view.sources == (A,)
    assert pairs(view.expire(110.0)) == [("remove", A)]


def test_a_deletion_within_the_grace_is_one(view: SourceView) -> None:
    view.take_snapshot(snapshot(), now=100.0, grace_s=10.0)
    assert pairs(view.take_batch(batch(delete_event("a")))) == [("remove", A)]
    assert view.expire(1000.0) == []


@pytest.mark.parametrize(
    "value", [b"", b"{}", record("b").to_bytes()], ids=["empty", "no fields", "another worker's record"]
)
def test_what_is_no_record_changes_nothing_and_is_counted(view: SourceView, value: bytes) -> None:
    assert view.take_batch(batch(put_event(value, "sources/a"), put_event(value, "sources/c"))) == []
    assert view.take_snapshot(snapshot(entry_of(value, "sources/a")), now=0.0) == []
    assert view.sources == (A,)
    assert view.malformed == 3
    assert pairs(view.take_batch(batch(delete_event("a")))) == [("remove", A)]


def test_another_spelling_of_a_key_is_not_that_source(view: SourceView) -> None:
    assert view.take_batch(batch(put_event(replace(A, epoch=9), "sources/%61"))) == []
    away = Event(kind="delete", key="sources/%61", value=b"", revision=3)
    assert view.take_batch(batch(away)) == []
    assert pairs(view.take_snapshot(snapshot(entry_of(A, "sources/%61")), now=0.0)) == [("remove", A)]


def test_ids_that_need_encoding_are_known_by_their_own_name() -> None:
    view = SourceView()
    odd = record("a/b ü%")
    assert pairs(view.take_batch(batch(put_event(odd)))) == [("add", odd)]
    assert pairs(view.take_batch(batch(delete_event("a/b ü%")))) == [("remove", odd)]
