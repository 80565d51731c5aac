from __future__ import annotations

from dataclasses import replace

from ucxx_transport.groups.decisions import GroupSnapshot
from ucxx_transport.groups.view import NO_VIEW, GroupView, MemberRecord, RankEvent, RankState


def record(rank: int, *, life: int = 0, epoch: int = 0) -> MemberRecord:
    return MemberRecord(rank=rank, incarnation=f"{rank}.{life}", epoch=epoch, ttl_s=6.0)


def members(*records: MemberRecord) -> dict[int, MemberRecord]:
    return {one.rank: one for one in records}


def seen(view: GroupView, alive: dict[int, MemberRecord]) -> GroupSnapshot:
    return GroupSnapshot(group="g", view=view, members=alive)


def follow(view: GroupView, alive: dict[int, MemberRecord]) -> GroupView:
    after = seen(view, alive).next_view()
    assert after is not None
    return after


def all_active(*ranks: int) -> tuple[GroupView, dict[int, MemberRecord]]:
    """A group whose ranks are active, and have all applied its view."""
    alive = members(*(record(rank) for rank in ranks))
    view = follow(follow(NO_VIEW, alive), {rank: replace(one, epoch=1) for rank, one in alive.items()})
    assert view.active_ranks == ranks
    return view, {rank: replace(one, epoch=view.epoch) for rank, one in alive.items()}


def states(view: GroupView) -> dict[int, str]:
    return {seat.rank: seat.state.name for seat in view.seats}


def test_a_group_of_one_is_admitted_and_then_active() -> None:
    alive = members(record(3))
    first = follow(NO_VIEW, alive)
    assert (first.epoch, states(first)) == (1, {3: "JOINING"})
    assert seen(first, alive).next_view() is None, "it has not applied its own admission yet"
    second = follow(first, members(record(3, epoch=1)))
    assert (second.epoch, states(second)) == (2, {3: "ACTIVE"})
    assert seen(second, members(record(3, epoch=2))).next_view() is None


def test_without_members_there_is_no_group() -> None:
    assert seen(NO_VIEW, {}).next_view() is None


def test_a_joiner_is_active_only_when_every_active_member_and_itself_have_acknowledged_it() -> None:
    view, alive = all_active(0, 1)
    alive[2] = record(2)
    admitted = follow(view, alive)
    assert states(admitted) == {0: "ACTIVE", 1: "ACTIVE", 2: "JOINING"}
    for rank in (0, 2):
        assert seen(admitted, alive).next_view() is None
        assert rank in seen(admitted, alive).awaited_ranks(2)
        alive[rank] = replace(alive[rank], epoch=admitted.epoch)
    assert seen(admitted, alive).awaited_ranks(2) == (1,)
    assert seen(admitted, alive).next_view() is None
    alive[1] = replace(alive[1], epoch=admitted.epoch)
    active = follow(admitted, alive)
    assert (active.epoch, active.active_ranks) == (admitted.epoch + 1, (0, 1, 2))


def test_two_joiners_come_at_one_epoch_and_wait_for_no_one_but_the_active() -> None:
    view, alive = all_active(0)
    alive |= members(record(1), record(2))
    admitted = follow(view, alive)
    assert states(admitted) == {0: "ACTIVE", 1: "JOINING", 2: "JOINING"}
    alive[0] = replace(alive[0], epoch=admitted.epoch)
    alive[1] = replace(alive[1], epoch=admitted.epoch)
    assert states(follow(admitted, alive)) == {0: "ACTIVE", 1: "ACTIVE", 2: "JOINING"}


def test_who_joins_behind_another_joiner_waits_for_it_once_it_is_active() -> None:
    view, alive = all_active(0)
    alive[1] = record(1)
    first = follow(view, alive)
    alive = {rank: replace(one, epoch=first.epoch) for rank, one in alive.items()} | {2: record(2)}
    second = follow(first, alive)
    assert states(second) == {0: "ACTIVE", 1: "ACTIVE", 2: "JOINING"}
    alive[0], alive[2] = replace(alive[0], epoch=second.epoch), replace(alive[2], epoch=second.epoch)
    assert seen(second, alive).awaited_ranks(2) == (1,)


def test_who_has_no_lease_any_more_is_gone_and_is_not_awaited_ranks() -> None:
    view, alive = all_active(0, 1)
    alive[2] = record(2)
    admitted = follow(view, alive)
    alive = {rank: replace(one, epoch=admitted.epoch) for rank, one in alive.items() if rank != 1}
    after = follow(admitted, alive)
    assert states(after) == {0: "ACTIVE", 1: "GONE", 2: "ACTIVE"}
    gone = after.seat_of(1)
    assert gone.ended_by is RankEvent.LOSE


def test_a_joiner_that_dies_while_it_waits_is_gone() -> None:
    view, alive = all_active(0)
    admitted = follow(view, alive | members(record(1)))
    after = follow(admitted, {0: alive[0]})
    assert states(after) == {0: "ACTIVE", 1: "GONE"}
    assert seen(after, {0: replace(alive[0], epoch=after.epoch)}).next_view() is None


def test_a_dead_rank_s_new_life_takes_its_place_with_a_larger_epoch() -> None:
    view, alive = all_active(0, 1)
    after = follow(view, alive | members(record(1, life=1)))
    seat = after.seat_of(1)
    assert (seat.incarnation, seat.state, seat.awaited) == ("1.1", RankState.JOINING, view.epoch + 1)


