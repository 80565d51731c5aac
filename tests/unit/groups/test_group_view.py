from __future__ import annotations

import json
from dataclasses import replace

import pytest

from ucxx_transport.errors import ConfigError, ProtocolError, RegistryError
from ucxx_transport.groups.group_view import GroupView, Seat, ViewNews, news_of
from ucxx_transport.groups.member_record import MemberRecord
from ucxx_transport.groups.rank_states import RankEvent, RankState

VIEW = GroupView(
    epoch=7,
    seats=(
        Seat(rank=0, incarnation="a", state=RankState.ACTIVE, awaited_epoch=1),
        Seat(rank=1, incarnation="b", state=RankState.JOINING, awaited_epoch=7),
        Seat(rank=2, incarnation="c", state=RankState.GONE, awaited_epoch=3, ended_by=RankEvent.DROP),
        Seat(rank=5, incarnation="d", state=RankState.INACTIVE, awaited_epoch=3),
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
    fresh = Seat.admitted(2, "new", before=None, epoch=8)
    assert Seat.admitted(2, "new", before=VIEW.seat_of(2), epoch=8) == fresh
    assert (fresh.state, fresh.awaited_epoch, fresh.ended_by) == (RankState.JOINING, 8, None)
    with pytest.raises(RegistryError):
        Seat.admitted(0, "new", before=VIEW.seat_of(0), epoch=8)


def test_a_recalled_rank_joins_once_more_with_the_epoch_that_recalls_it() -> None:
    seat = VIEW.seats[3].recalled(9)
    assert (seat.state, seat.awaited_epoch) == (RankState.JOINING, 9)
    assert VIEW.seats[0].after(RankEvent.DEACTIVATE).awaited_epoch == 1


@pytest.mark.parametrize(
    ("seen", "news"),
    [
        (VIEW, ViewNews.SAME),
        (replace(VIEW, epoch=8), ViewNews.NEWER),
        (replace(VIEW, epoch=6), ViewNews.OLDER),
        (replace(VIEW, seats=VIEW.seats[:2]), ViewNews.CONTRADICTION),
    ],
)
def test_a_view_is_newer_older_the_same_or_a_contradiction(seen: GroupView, news: ViewNews) -> None:
    assert news_of(seen, VIEW) is news
    assert news_of(seen, None) is ViewNews.NEWER


def changed(raw: bytes, **values: object) -> bytes:
    return json.dumps({**json.loads(raw), **values}).encode()


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"[]",
        b"\xff",
        b"[" * 100_000,
        changed(VIEW.to_bytes(), version=2),
        changed(VIEW.to_bytes(), epoch=-1),
        changed(VIEW.to_bytes(), epoch=True),
        changed(VIEW.to_bytes(), seats={}),
        changed(VIEW.to_bytes(), seats=[1]),
        changed(VIEW.to_bytes(), seats=json.loads(VIEW.to_bytes())["seats"][::-1]),
        changed(VIEW.to_bytes(), seats=json.loads(VIEW.to_bytes())["seats"][:1] * 2),
        changed(VIEW.to_bytes(), further=1),
    ],
)
def test_a_view_that_is_none_is_refused(raw: bytes) -> None:
    with pytest.raises(ProtocolError):
        GroupView.from_bytes(raw)


@pytest.mark.parametrize(
    "values",
    [
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
    ],
)
def test_a_seat_that_is_none_is_refused(values: dict[str, object]) -> None:
    seat = {**json.loads(VIEW.to_bytes())["seats"][0], **values}
    with pytest.raises(ProtocolError):
        GroupView.from_bytes(changed(VIEW.to_bytes(), seats=[seat]))


@pytest.mark.parametrize(
    "values", [{"version": 0}, {"rank": -1}, {"ttl_s": "6"}, {"meta": []}, {"address": 1}, {"epoch": 1.5}]
)
def test_a_member_record_that_is_none_is_refused(values: dict[str, object]) -> None:
    with pytest.raises(ProtocolError):
        MemberRecord.from_bytes(changed(RECORD.to_bytes(), **values))


@pytest.mark.parametrize(
    "values",
    [{"address": "x" * 1025}, {"meta": {"x": object()}}, {"meta": {"x": float("nan")}}, {"meta": {"x": "y" * 70_000}}],
)
def test_what_a_member_cannot_store_is_a_setting_to_fix(values: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        replace(RECORD, **values)  # type: ignore[arg-type]  # the point of the test


def test_an_acknowledgement_never_goes_back() -> None:
    assert RECORD.having_applied(9).epoch == 9
    assert RECORD.having_applied(3).epoch == 7
