from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from tests.support.memory_store import MemoryStore
from ucxx_transport.errors import ConfigError, ProtocolError, RegistryError
from ucxx_transport.groups.decisions import GroupSnapshot, parse_policy_version
from ucxx_transport.groups.view import (
    NO_VIEW,
    GroupView,
    MemberRecord,
    RankEvent,
    RankState,
    Seat,
)
from ucxx_transport.membership.entries import GroupKeys

VIEW = GroupView(
    epoch=7,
    seats=(
        Seat(rank=0, incarnation="a", state=RankState.ACTIVE, awaited=1),
        Seat(rank=1, incarnation="b", state=RankState.JOINING, awaited=7),
        Seat(rank=2, incarnation="c", state=RankState.GONE, awaited=3, ended_by=RankEvent.DROP),
        Seat(rank=5, incarnation="d", state=RankState.INACTIVE, awaited=3),
    ),
)
RECORD = MemberRecord(rank=3, incarnation="e", epoch=7, ttl_s=6.5, address="10.0.0.1", meta={"ports": [1, 2]})


def test_a_view_says_who_is_in_the_group() -> None:
    assert VIEW.active_ranks == (0,)
    assert VIEW.ranks == (0, 1, 5)
    assert [VIEW.state_of(rank).name for rank in range(4)] == ["ACTIVE", "JOINING", "GONE", "ISOLATED"]
    assert VIEW.seats_incarnation(1, "b")
    assert not VIEW.seats_incarnation(1, "x")
    assert not VIEW.seats_incarnation(2, "c")
    assert not VIEW.seats_incarnation(3, "x")


def test_what_is_stored_comes_back_and_is_readable_json() -> None:
    assert GroupView.from_bytes(VIEW.to_bytes()) == VIEW
    assert MemberRecord.from_bytes(RECORD.to_bytes()) == RECORD
    assert json.loads(VIEW.to_bytes())["seats"][2]["ended_by"] == "drop"
    assert json.loads(RECORD.to_bytes())["meta"] == {"ports": [1, 2]}


def test_an_incarnation_takes_a_free_or_a_gone_seat_and_no_other() -> None:
    fresh = Seat(rank=2).after(RankEvent.ADMIT, epoch=8, incarnation="new")
    assert VIEW.seat_of(2).after(RankEvent.ADMIT, epoch=8, incarnation="new") == fresh
    assert (fresh.state, fresh.incarnation, fresh.awaited, fresh.ended_by) == (RankState.JOINING, "new", 8, None)
    with pytest.raises(RegistryError):
        VIEW.seat_of(0).after(RankEvent.ADMIT, epoch=8, incarnation="new")


def test_a_recalled_rank_joins_once_more_with_the_epoch_that_recalls_it() -> None:
    seat = VIEW.seats[3].after(RankEvent.RECALL, epoch=9)
    assert (seat.state, seat.awaited) == (RankState.JOINING, 9)
    assert VIEW.seats[0].after(RankEvent.DEACTIVATE, epoch=9).awaited == 1
    with pytest.raises(RegistryError):
        VIEW.seats[0].after(RankEvent.RECALL, epoch=9)


def changed(raw: bytes, **values: object) -> bytes:
    return json.dumps({**json.loads(raw), **values}).encode()


def test_a_malformed_view_is_refused() -> None:
    raw = VIEW.to_bytes()
    seats = json.loads(raw)["seats"]
    rows = [
        b"",
        b"[]",
        b"\xff",
        b"[" * 100_000,
        changed(raw, version=2),
        changed(raw, epoch=-1),
        changed(raw, epoch=True),
        changed(raw, seats={}),
        changed(raw, seats=[1]),
        changed(raw, seats=seats[::-1]),
        changed(raw, seats=seats[:1] * 2),
        changed(raw, further=1),
    ]
    for row in rows:
        with pytest.raises(ProtocolError):
            pytest.fail(f"{GroupView.from_bytes(row)} was read from {row[:200]!r}")


def test_a_malformed_seat_is_refused() -> None:
    rows: list[dict[str, object]] = [
        {"state": "isolated"},
        {"state": "asleep"},
        {"state": []},
        {"state": "gone"},
        {"ended_by": "leave"},
        {"ended_by": "admit"},
        {"rank": -1},
        {"rank": "0"},
        {"incarnation": 1},
        {"incarnation": "x" * 65},
        {"awaited": None},
    ]
    for row in rows:
        seat = {**json.loads(VIEW.to_bytes())["seats"][0], **row}
        with pytest.raises(ProtocolError):
            pytest.fail(f"{GroupView.from_bytes(changed(VIEW.to_bytes(), seats=[seat]))} was read, with {row}")