def test_who_does_not_acknowledge_in_time_is_dropped_and_not_admitted_again_by_the_same_lease() -> None:
    view, alive = all_active(0, 1)
    alive[2] = record(2)
    admitted = follow(view, alive)
    alive |= {rank: replace(alive[rank], epoch=admitted.epoch) for rank in (0, 2)}
    waits = seen(admitted, {}).ack_waits({}, 100.0)
    assert seen(admitted, alive).overdue_ranks(waits, now=109.9, ack_timeout_s=10) == frozenset()
    late = seen(admitted, alive).overdue_ranks(waits, now=110.0, ack_timeout_s=10)
    assert late == {1}
    after = seen(admitted, alive).next_view(overdue=late)
    assert after is not None
    assert states(after) == {0: "ACTIVE", 1: "GONE", 2: "ACTIVE"}
    alive = {rank: replace(one, epoch=after.epoch) for rank, one in alive.items()}
    assert seen(after, alive).next_view() is None, "its lease lives, and its seat stays gone"
    back = follow(after, alive | members(record(1, life=1, epoch=after.epoch)))
    assert states(back) == {0: "ACTIVE", 1: "JOINING", 2: "ACTIVE"}


def test_a_joiner_that_does_not_apply_its_own_admission_is_dropped_itself() -> None:
    view, alive = all_active(0)
    admitted = follow(view, alive | members(record(1)))
    alive = {0: replace(alive[0], epoch=admitted.epoch), 1: record(1)}
    waits = seen(admitted, {}).ack_waits({}, 0.0)
    assert seen(admitted, alive).overdue_ranks(waits, now=10.0, ack_timeout_s=10) == {1}


def test_an_inactive_member_is_neither_waited_for_nor_dropped() -> None:
    view, alive = all_active(0, 1)
    set_aside = seen(view, alive).view_after(RankEvent.DEACTIVATE, [1])
    assert set_aside is not None
    alive |= {0: replace(alive[0], epoch=set_aside.epoch), 2: record(2)}
    admitted = follow(set_aside, alive)
    alive |= {rank: replace(alive[rank], epoch=admitted.epoch) for rank in (0, 2)}
    assert seen(admitted, alive).awaited_ranks(2) == ()
    assert (
        seen(admitted, alive).overdue_ranks(seen(admitted, {}).ack_waits({}, 0.0), now=99.0, ack_timeout_s=10)
        == frozenset()
    )
    assert states(follow(admitted, alive)) == {0: "ACTIVE", 1: "INACTIVE", 2: "ACTIVE"}


def test_a_wait_begins_when_its_joiner_is_first_seen_and_again_with_each_recall() -> None:
    view, alive = all_active(0)
    admitted = follow(view, alive | members(record(1)))
    waits = seen(admitted, {}).ack_waits({}, 5.0)
    assert waits == {(1, admitted.epoch): 5.0}
    assert seen(admitted, {}).ack_waits(waits, 8.0) == waits
    again = admitted.with_seats({1: replace(admitted.seats[1], awaited=9)}, epoch=9)
    assert seen(again, {}).ack_waits(waits, 8.0) == {(1, 9): 8.0}
    assert seen(NO_VIEW, {}).ack_waits(waits, 8.0) == {}
    assert seen(NO_VIEW, alive).overdue_ranks(waits, now=99.0, ack_timeout_s=1) == frozenset()


def test_what_is_recalled_joins_and_what_is_deactivated_does_not_come_back_by_itself() -> None:
    view, alive = all_active(0, 1)
    aside = seen(view, alive).view_after(RankEvent.DEACTIVATE, [1])
    assert aside is not None
    assert states(aside) == {0: "ACTIVE", 1: "INACTIVE"}
    alive = {rank: replace(one, epoch=aside.epoch) for rank, one in alive.items()}
    assert seen(aside, alive).next_view() is None
    recalled = seen(aside, alive).view_after(RankEvent.RECALL, [1])
    assert recalled is not None
    assert seen(recalled, alive).next_view() is None
    alive = {rank: replace(one, epoch=recalled.epoch) for rank, one in alive.items()}
    assert follow(recalled, alive).active_ranks == (0, 1)


def test_a_request_changes_only_the_ranks_and_lives_that_it_concerns() -> None:
    view, alive = all_active(0)
    assert seen(view, alive).view_after(RankEvent.RECALL, [0]) is None, "it is active already"
    assert seen(view, alive).view_after(RankEvent.DEACTIVATE, [7]) is None, "it is not there"
    assert seen(view, alive).view_after(RankEvent.LEAVE, []) is None
    assert seen(view, alive).view_after(RankEvent.LEAVE, [0], incarnation="another") is None
    left = seen(view, alive).view_after(RankEvent.LEAVE, [0], incarnation="0.0")
    assert left is not None
    assert states(left) == {0: "GONE"}
    assert seen(left, alive).view_after(RankEvent.LEAVE, [0]) is None


def test_an_epoch_is_larger_than_any_that_was_known_also_across_a_wiped_store() -> None:
    assert seen(NO_VIEW, members(record(0, epoch=9), record(1, epoch=4))).next_epoch == 10
    first = follow(NO_VIEW, members(record(0, epoch=9)))
    assert first.epoch == 10
    view, _ = all_active(0)
    behind = follow(view, members(record(0, epoch=12)))
    assert (behind.epoch, behind.seats) == (13, view.seats), "an older view was put back: the same seats, a new epoch"


def test_the_group_writes_its_view_before_those_who_join() -> None:
    view, alive = all_active(1, 3)
    alive |= members(record(0), record(2))
    assert [seen(view, alive).turn_of(rank) for rank in range(4)] == [2, 0, 3, 1]
    del alive[1]
    assert seen(view, alive).turn_of(3) == 0
    assert seen(NO_VIEW, members(record(4), record(7))).turn_of(7) == 1
    assert seen(NO_VIEW, {}).turn_of(7) == 0
