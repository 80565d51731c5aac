from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.support.memory_store import FakeClock, MemoryData, MemoryStore
from tests.support.shared_states import shared_state
from ucxx_transport.errors import DeadlineExceededError, DuplicateSourceError, ProtocolError, RegistryError
from ucxx_transport.groups.decisions import GroupSnapshot
from ucxx_transport.groups.participant import Participant
from ucxx_transport.groups.state import GroupStatistics, Retrying
from ucxx_transport.groups.view import GroupView, MemberRecord, RankEvent, RankState, Seat

KEY = "groups/g/members/1"


class Wait(threading.Event):
    """Waits by moving a clock."""

    def __init__(self, clock: FakeClock) -> None:
        super().__init__()
        self.clock = clock
        self.then: Callable[[], object] = lambda: None

    def wait(self, timeout: float | None = None) -> bool:
        self.clock.now += timeout or 0.0
        self.then()
        return self.is_set()


class Claimant:
    """A process that wants rank 1, in a time of its own."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.store = MemoryStore(MemoryData(clock=self.clock))
        self.waiting = Wait(self.clock)

    def record(self, life: str) -> MemberRecord:
        return MemberRecord(rank=1, incarnation=life, epoch=0, ttl_s=6.0)

    def acquire(self, timeout_s: float = 60.0) -> str:
        shared = shared_state(self.store, 1, clock=self.clock, backoff_s=0.1, max_backoff_s=1.0)
        participant = Participant(shared, self.record("mine"))
        participant.acquire(Retrying(shared, timeout_s, "joining", cancelled=self.waiting))
        return MemberRecord.from_bytes(self.store.data.entries[KEY].value).incarnation

    def held_by(self, life: str) -> int:
        lease = self.store.grant(6.0)
        self.store.put(KEY, self.record(life).to_bytes(), lease_id=lease.lease_id)
        return lease.lease_id


@pytest.fixture
def claimant() -> Claimant:
    return Claimant()


def test_a_free_rank_is_taken_at_once(claimant: Claimant) -> None:
    assert claimant.acquire() == "mine"
    assert claimant.clock() == 1000.0


def test_a_dead_holder_s_lease_is_waited_out(claimant: Claimant) -> None:
    claimant.held_by("dead")
    assert claimant.acquire() == "mine"
    assert 1006.0 <= claimant.clock() < 1007.0


def test_a_holder_that_outlives_its_lease_is_alive(claimant: Claimant) -> None:
    lease_id = claimant.held_by("alive")
    claimant.waiting.then = lambda: claimant.store.keep_alive(lease_id)
    with pytest.raises(DuplicateSourceError) as caught:
        claimant.acquire()
    assert caught.value.facts["incarnation"] == "alive"
    assert claimant.clock() >= 1007.0


def test_a_holder_that_came_after_the_first_read_is_alive(claimant: Claimant) -> None:
    lease_id = claimant.held_by("dead")

    def another() -> None:
        if lease_id in claimant.store.data.leases:
            claimant.store.revoke(lease_id)
            claimant.held_by("quicker")

    claimant.waiting.then = another
    with pytest.raises(DuplicateSourceError):
        claimant.acquire()
    assert claimant.clock() < 1001.0


def test_a_claimant_overtaken_between_read_and_put_is_refused_at_once(claimant: Claimant) -> None:
    rival = claimant.store.beside()

    def another(_: str) -> None:
        claimant.store.before_put = lambda _: None
        rival.put(KEY, claimant.record("quicker").to_bytes())

    claimant.store.before_put = another
    with pytest.raises(DuplicateSourceError):
        claimant.acquire()


def test_a_lease_that_ended_during_an_outage_is_replaced(claimant: Claimant) -> None:
    def outage(_: str) -> None:
        claimant.store.before_put = lambda _: None
        claimant.clock.now += 10.0

    claimant.store.before_put = outage
    assert claimant.acquire() == "mine"


def test_a_put_whose_answer_was_lost_is_known_again(claimant: Claimant) -> None:
    claimant.store.lose_answers = 1
    assert claimant.acquire() == "mine"


def test_a_store_that_is_away_for_longer_than_there_is_time(claimant: Claimant) -> None:
    claimant.store.cut_off()
    with pytest.raises(DeadlineExceededError) as caught:
        claimant.acquire(5.0)
    assert caught.value.facts["waiting_for"] == "store"
    assert claimant.clock() >= 1005.0


def test_a_holder_that_may_be_dead_is_not_refused_but_runs_out_of_time(claimant: Claimant) -> None:
    claimant.held_by("dead")
    with pytest.raises(DeadlineExceededError) as caught:
        claimant.acquire(3.0)
    assert caught.value.facts["waiting_for"] == "the rank's holder"


def test_a_claim_that_is_cancelled_ends(claimant: Claimant) -> None:
    claimant.held_by("dead")
    claimant.waiting.then = claimant.waiting.set
    with pytest.raises(RegistryError, match="cancelled"):
        claimant.acquire()


def test_a_holder_that_cannot_be_read_is_reported(claimant: Claimant) -> None:
    claimant.store.put(KEY, b"{}")
    with pytest.raises(ProtocolError):
        claimant.acquire()


class Member:
    """Rank 1, which has published itself."""

    def __init__(self, *, epoch: int = 0) -> None:
        self.clock = FakeClock()
        self.store = MemoryStore(MemoryData(clock=self.clock))
        record = MemberRecord(rank=1, incarnation="mine", epoch=epoch, ttl_s=6.0)
        self.shared = shared_state(self.store, 1, clock=self.clock, ack_timeout_s=2.0)
        self.participant = Participant(self.shared, record)
        self.participant.acquire(Retrying(self.shared, 1.0, "joining"))

    def seen(self) -> GroupSnapshot:
        return GroupSnapshot.of("g", self.store.snapshot("groups/g/"))

    def step(self, snapshot: GroupSnapshot | None = None) -> GroupStatistics:
        self.participant.step(self.seen() if snapshot is None else snapshot)
        return self.shared.now.statistics


def test_a_written_view_is_counted_when_it_is_applied() -> None:
    member = Member()
    assert (member.step().admitted, member.shared.now.view) == (0, None)
    assert (member.step().admitted, member.shared.now.epoch) == (1, 1)


def test_an_acknowledgement_never_goes_back() -> None:
    member = Member(epoch=7)  # by an earlier life, of a store that has lost its data since
    seat = Seat(rank=1, incarnation="mine", state=RankState.JOINING, awaited=3)
    member.store.put("groups/g/view", GroupView(epoch=3, seats=(seat,)).to_bytes())
    member.step()
    assert (member.shared.now.epoch, member.seen().members[1].epoch) == (3, 7)


def test_the_same_view_written_by_another_rank_first_is_a_conflict() -> None:
    member = Member()
    rival = member.store.beside()
    wanted = member.seen().next_view()
    assert wanted is not None

    def another_first(key: str) -> None:
        if key == "groups/g/view":
            member.store.before_put = lambda _: None
            rival.put(key, wanted.to_bytes())

    member.store.before_put = another_first
    member.step()
    applied = member.step()
    assert member.shared.now.view == wanted
    assert (applied.admitted, applied.conflicts) == (1, 1)


def test_a_rank_that_has_acknowledged_is_not_dropped_by_one_whose_watch_is_behind() -> None:
    member = Member()
    while member.shared.now.state is not RankState.ACTIVE:
        member.step()
    joiner = MemberRecord(rank=2, incarnation="other", epoch=0, ttl_s=6.0)
    lease_id = member.store.grant(6.0).lease_id
    member.store.put("groups/g/members/2", joiner.to_bytes(), lease_id=lease_id)
    while member.seen().members[1].epoch < member.seen().view.epoch or 2 not in member.seen().view.ranks:
        member.step()
    before = member.seen()
    member.step(before)  # it waits from now on
    acknowledged = replace(joiner, epoch=before.view.epoch)
    member.store.put("groups/g/members/2", acknowledged.to_bytes(), lease_id=lease_id)
    member.clock.now += 2.0
    member.step(before)
    member.clock.now += 1.0  # beyond any turn
    member.step(before)
    assert member.seen().view.state_of(2) is not RankState.GONE
    while member.shared.now.active_ranks != (1, 2):
        member.step()


def test_a_member_is_not_dropped_for_a_joiner_that_the_group_has_no_longer() -> None:
    member = Member()
    while member.shared.now.state is not RankState.ACTIVE:
        member.step()

    def publish(record: MemberRecord) -> None:
        lease_id = member.store.grant(600.0).lease_id
        member.store.put(f"groups/g/members/{record.rank}", record.to_bytes(), lease_id=lease_id)

    def step_until(find: Callable[[GroupSnapshot], bool]) -> GroupSnapshot:
        while not find(seen := member.seen()):
            member.step()
        return seen

    busy = MemberRecord(rank=2, incarnation="busy", epoch=0, ttl_s=600.0)
    publish(busy)
    admitted = step_until(lambda seen: 2 in seen.view.ranks)
    publish(replace(busy, epoch=admitted.view.epoch))
    step_until(lambda seen: seen.view.active_ranks == (1, 2))
    publish(MemberRecord(rank=3, incarnation="joiner", epoch=0, ttl_s=600.0))
    step_until(lambda seen: 3 in seen.view.ranks)
    before = step_until(lambda seen: seen.members[1].epoch == seen.view.epoch)
    member.step(before)  # the joiner is waited for from now on
    # Where the watch is behind, the joiner has left, and another rank is to be admitted.
    left = before.view_after(RankEvent.LEAVE, [3])
    assert left is not None
    member.store.put("groups/g/view", left.to_bytes(), expected=before.view_revision)
    publish(MemberRecord(rank=4, incarnation="next", epoch=0, ttl_s=600.0))
    member.clock.now += 2.0
    member.step(before)
    member.clock.now += 1.0  # beyond any turn
    member.step(before)
    seats = member.seen().view
    assert (seats.state_of(2), seats.state_of(3), seats.state_of(4)) == (
        RankState.ACTIVE,
        RankState.GONE,
        RankState.JOINING,
    )