def test_a_malformed_member_record_is_refused() -> None:
    rows: list[dict[str, object]] = [
        {"version": 0},
        {"rank": -1},
        {"ttl_s": "6"},
        {"meta": []},
        {"address": 1},
        {"epoch": 1.5},
    ]
    for row in rows:
        with pytest.raises(ProtocolError):
            pytest.fail(f"{MemberRecord.from_bytes(changed(RECORD.to_bytes(), **row))} was read, with {row}")


def test_what_a_member_cannot_store_is_a_setting_to_fix() -> None:
    rows: list[dict[str, Any]] = [
        {"address": "x" * 1025},
        {"meta": {"x": object()}},
        {"meta": {"x": float("nan")}},
        {"meta": {"x": "y" * 70_000}},
    ]
    for row in rows:
        with pytest.raises(ConfigError):
            pytest.fail(f"{replace(RECORD, **row)} was made")


GROUP = "a/b"
KEYS = GroupKeys(GROUP)


def record_of(rank: int) -> MemberRecord:
    return MemberRecord(rank=rank, incarnation="x", epoch=0, ttl_s=6.0)


def test_a_group_s_snapshot_and_one_that_followed_a_watch_are_the_same() -> None:
    store = MemoryStore()
    watch = store.watch("groups/", after=0)
    snapshot = GroupSnapshot.of(GROUP, store.snapshot("groups/"))
    assert (snapshot.view, snapshot.view_revision, snapshot.members, snapshot.policy_version) == (NO_VIEW, 0, {}, None)
    lease = store.grant(60)
    store.put(KEYS.member(3), record_of(3).to_bytes(), lease_id=lease.lease_id)
    store.put(KEYS.member(12), record_of(12).to_bytes())
    store.put(KEYS.view, GroupView(epoch=4).to_bytes())
    store.put(KEYS.policy, b"7")
    store.put(KEYS.view, GroupView(epoch=5).to_bytes())
    store.revoke(lease.lease_id)
    store.put(GroupKeys("other").view, GroupView(epoch=9).to_bytes())
    while (batch := watch.next(0.0)) is not None:
        snapshot = snapshot.after(batch.revision, batch.events)
    assert snapshot == GroupSnapshot.of(GROUP, store.snapshot("groups/"))
    assert snapshot.view == GroupView(epoch=5)
    assert (snapshot.view_revision, snapshot.policy_version, snapshot.revision) == (5, 7, 7)
    assert dict(snapshot.members) == {12: record_of(12)}
    assert snapshot.members[12].revision == 2
    store.close()


def test_what_is_not_understood_is_as_if_it_were_not_there_and_is_named() -> None:
    store = MemoryStore()
    store.put(KEYS.view, b"garbage")
    store.put(KEYS.policy, b"-1")
    store.put(KEYS.member(0), record_of(5).to_bytes())
    store.put(KEYS.member(1), b"{}")
    store.put(KEYS.member(2) + "x", b"{}")
    snapshot = GroupSnapshot.of(GROUP, store.snapshot())
    assert set(snapshot.problems) == {
        KEYS.view,
        KEYS.policy,
        KEYS.member(0),
        KEYS.member(1),
    }
    assert (snapshot.view, snapshot.view_revision, snapshot.members) == (NO_VIEW, 1, {})
    store.put(KEYS.member(1), record_of(1).to_bytes())
    assert KEYS.member(1) not in GroupSnapshot.of(GROUP, store.snapshot()).problems


def test_a_member_s_key_names_its_rank_and_no_other_key_does() -> None:
    assert KEYS.rank_of(KEYS.member(12)) == 12
    for key in (KEYS.view, GroupKeys("other").member(1), KEYS.member(1) + "/x", "12", "groups/a%2Fb/members/²"):
        assert KEYS.rank_of(key) is None


def test_a_policy_version_is_digits() -> None:
    for value in (b"", b"-1", b"1.5", b"9" * 19, "²".encode()):
        with pytest.raises(ProtocolError):
            pytest.fail(f"{parse_policy_version(value)} was read from {value!r}")
