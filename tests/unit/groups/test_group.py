"""RankGroup over a store in memory, with real threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, MutableMapping
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from tests.support.clock import Clock
from tests.support.group_ranks import CONFIG, Ranks
from tests.support.interrupts import every_point
from tests.support.memory_store import MemoryStore
from tests.support.thread_limit import no_more_threads
from tests.support.waiting import wait_until
from ucxx_transport.errors import (
    ConfigError,
    DeadlineExceededError,
    DuplicateSourceError,
    LeaseLostError,
    NotReadyError,
    RegistryError,
    StoreResetError,
    TransportError,
)
from ucxx_transport.groups import GroupView, Member, RankGroup, RankState
from ucxx_transport.groups.view import MemberRecord

VIEW = "groups/trainers/view"


def stored_view(ranks: Ranks) -> GroupView:
    return GroupView.from_bytes(ranks.data.entries[VIEW].value)


def has_view(group: RankGroup, **wanted: object) -> Callable[[], bool]:
    def holds() -> bool:
        state = group.state
        return all(getattr(state, name) == value for name, value in wanted.items())

    return holds


class Stuck:
    """A callback that does not return before `go_on`."""

    def __init__(self, group: RankGroup) -> None:
        self.group = group
        self.is_in = threading.Event()
        self.go_on = threading.Event()
        self.end = group.on_view(self.wait)

    def wait(self, _: GroupView) -> None:
        self.is_in.set()
        self.go_on.wait(120)


def test_a_rank_that_has_not_joined_is_nowhere_in_the_store_and_in_no_other_s_way(ranks: Ranks) -> None:
    (first,) = ranks.joined(0)
    settled = wait_until(lambda: first.state.epoch == 2 and ranks.data.revision, what="the first is settled")
    recovering = ranks.make(1)
    assert recovering.state.state is RankState.ISOLATED
    assert recovering.view is None
    assert (ranks.data.revision, first.state.epoch) == (settled, 2)
    assert first.get_peer_state(1) is RankState.ISOLATED
    with pytest.raises(NotReadyError):
        recovering.get_peer_state(0)


def test_a_group_of_one_is_a_group(ranks: Ranks) -> None:
    state = ranks.make(0).join_group(10)
    assert (state.state, state.active_ranks, state.epoch) == (RankState.ACTIVE, (0,), 2)


def test_a_joiner_gets_the_group_s_state(ranks: Ranks) -> None:
    first, _ = ranks.joined(0, 1)
    first.set_policy_version(41)
    state = ranks.make(2, address="10.0.0.2", meta={"ports": [5, 6]}).join_group(10)
    assert (state.group, state.rank, state.state) == ("trainers", 2, RankState.ACTIVE)
    assert (state.active_ranks, state.policy_version) == ((0, 1, 2), 41)
    wait_until(lambda: 2 in first.state.members, what="the others have it too")
    seen = first.state.members[2]
    assert (seen.address, seen.meta) == ("10.0.0.2", {"ports": [5, 6]})
    assert first.wait_for_view(state.epoch, 10).active_ranks == (0, 1, 2)


def test_joining_twice_changes_nothing(ranks: Ranks) -> None:
    (first,) = ranks.joined(0)
    before = first.state
    revision = wait_until(lambda: stored_view(ranks).epoch == before.epoch and ranks.data.revision)
    assert first.join_group(10) == before
    assert ranks.data.revision == revision


def test_two_joiners_at_once_become_active_both(ranks: Ranks) -> None:
    (first,) = ranks.joined(0)
    others = [ranks.make(rank) for rank in range(1, 6)]
    joins = [ranks.in_thread(partial(group.join_group, 10)) for group in others]
    assert {join.result(20).state for join in joins} == {RankState.ACTIVE}
    wait_until(has_view(first, active_ranks=tuple(range(6))))
    assert first.statistics().admitted == 6
    epochs = [group.wait_for_view(first.state.epoch, 10).epoch for group in others]
    assert epochs == [first.state.epoch] * 5


def test_the_members_of_a_new_group_come_at_once(ranks: Ranks) -> None:
    joins = [ranks.in_thread(partial(ranks.make(rank).join_group, 10)) for rank in range(5)]
    assert [join.result(20).state for join in joins] == [RankState.ACTIVE] * 5
    wait_until(lambda: stored_view(ranks).active_ranks == (0, 1, 2, 3, 4))


def test_a_view_is_applied_and_its_callbacks_have_returned_before_a_waiting_call_does(ranks: Ranks) -> None:
    (first,) = ranks.joined(0)
    seen: list[int] = []
    released = threading.Event()

    def slowly(view: GroupView) -> None:
        released.wait(60)
        seen.append(view.epoch)

    first.on_view(slowly)
    waiter = ranks.in_thread(lambda: (first.wait_for_view(3, 10).epoch, tuple(seen)))
    joiner = ranks.in_thread(lambda: ranks.make(1).join_group(10))
    wait_until(lambda: first.state.epoch == 3, what="the view is set before its callbacks return")
    assert not waiter.done()
    released.set()
    epoch, seen_then = waiter.result(10)
    assert epoch in seen_then
    joiner.result(10)


def test_a_callback_that_fails_is_counted_and_the_group_goes_on(
    ranks: Ranks, log_events: list[MutableMapping[str, Any]]
) -> None:
    (first,) = ranks.joined(0)

    def fails(_: GroupView) -> None:
        raise ValueError("the application's")

    end = first.on_view(fails)
    ranks.joined(1)
    wait_until(has_view(first, active_ranks=(0, 1)))
    assert first.statistics().callback_errors == 2
    assert "group_callback_failed" in [event["event"] for event in log_events]
    end()
    ranks.joined(2)
    wait_until(has_view(first, active_ranks=(0, 1, 2)))
    assert first.statistics().callback_errors == 2


def test_of_two_that_claim_a_rank_at_once_exactly_one_has_it(ranks: Ranks) -> None:
    ranks.joined(0)
    claims = [ranks.in_thread(partial(ranks.hurried(1).join_group, 1000)) for _ in range(4)]
    outcomes = [claim.exception(20) for claim in claims]
    assert sum(outcome is None for outcome in outcomes) == 1
    refused = [outcome for outcome in outcomes if outcome is not None]
    assert all(isinstance(outcome, DuplicateSourceError) and outcome.facts["rank"] == 1 for outcome in refused)


def test_a_live_rank_is_refused_to_a_second_one_and_does_not_notice(ranks: Ranks) -> None:
    (first,) = ranks.joined(0)
    with pytest.raises(DuplicateSourceError):
        ranks.hurried(0).join_group(1000)
    assert (first.state.state, first.state.epoch) == (RankState.ACTIVE, 2)


def test_whether_a_rank_s_holder_lives_may_take_longer_to_know_than_there_is_time(ranks: Ranks) -> None:
    ranks.joined(0)
    with pytest.raises(DeadlineExceededError) as caught:
        ranks.make(0).join_group(0.2)
    assert caught.value.facts["waiting_for"] == "the rank's holder"


def test_a_dead_rank_s_place_is_taken_with_a_larger_epoch(ranks: Ranks) -> None:
    first, second = ranks.joined(0, 1)
    epoch = stored_view(ranks).epoch
    seat = stored_view(ranks).seat_of(1)
    ranks.stores[second].cut_off()
    ranks.data.kill(ranks.lease_of(second))
    state = ranks.make(1).join_group(20)
    assert state.epoch > epoch
    assert state.active_ranks == (0, 1)
    now = stored_view(ranks).seat_of(1)
    assert seat is not None
    assert now is not None
    assert now.incarnation != seat.incarnation
    wait_until(has_view(first, epoch=state.epoch))
    assert first.statistics().lost == 1


def test_a_rank_that_left_joins_again_with_a_larger_epoch(ranks: Ranks) -> None:
    first, second = ranks.joined(0, 1)
    epoch = second.state.epoch
    second.leave()
    assert second.state.state is RankState.GONE
    wait_until(lambda: first.get_peer_state(1) is RankState.GONE)
    assert first.statistics().left == 1
    assert second.join_group(10).epoch > epoch + 1
    wait_until(has_view(first, active_ranks=(0, 1)))
    second.leave()
    second.leave()


def test_the_last_one_to_leave_leaves_a_group_that_can_be_joined(ranks: Ranks) -> None:
    (first,) = ranks.joined(0)
    first.leave()
    assert ranks.data.leases == {}
    assert stored_view(ranks).ranks == ()
    assert ranks.joined(1)[0].state.active_ranks == (1,)


def test_a_rank_that_does_not_acknowledge_in_time_is_dropped_and_counted(
    ranks: Ranks, log_events: list[MutableMapping[str, Any]]
) -> None:
    clock = Clock()
    first, stuck_rank = ranks.joined(0, 1, clock=clock)
    stuck = Stuck(stuck_rank)
    joiner = ranks.make(2, clock=clock)
    join = ranks.in_thread(lambda: joiner.join_group(60))
    assert stuck.is_in.wait(60)
    awaited = wait_until(lambda: stored_view(ranks).seat_of(2).awaited, what="the third is to be acknowledged")
    for other in (first, joiner):
        wait_until(lambda: ranks.record_of(other).epoch >= awaited, what="the others have done so")  # noqa: B023
    clock.now_s += 11.0
    state = join.result(60)
    assert state.active_ranks == (0, 2)
    wait_until(lambda: first.statistics().dropped == 1)
    gone = [event for event in log_events if event["event"] == "group_member_gone"]
    assert {(event["member"], event["reason"]) for event in gone} == {(1, "dropped")}
    assert "groups/trainers/members/1" in ranks.data.entries, "its lease lives"
    reasons: list[TransportError] = []
    stuck_rank.on_gone(reasons.append)
    stuck.go_on.set()
    wait_until(lambda: stuck_rank.state.state is RankState.GONE, what="it finds out")
    wait_until(lambda: reasons, what="its callback")
    assert reasons[0].facts["ended_by"] == "drop"
    assert "groups/trainers/members/1" not in ranks.data.entries, "its lease is given back, also if it never comes back"
    assert stuck_rank.join_group(10).active_ranks == (0, 1, 2)
    assert stuck_rank.state.epoch > state.epoch


def test_a_joiner_waits_for_every_active_member_and_names_those_it_waits_for(ranks: Ranks) -> None:
    first, second = ranks.joined(0, 1, ack_timeout_s=60)
    stuck = Stuck(second)
    joiner = ranks.make(2, ack_timeout_s=60)
    with pytest.raises(DeadlineExceededError) as caught:
        joiner.join_group(0.2)
    assert caught.value.facts["waiting_for"] == (1,)
    assert joiner.state.state is RankState.GONE
    assert "groups/trainers/members/2" not in ranks.data.entries
    wait_until(lambda: first.get_peer_state(2) is RankState.GONE, what="the view is without it")
    stuck.go_on.set()
    assert joiner.join_group(10).active_ranks == (0, 1, 2)


def test_a_joiner_that_dies_while_it_waits_is_gone_and_not_waited_for(ranks: Ranks) -> None:
    first, second = ranks.joined(0, 1, ack_timeout_s=60)
    stuck = Stuck(second)
    lease = ranks.admin.grant(60)
    record = MemberRecord(rank=2, incarnation="x", epoch=0, ttl_s=60)
    ranks.admin.put("groups/trainers/members/2", record.to_bytes(), lease_id=lease.lease_id)
    wait_until(lambda: first.get_peer_state(2) is RankState.JOINING)
    assert stuck.is_in.wait(60)
    ranks.admin.revoke(lease.lease_id)
    wait_until(lambda: first.get_peer_state(2) is RankState.GONE)
    stuck.go_on.set()
    wait_until(has_view(second, epoch=stored_view(ranks).epoch))
    assert first.state.active_ranks == second.state.active_ranks == (0, 1)
    assert ranks.joined(3)[0].state.active_ranks == (0, 1, 3)


def test_a_member_that_dies_while_it_should_acknowledge_is_not_waited_for(ranks: Ranks) -> None:
    first, second = ranks.joined(0, 1, ack_timeout_s=60)
    stuck = Stuck(second)
    join = ranks.in_thread(lambda: ranks.make(2, ack_timeout_s=60).join_group(10))
    assert stuck.is_in.wait(60)
    ranks.data.kill(ranks.lease_of(second))
    assert join.result(10).active_ranks == (0, 2)
    assert first.statistics().lost == 1
    stuck.go_on.set()


def test_only_a_rank_that_has_joined_can_be_activated_and_only_by_a_member(ranks: Ranks) -> None:
    first = ranks.make(0)
    with pytest.raises(NotReadyError):
        first.activate_ranks([0])
    first.join_group(10)
    with pytest.raises(NotReadyError, match="when they have joined") as caught:
        first.activate_ranks([0, 1])
    assert caught.value.facts["ranks"] == [1]
    assert caught.value.retryable


def test_activating_twice_is_one_epoch_and_deactivating_twice_too(ranks: Ranks) -> None:
    first, second = ranks.joined(0, 1)
    aside = first.deactivate_ranks([1])
    assert aside.active_ranks == (0,)
    assert first.deactivate_ranks([1]).epoch == aside.epoch
    wait_until(lambda: second.state.state is RankState.INACTIVE)
    assert first.get_peer_state(1) is RankState.INACTIVE
    back = first.activate_ranks([1])
    assert back.active_ranks == (0, 1)
    assert first.activate_ranks([0, 1]).epoch == back.epoch
    wait_until(lambda: second.state.state is RankState.ACTIVE)


def test_a_rank_may_deactivate_itself_and_come_back(ranks: Ranks) -> None:
    first, second = ranks.joined(0, 1)
    assert second.deactivate_ranks([1]).active_ranks == (0,)
    assert second.state.state is RankState.INACTIVE
    assert first.deactivate_ranks([0]).active_ranks == ()
    assert ranks.joined(2)[0].state.active_ranks == (2,), "a group without an active rank can be joined"
    assert second.activate_ranks([1, 0]).active_ranks == (0, 1, 2)


def test_deactivating_a_rank_that_is_not_there_is_done_already(ranks: Ranks) -> None:
    (first,) = ranks.joined(0)
    assert first.deactivate_ranks([5]).epoch == 2


def test_activation_waits_for_acknowledgements_and_is_bounded(ranks: Ranks) -> None:
    first, second, third = ranks.joined(0, 1, 2, ack_timeout_s=60)
    first.deactivate_ranks([1])
    wait_until(lambda: third.state.active_ranks == (0, 2))
    stuck = Stuck(third)
    with pytest.raises(DeadlineExceededError) as caught:
        first.activate_ranks([1], timeout_s=0.1)
    assert caught.value.facts["waiting_for"] == (1,)
    assert second.state.state is RankState.JOINING
    stuck.go_on.set()
    assert first.activate_ranks([1]).active_ranks == (0, 1, 2)


def test_a_rank_that_goes_while_its_activation_is_waited_for_ends_the_wait(ranks: Ranks) -> None:
    first, second, third = ranks.joined(0, 1, 2, ack_timeout_s=60)
    first.deactivate_ranks([1])
    wait_until(lambda: third.state.active_ranks == (0, 2))
    stuck = Stuck(third)
    activation = ranks.in_thread(lambda: first.activate_ranks([1]))
    assert stuck.is_in.wait(10)
    ranks.data.kill(ranks.lease_of(second))
    with pytest.raises(NotReadyError, match="gone while"):
        activation.result(10)
    stuck.go_on.set()


def test_callbacks_may_change_the_group(ranks: Ranks) -> None:
    first, second = ranks.joined(0, 1)
    done = threading.Event()

    def without_the_third(view: GroupView) -> None:
        if 2 in view.active_ranks:
            first.deactivate_ranks([2])
            done.set()

    first.on_view(without_the_third)
    ranks.joined(2)
    assert done.wait(10)
    wait_until(has_view(second, active_ranks=(0, 1)))
    first.on_view(lambda _: first.leave())
    second.deactivate_ranks([1])
    wait_until(lambda: first.state.state is RankState.GONE)
    wait_until(lambda: second.get_peer_state(0) is RankState.GONE and second.state.active_ranks == ())


def test_a_policy_version_grows_unless_it_is_rewound(ranks: Ranks) -> None:
    first, second = ranks.joined(0, 1)
    assert first.state.policy_version is None
    first.set_policy_version(5)
    second.set_policy_version(5)
    with pytest.raises(ConfigError) as caught:
        second.set_policy_version(4)
    assert caught.value.facts["known"] == 5
    second.set_policy_version(3, rewind=True)
    wait_until(has_view(first, policy_version=3))
    assert first.state.epoch == second.state.epoch == 4, "no part of the view"
    with pytest.raises(ConfigError):
        first.set_policy_version(-1)


def test_a_store_that_comes_back_in_time_is_waited_for_when_joining(ranks: Ranks) -> None:
    first = ranks.make(0)
    ranks.stores[first].cut_off()
    join = ranks.in_thread(lambda: first.join_group(10))
    wait_until(lambda: first.state.state is RankState.ISOLATED)
    ranks.stores[first].reachable = True
    assert join.result(10).state is RankState.ACTIVE


def test_a_store_that_does_not_come_back_is_waited_for_until_the_deadline(ranks: Ranks) -> None:
    first = ranks.make(0)
    ranks.stores[first].cut_off()
    with pytest.raises(DeadlineExceededError) as caught:
        first.join_group(0.2)
    assert caught.value.facts["waiting_for"] == "store"
    assert first.state.state is RankState.ISOLATED


@pytest.mark.parametrize("lost", [1, 5])
def test_a_write_whose_answer_is_lost_is_recognised_as_one_s_own(ranks: Ranks, lost: int) -> None:
    (first,) = ranks.joined(0)
    joiner = ranks.make(1)
    ranks.stores[joiner].lose_answers = lost
    ranks.stores[first].lose_answers = 1
    assert joiner.join_group(10).active_ranks == (0, 1)
    ranks.stores[joiner].lose_answers = 1
    joiner.deactivate_ranks([0])
    ranks.stores[joiner].lose_answers = 1
    joiner.set_policy_version(3)
    ranks.stores[joiner].lose_answers = 1
    joiner.leave()
    wait_until(lambda: first.get_peer_state(1) is RankState.GONE)
    assert first.statistics().left == 1


def test_a_group_goes_on_while_its_store_is_away(ranks: Ranks) -> None:
    groups = ranks.joined(0, 1)
    wait_until(lambda: all(group.state.epoch == 4 for group in groups))
    for group in groups:
        ranks.stores[group].cut_off()
    wait_until(lambda: all(group.statistics().outages for group in groups), what="both have noticed")
    assert [group.state.active_ranks for group in groups] == [(0, 1)] * 2
    for group in groups:
        ranks.stores[group].reachable = True
    state = ranks.make(2).join_group(10)
    assert state.active_ranks == (0, 1, 2)
    assert state.epoch == 6, "none was dropped, and none came back: there was no other epoch"


def test_a_store_that_goes_away_while_a_rank_joins_delays_it_and_drops_none(ranks: Ranks) -> None:
    clock = Clock()
    first, second = ranks.joined(0, 1, clock=clock)
    stuck = Stuck(second)
    joiner = ranks.make(2, clock=clock)
    join = ranks.in_thread(lambda: joiner.join_group(60))
    assert stuck.is_in.wait(60)
    for group in (first, second, joiner):
        ranks.stores[group].cut_off()
    stuck.go_on.set()
    wait_until(lambda: first.statistics().outages >= 3, what="it is tried again")
    clock.now_s += 11.0  # longer than acknowledgements are waited for
    for group in (first, second, joiner):
        ranks.stores[group].reachable = True
    assert join.result(60).active_ranks == (0, 1, 2)
    assert first.statistics().dropped == first.statistics().lost == 0


def test_a_rank_whose_lease_is_lost_finds_out_reports_it_and_joins_again(ranks: Ranks) -> None:
    clock = Clock()
    first, second = ranks.joined(0, 1, clock=clock)
    epoch = second.state.epoch
    reasons: list[TransportError] = []
    second.on_gone(reasons.append)
    waiter = ranks.in_thread(lambda: second.wait_for_view(1000, 20))
    wait_until(lambda: clock.asked_by.count(ranks.threads[-1]) >= 3, what="it waits")
    ranks.data.kill(ranks.lease_of(second))
    wait_until(lambda: second.state.state is RankState.GONE)
    with pytest.raises(LeaseLostError):
        waiter.result(10)
    wait_until(lambda: len(reasons) == 1)
    with pytest.raises(NotReadyError):
        second.wait_for_view(1, 1)
    wait_until(lambda: first.get_peer_state(1) is RankState.GONE)
    assert second.join_group(10).epoch > epoch + 1
    assert first.wait_for_view(epoch + 3, 10).active_ranks == (0, 1)
    assert len(reasons) == 1


def test_a_rank_that_loses_its_lease_while_it_joins_starts_over_within_its_time(ranks: Ranks) -> None:
    first, second = ranks.joined(0, 1, ack_timeout_s=60)
    stuck = Stuck(second)
    joiner = ranks.make(2, ack_timeout_s=60)
    join = ranks.in_thread(lambda: joiner.join_group(20))
    assert stuck.is_in.wait(60)
    wait_until(lambda: ranks.record_of(joiner).epoch == 5, what="it has applied its own admission")
    lost = ranks.record_of(joiner).incarnation
    ranks.data.kill(ranks.lease_of(joiner))
    wait_until(lambda: 2 in first.state.members and first.state.members[2].incarnation != lost, what="its second life")
    assert first.get_peer_state(2) is RankState.JOINING
    stuck.go_on.set()
    assert join.result(20).active_ranks == (0, 1, 2)
    assert first.statistics().lost == 1


def test_a_wiped_store_ends_memberships_and_epochs_grow_across_it(ranks: Ranks) -> None:
    first, second = ranks.joined(0, 1)
    first.set_policy_version(9)
    first.deactivate_ranks([1])
    wait_until(has_view(second, epoch=first.state.epoch, policy_version=9))
    epoch = first.state.epoch
    ranks.data.wipe()
    wait_until(lambda: first.state.state is second.state.state is RankState.GONE)
    assert first.view is not None, "what was known stays known"
    joins = [ranks.in_thread(partial(group.join_group, 10)) for group in (first, second)]
    assert all(join.result(10).epoch > epoch for join in joins)
    wait_until(has_view(first, active_ranks=(0, 1), policy_version=9))
    assert ranks.joined(2)[0].state.policy_version == 9


def test_a_new_rank_s_small_epoch_does_not_hold_after_a_wipe(ranks: Ranks) -> None:
    first, second = ranks.joined(0, 1)
    first.deactivate_ranks([1])
    first.activate_ranks([1])
    epoch = first.state.epoch
    ranks.data.wipe()
    wait_until(lambda: first.state.state is second.state.state is RankState.GONE)
    newcomer = ranks.joined(5)[0]
    assert newcomer.state.epoch < epoch, "it could not know"
    assert first.join_group(10).epoch > epoch
    wait_until(has_view(newcomer, active_ranks=(0, 5)))


def test_callbacks_whose_thread_could_not_be_started_hear_what_they_missed_with_no_further_news(
    ranks: Ranks, log_events: list[MutableMapping[str, Any]]
) -> None:
    def waiting() -> list[object]:
        return sorted(event["rank"] for event in log_events if event["event"] == "listener_waits")

    first, second = ranks.joined(0, 1)
    heard: list[object] = []
    first.subscribe(on_remove=lambda member: heard.append(member.rank))
    second.on_gone(lambda _: heard.append("gone"))
    with no_more_threads():
        ranks.data.kill(ranks.lease_of(second))
        wait_until(lambda: waiting() == [0, 1])
        assert heard == []
    wait_until(lambda: len(heard) == 2)
    assert set(heard) == {1, "gone"}
    assert waiting() == [0, 1], "once each"


def test_another_view_of_an_epoch_that_was_applied_ends_the_membership(ranks: Ranks) -> None:
    (first,) = ranks.joined(0)
    reasons: list[TransportError] = []
    first.on_gone(reasons.append)
    ranks.admin.put(VIEW, replace(stored_view(ranks), seats=()).to_bytes())
    wait_until(lambda: reasons)
    assert isinstance(reasons[0], StoreResetError)
    assert first.state.state is RankState.GONE
    assert first.join_group(10).active_ranks == (0,)


def test_an_older_view_that_was_put_back_is_not_applied_but_followed_by_a_newer_one(ranks: Ranks) -> None:
    first, second = ranks.joined(0, 1)
    old = stored_view(ranks)
    first.deactivate_ranks([1])
    epoch = first.activate_ranks([1]).epoch
    wait_until(has_view(second, epoch=epoch))
    seen: list[int] = []
    first.on_view(lambda view: seen.append(view.epoch))
    ranks.admin.put(VIEW, old.to_bytes())
    wait_until(lambda: stored_view(ranks).epoch > epoch)
    wait_until(lambda: seen)
    assert min(seen) > epoch
    assert first.state.active_ranks == (0, 1)


def test_a_view_that_cannot_be_read_is_left_alone_and_joining_says_so(ranks: Ranks) -> None:
    (first,) = ranks.joined(0)
    good = ranks.data.entries[VIEW].value
    ranks.admin.put(VIEW, b'{"version":2}')
    with pytest.raises(DeadlineExceededError) as caught:
        ranks.make(1).join_group(0.2)
    problems = caught.value.facts["problems"]
    assert isinstance(problems, dict)
    assert list(problems) == [VIEW]
    assert first.state.active_ranks == (0,)
    assert ranks.data.entries[VIEW].value == b'{"version":2}'
    ranks.admin.put(VIEW, good)
    assert ranks.joined(1)[0].state.active_ranks == (0, 1)


def test_a_view_that_was_deleted_is_written_again_with_a_larger_epoch(ranks: Ranks) -> None:
    first, second = ranks.joined(0, 1)
    ranks.admin.delete(VIEW)
    wait_until(lambda: stored_view(ranks).active_ranks == (0, 1) if VIEW in ranks.data.entries else False)
    wait_until(lambda: all(group.state.active_ranks == (0, 1) and group.state.epoch > 4 for group in (first, second)))


def test_a_compacted_watch_is_taken_up_with_a_snapshot(ranks: Ranks) -> None:
    (first,) = ranks.joined(0)
    store = ranks.stores[first]
    store.cut_off()
    wait_until(lambda: first.statistics().outages)
    ranks.admin.put("sources/x", b"")
    ranks.data.compact()
    store.reachable = True
    assert ranks.joined(1)[0].state.active_ranks == (0, 1)


def test_a_write_that_loses_every_race_for_the_view_is_tried_again(ranks: Ranks) -> None:
    first, second = ranks.joined(0, 1)
    store = ranks.stores[first]
    races = 3

    def another_first(key: str) -> None:
        nonlocal races
        if key == VIEW and races:
            races -= 1
            view = stored_view(ranks)
            ranks.admin.put(VIEW, replace(view, epoch=view.epoch + 1).to_bytes())

    store.before_put = another_first
    assert first.deactivate_ranks([1]).active_ranks == (0,)
    assert races == 0
    races = 2
    assert first.activate_ranks([1]).active_ranks == (0, 1)
    races = 2
    assert ranks.joined(2)[0].state.active_ranks == (0, 1, 2)
    assert first.statistics().conflicts >= 1
    assert second.state.state is RankState.ACTIVE


def test_a_join_under_way_is_given_up_by_leave(ranks: Ranks) -> None:
    _, second = ranks.joined(0, 1, ack_timeout_s=60)
    stuck = Stuck(second)
    joiner = ranks.make(2, ack_timeout_s=60)
    join = ranks.in_thread(lambda: joiner.join_group(60))
    assert stuck.is_in.wait(60)
    joiner.leave()
    with pytest.raises(RegistryError, match="cancelled"):
        join.result(10)
    assert "groups/trainers/members/2" not in ranks.data.entries
    stuck.go_on.set()


def test_leaving_a_store_that_is_away_ends_and_the_lease_ends_by_itself(ranks: Ranks) -> None:
    (first,) = ranks.joined(0)
    (second,) = ranks.joined(1, config=replace(CONFIG, stop_timeout_s=0.2))
    lease = ranks.lease_of(second)
    ranks.stores[second].cut_off()
    second.leave()
    assert second.state.state is RankState.GONE
    assert lease in ranks.data.leases, "it could not be given back"
    ranks.data.kill(lease)
    wait_until(lambda: first.get_peer_state(1) is RankState.GONE)
    assert first.statistics().lost == 1


def test_a_group_in_a_with_statement_is_left(ranks: Ranks) -> None:
    with ranks.make(0) as group:
        group.join_group(10)
    assert group.state.state is RankState.GONE
    with ranks.make(1):
        pass


def test_a_member_s_death_is_seen_in_view_and_statistics_at_once(ranks: Ranks) -> None:
    first, second = ranks.joined(0, 1)
    wait_until(has_view(first, active_ranks=(0, 1)))
    found: list[tuple[tuple[int, ...], int]] = []

    def read_until_alone() -> None:
        while not found or found[-1][0] != (0,):
            state = first.state
            found.append((state.active_ranks, state.statistics.lost))

    first.on_view(lambda _: found.append((first.state.active_ranks, first.state.statistics.lost)))
    reader = ranks.in_thread(read_until_alone)
    wait_until(lambda: found, what="it has looked")
    ranks.data.kill(ranks.lease_of(second))
    reader.result(10)
    assert set(found) == {((0, 1), 0), ((0,), 1)}


def test_peers_are_seen_in_every_state(ranks: Ranks) -> None:
    first, second = ranks.joined(0, 1, ack_timeout_s=60)
    assert first.get_peer_state(0) is RankState.ACTIVE
    stuck = Stuck(second)
    join = ranks.in_thread(lambda: ranks.make(2, ack_timeout_s=60).join_group(10))
    wait_until(lambda: first.get_peer_state(2) is RankState.JOINING)
    assert first.get_peer_state(3) is RankState.ISOLATED
    stuck.go_on.set()
    join.result(10)
    wait_until(lambda: first.get_peer_state(2) is RankState.ACTIVE)
    second.leave()
    wait_until(lambda: first.get_peer_state(1) is RankState.GONE)


def test_callbacks_see_members_come_and_go(ranks: Ranks) -> None:
    first, second = ranks.joined(0, 1)
    wait_until(has_view(first, active_ranks=(0, 1)))
    calls: list[tuple[str, int]] = []
    end = first.subscribe(
        on_add=lambda member: calls.append(("add", member.rank)),
        on_remove=lambda member: calls.append(("remove", member.rank)),
    )
    assert calls == [("add", 0), ("add", 1)]
    ranks.data.kill(ranks.lease_of(second))
    wait_until(lambda: ("remove", 1) in calls)
    wait_until(lambda: second.state.state is RankState.GONE)
    end()
    second.join_group(10)
    wait_until(has_view(first, active_ranks=(0, 1)))
    assert calls == [("add", 0), ("add", 1), ("remove", 1)]


def test_a_callback_that_blocks_delays_neither_the_group_nor_a_leave(ranks: Ranks) -> None:
    (first,) = ranks.joined(0)
    is_in, go_on = threading.Event(), threading.Event()

    def block(member: Member) -> None:
        if member.rank != 0:
            is_in.set()
            go_on.wait(60)

    quick: list[int] = []
    first.subscribe(on_add=block)
    first.subscribe(on_add=lambda member: quick.append(member.rank))
    try:
        for rank in (1, 2):
            ranks.joined(rank)
            assert is_in.wait(60)
        wait_until(lambda: quick == [0, 1, 2], what="another callback hears of both")
        first.leave()
    finally:
        go_on.set()


def test_waiting_for_the_group_in_one_of_its_callbacks_is_refused(ranks: Ranks) -> None:
    (first,) = ranks.joined(0)
    answers: list[str] = []

    def wait(_: object) -> None:
        for call in (partial(first.wait_for_view, 1, 60), partial(first.join_group, 60)):
            with pytest.raises(ConfigError, match="a callback must not") as caught:
                call()
            answers.append(str(caught.value.facts["field"]))

    first.on_view(wait)
    first.on_gone(wait)
    both = ["wait_for_view()", "join_group()"]
    first.subscribe(on_add=wait)
    assert answers == both
    ranks.joined(1)
    wait_until(lambda: len(answers) >= 8, what="on_add, and on_view twice")
    ranks.data.kill(ranks.lease_of(first))
    wait_until(lambda: len(answers) >= 10, what="on_gone")
    assert set(answers) == set(both)
    assert first.statistics().callback_errors == 0


def test_waiting_for_a_view_is_bounded(ranks: Ranks) -> None:
    (first,) = ranks.joined(0)
    assert first.wait_for_view(1, 1).epoch == 2
    with pytest.raises(DeadlineExceededError) as caught:
        first.wait_for_view(3, 0.05)
    assert caught.value.facts["waiting_for"] == "epoch 3"


@pytest.mark.parametrize(
    ("rank", "settings"),
    [
        (-1, {}),
        ("0", {}),
        (True, {}),
        (0, {"ack_timeout_s": 0}),
        (0, {"meta": {"x": object()}}),
    ],
)
def test_a_wrong_argument_is_a_setting_to_fix(ranks: Ranks, rank: Any, settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        ranks.make(rank, **settings)


def test_a_group_has_a_name_and_waits_have_a_bound(ranks: Ranks) -> None:
    with pytest.raises(ConfigError):
        RankGroup(MemoryStore(), "", 0)
    with pytest.raises(ConfigError, match=r"store must be a store, such as open_store\(url\), not str \["):
        RankGroup("etcd://user:secret@host", "group", 0)  # type: ignore[arg-type]  # what is refused
    (first,) = ranks.joined(0)
    with pytest.raises(ConfigError):
        first.join_group(-1)
    assert first.wait_for_view(1, 0).epoch == 2
    with pytest.raises(DeadlineExceededError):
        ranks.make(1).join_group(0)
    with pytest.raises(ConfigError):
        first.get_peer_state(-1)
    with pytest.raises(ConfigError):
        first.deactivate_ranks([0, -1])


def test_its_own_leave_is_no_loss_even_if_its_thread_sees_it_first(
    ranks: Ranks, log_events: list[MutableMapping[str, Any]]
) -> None:
    _, leaving = ranks.joined(0, 1)
    gone: list[object] = []
    leaving.on_gone(gone.append)
    ranks.stores[leaving].after_put = lambda key: (
        key == VIEW
        and wait_until(
            lambda: leaving.state.state is RankState.GONE, what="its thread sees it before the write returns"
        )
    )
    waiting = ranks.in_thread(lambda: leaving.wait_for_view(1000, 60))
    leaving.leave()
    assert type(waiting.exception(60)) is NotReadyError
    assert gone == []
    assert "membership_lost" not in [event["event"] for event in log_events]


def test_an_interrupt_at_any_point_of_a_join_leaves_no_key_behind_and_the_rank_can_join(ranks: Ranks) -> None:
    group = ranks.make(0)
    key = "groups/trainers/members/0"
    points = 0
    for where in every_point(partial(group.join_group, 10), within=("ucxx_transport/groups/",)):
        points += 1
        assert group.state.state.is_seated or key not in ranks.data.entries, where
        group.leave()
        assert key not in ranks.data.entries, where
    assert points > 40
    assert group.state.state is RankState.ACTIVE


def test_a_leave_that_was_interrupted_at_any_point_is_made_good_by_another_one(ranks: Ranks) -> None:
    (group,) = ranks.joined(0)
    key, points = "groups/trainers/members/0", 0
    for where in every_point(group.leave, within=("ucxx_transport/groups/",)):
        points += 1
        group.leave()
        assert key not in ranks.data.entries, where
        assert not ranks.data.leases, where
        group.join_group(10)
    assert points > 10
    assert group.state.state is RankState.GONE


def interrupted(*_: object, **_keys: object) -> None:
    raise KeyboardInterrupt


def test_after_a_leave_that_was_interrupted_a_join_is_a_life_of_its_own(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    (group,) = ranks.joined(0)
    before = ranks.record_of(group).incarnation
    with monkeypatch.context() as patch:
        patch.setattr("ucxx_transport.groups.group.Teardown", interrupted)
        with pytest.raises(KeyboardInterrupt):
            group.leave()
    assert group.join_group(10).state is RankState.ACTIVE
    assert ranks.record_of(group).incarnation != before
    assert group.join_group(10).state is RankState.ACTIVE
    group.leave()
    assert not ranks.data.leases


def test_a_join_beside_a_leave_of_a_callback_is_a_life_of_its_own(ranks: Ranks) -> None:
    (group,) = ranks.joined(0)
    before = ranks.record_of(group).incarnation
    leaves, left = threading.Event(), threading.Event()

    def leave(_: GroupView) -> None:
        if not leaves.is_set():
            leaves.set()
            group.leave()
            left.set()

    group.on_view(leave)
    ranks.in_thread(partial(ranks.make(1).join_group, 10))
    assert leaves.wait(60)
    assert group.join_group(10).state is RankState.ACTIVE
    assert left.wait(60)
    assert ranks.record_of(group).incarnation != before
    group.leave()
    assert "groups/trainers/members/0" not in ranks.data.entries


def test_a_join_that_failed_and_whose_end_was_interrupted_is_no_membership(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    (first,) = ranks.joined(0)
    stuck = Stuck(first)
    group = ranks.make(1)
    with monkeypatch.context() as patch:
        patch.setattr("ucxx_transport.groups.group.Teardown", interrupted)
        with pytest.raises(KeyboardInterrupt):
            group.join_group(0.1)
    with pytest.raises(DeadlineExceededError):
        group.join_group(0.1)
    stuck.go_on.set()
    assert group.join_group(10).state is RankState.ACTIVE


def test_a_thread_that_a_leave_did_not_wait_for_ends_nothing_of_the_next_life(ranks: Ranks) -> None:
    config = replace(CONFIG, stop_timeout_s=0.1)
    group, other = ranks.make(0, config=config), ranks.make(1)
    group.join_group(10)
    before, (thread,) = group.state.epoch, [one for one in threading.enumerate() if one.name == "ucxx-group-0"]
    gone: list[object] = []
    group.on_gone(gone.append)
    stuck = Stuck(group)
    joining = ranks.in_thread(partial(other.join_group, 10))
    assert stuck.is_in.wait(60)
    stuck.end()
    group.leave()
    assert thread.is_alive(), "the callback keeps it"
    life = group.join_group(10)
    assert life.notified_epoch == life.epoch > before
    stuck.go_on.set()
    thread.join(60)
    assert (group.state.state, group.state.ended) == (RankState.ACTIVE, None)
    assert group.state.notified_epoch >= life.epoch
    joining.result(60)
    assert other.wait_for_view(life.epoch, 10).active_ranks == (0, 1)
    assert gone == []
