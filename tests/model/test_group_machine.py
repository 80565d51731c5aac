"""A Hypothesis state machine drives the ranks of a group, over a store in memory, beside `GroupModel`.

Ranks join, leave, die, hang while their lease is kept, are cut off from the store, are deactivated and recalled; they
see the store's changes late and one by one; another writes between a rank's decision and its write; answers are lost;
the store is wiped. A *step* is one of these. Every view that is written is judged by the model; what is applied
only grows; and whenever the machine lets things settle, all healthy ranks are as the model says and have one view.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import count

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule

from tests.model.group_model import GroupModel
from tests.support.exhaustive import exhaustive
from tests.support.machines import CountedMachine, run_steps
from tests.support.memory_store import FakeClock, MemoryData, MemoryStore, MemoryWatch
from tests.support.shared_states import shared_state
from ucxx_transport.errors import (
    CompactedError,
    ConflictError,
    DeadlineExceededError,
    LeaseLostError,
    RegistryError,
    StoreResetError,
    StoreUnavailableError,
)
from ucxx_transport.groups.decisions import GroupSnapshot
from ucxx_transport.groups.participant import Participant, change_view
from ucxx_transport.groups.state import MembershipEndedError, Retrying, SharedState
from ucxx_transport.groups.view import GroupView, MemberRecord, RankEvent, RankState

RANKS = 4
TTL_S = 6.0
ACK_TIMEOUT_S = 10.0
GROUP = "g"
VIEW = f"groups/{GROUP}/view"

ranks = st.integers(0, RANKS - 1)

_SHARES = {
    "join": 6,
    "step": 12,
    "all_read": 3,
    "another_writes_first": 4,
    "answer_is_lost": 2,
    "die": 1,
    "hang": 1,
    "go_on": 2,
    "cut_off": 1,
    "mend": 2,
    "moments_pass": 3,
    "deactivate": 1,
    "recall": 2,
    "leave": 1,
}
WHAT = [step for step, share in _SHARES.items() for _ in range(share)]
"""What a step of a burst is."""

bursts = st.lists(st.tuples(st.sampled_from(WHAT), ranks, ranks), min_size=5, max_size=30)


@dataclass
class Process:
    """One process that has a rank, or once had."""

    rank: int
    shared: SharedState
    store: MemoryStore
    incarnation: str = ""
    lease_id: int | None = None
    participant: Participant | None = None
    watch: MemoryWatch | None = None
    snapshot: GroupSnapshot | None = None
    applied: list[int] = field(default_factory=list)
    is_dead: bool = False
    is_hung: bool = False

    @property
    def is_member(self) -> bool:
        """Whether it is one, as far as it knows."""
        return self.participant is not None and not self.is_dead


class GroupMachine(CountedMachine):
    """See the module."""

    rules_an_example = 25
    steps_an_example = 150  # a third of them are bursts

    @initialize(members=st.integers(0, 3))
    def make(self, members: int) -> None:
        self.clock = FakeClock()
        self.data = MemoryData(clock=self.clock)
        self.admin = MemoryStore(self.data)
        self.model = GroupModel(ACK_TIMEOUT_S)
        self.processes: dict[int, Process] = {}
        self.lives = 0
        self.judged_revision = 0
        for rank in range(members):
            self.join(rank, 0)
        self.settle()

    # what the world does by itself

    def judge(self) -> None:
        """Let the model see every change since the last time, in order."""
        self.data.expire()
        for batch in self.data.history:
            if batch.revision <= self.judged_revision:
                continue
            self.judged_revision = batch.revision
            for event in batch.events:
                if event.key == VIEW:
                    self.model.written(GroupView.from_bytes(event.value), self.clock())
                elif event.kind == "put" and "/members/" in event.key:
                    record = MemberRecord.from_bytes(event.value)
                    self.model.acknowledged.setdefault((record.incarnation, record.epoch), self.clock())
                elif event.kind == "delete" and "/members/" in event.key:
                    self.model.alive -= {
                        one.incarnation for one in self.all_processes() if event.key.endswith(f"/{one.rank}")
                    }

    def all_processes(self) -> list[Process]:
        return list(self.processes.values())

    def pass_seconds(self, seconds: float) -> None:
        """Time goes by in small pieces; keepers renew what they can."""
        while seconds > 0:
            self.clock.now += min(seconds, 1.0)
            seconds -= 1.0
            for one in self.all_processes():
                if one.lease_id is not None and not one.is_dead and one.store.reachable:
                    self.renew(one)
            self.judge()

    def renew(self, one: Process) -> None:
        assert one.lease_id is not None
        try:
            one.store.keep_alive(one.lease_id)
        except (LeaseLostError, StoreUnavailableError):
            return

    def retrying(self, one: Process) -> Retrying:
        """For a hundred tries: each read of its clock is a second."""
        reads = count()
        return Retrying(shared_state(one.store, one.rank, clock=lambda: float(next(reads))), 100.0, "trying")

    # what a rank does

    def publish(self, one: Process) -> None:
        self.lives += 1
        one.incarnation = f"{one.rank}.{self.lives}"
        wanted = MemberRecord(rank=one.rank, incarnation=one.incarnation, epoch=one.shared.now.epoch, ttl_s=TTL_S)
        self.model.alive.add(one.incarnation)
        self.model.applied[one.incarnation] = one.shared.now.epoch
        one.participant = Participant(one.shared, wanted)
        one.participant.acquire(self.retrying(one))
        one.lease_id = one.participant.lease_id
        one.snapshot = one.watch = None
        self.judge()

    def read(self, one: Process, *, batches: int) -> bool:
        """Take so many changes and do what they ask for; whether there was anything new."""
        assert one.participant is not None
        try:
            return self.read_once(one, one.participant, batches)
        except (ConflictError, CompactedError, StoreResetError, StoreUnavailableError):
            one.snapshot = one.watch = None
            one.participant.reset()
            return one.store.reachable
        except (MembershipEndedError, LeaseLostError) as over:
            self.drop_out(one, over.error if isinstance(over, MembershipEndedError) else over)
            return True
        finally:
            self.judge()

    def read_once(self, one: Process, participant: Participant, batches: int) -> bool:
        is_new = one.watch is None or one.snapshot is None
        if one.watch is None or one.snapshot is None:
            one.snapshot = GroupSnapshot.of(GROUP, one.store.snapshot(f"groups/{GROUP}/"))
            one.watch = one.store.watch(f"groups/{GROUP}/", after=one.snapshot.revision)
        for _ in range(batches):
            batch = one.watch.next(0.0)
            if batch is None:
                break
            is_new = True
            one.snapshot = one.snapshot.after(batch.revision, batch.events)
        revision = self.data.revision
        participant.step(one.snapshot)
        return is_new or self.data.revision != revision

    def drop_out(self, one: Process, error: RegistryError | None = None) -> None:
        one.shared.end(one.incarnation, error)
        one.participant = None
        lease_id, one.lease_id = one.lease_id, None
        assert lease_id is not None
        self.admin.revoke(lease_id)
        self.judge()

    def member(self, rank: int) -> Process | None:
        one = self.processes.get(rank)
        return one if one is not None and one.is_member and not one.is_hung else None

    # steps, each of a rank and maybe another

    def join(self, rank: int, _: int) -> None:
        self.data.expire()
        one = self.processes.get(rank)
        key_is_there = f"groups/{GROUP}/members/{rank}" in self.data.entries
        if key_is_there or (one is not None and (one.is_member or not one.store.reachable)):
            return
        if one is None or one.is_dead:
            store = self.admin.beside()
            shared = shared_state(store, rank, clock=self.clock, ack_timeout_s=ACK_TIMEOUT_S)
            one = self.processes[rank] = Process(rank, shared, store)
            one.shared.on_view(partial(self.note_applied, one))
        self.publish(one)

    def note_applied(self, one: Process, view: GroupView) -> None:
        assert not one.applied or view.epoch > one.applied[-1], (
            "what a process applies only grows, whatever the store does"
        )
        one.applied.append(view.epoch)
        self.model.applied[one.incarnation] = view.epoch

    def step(self, rank: int, batches: int) -> None:
        one = self.member(rank)
        if one is not None:
            self.read(one, batches=batches)

    def all_read(self, first: int, _: int) -> None:
        for rank in (*range(first, RANKS), *range(first)):
            self.step(rank, 100)

    def another_writes_first(self, rank: int, other: int) -> None:
        """`other` reads and writes between `rank`'s decision and its write."""
        one, rival = self.member(rank), self.member(other)
        if one is None or rival is None or one is rival:
            return
        raced: list[str] = []

        def race(key: str) -> None:
            if key == VIEW and not raced:
                raced.append(key)
                self.read(rival, batches=100)

        one.store.before_put = race
        self.read(one, batches=100)
        one.store.before_put = lambda _: None

    def answer_is_lost(self, rank: int, _: int) -> None:
        one = self.member(rank)
        if one is not None:
            one.store.lose_answers = 1
            self.read(one, batches=100)
            one.store.lose_answers = 0

    def die(self, rank: int, _: int) -> None:
        if rank in self.processes:
            self.processes[rank].is_dead = True

    def hang(self, rank: int, _: int) -> None:
        if rank in self.processes:
            self.processes[rank].is_hung = True

    def go_on(self, rank: int, _: int) -> None:
        if rank in self.processes:
            self.processes[rank].is_hung = False

    def cut_off(self, rank: int, _: int) -> None:
        if rank in self.processes:
            self.processes[rank].store.reachable = False

    def mend(self, rank: int, _: int) -> None:
        if rank in self.processes:
            self.processes[rank].store.reachable = True

    def moments_pass(self, tenths: int, _: int) -> None:
        self.pass_seconds(0.1 + tenths / 10)

    def deactivate(self, rank: int, other: int) -> None:
        one = self.member(rank)
        if one is None or not one.store.reachable:
            return
        seat = self.model.view.seat_of(other)
        change_view(self.retrying(one), RankEvent.DEACTIVATE, [other])
        self.judge()
        if seat.state in (RankState.JOINING, RankState.ACTIVE):
            self.model.resting.add(seat.incarnation)

    def recall(self, rank: int, other: int) -> None:
        one, seat = self.member(rank), self.model.view.seat_of(other)
        if one is None or not one.store.reachable or not seat.state.is_seated:
            return
        self.model.resting.discard(seat.incarnation)
        change_view(self.retrying(one), RankEvent.RECALL, [other])
        self.judge()

    def leave(self, rank: int, _: int) -> None:
        one = self.member(rank)
        if one is None:
            return
        self.model.left.add(one.incarnation)
        with suppress(DeadlineExceededError):  # it is cut off, and its lease is given back by other means
            change_view(self.retrying(one), RankEvent.LEAVE, [rank], incarnation=one.incarnation)
        self.judge()
        self.drop_out(one)

    # rules

    @rule(what=st.sampled_from(sorted(_SHARES)), rank=ranks, other=ranks)
    def one_step(self, what: str, rank: int, other: int) -> None:
        self.count_steps()
        getattr(self, what)(rank, other)

    @rule(steps=bursts)
    def burst(self, steps: list[tuple[str, int, int]]) -> None:
        self.count_steps(len(steps))
        for what, rank, other in steps:
            getattr(self, what)(rank, other)

    @rule(seconds=st.sampled_from([5.0, 11.0]))
    def time_passes(self, seconds: float) -> None:
        self.count_steps()
        self.pass_seconds(seconds)

    @precondition(lambda self: self.processes)
    @rule(really=st.booleans())
    def wipe(self, *, really: bool) -> None:
        self.count_steps()
        if not really:
            return
        self.judge()
        self.data.wipe()
        self.judged_revision = 0
        applied = self.model.applied
        self.model = GroupModel(ACK_TIMEOUT_S, applied=applied)

    @rule()
    def settles(self) -> None:
        """Cables are mended, time passes, and all that can read do: then all is as it should be."""
        self.count_steps()
        for one in self.all_processes():
            one.store.reachable = True
        for _ in range(4):
            self.pass_seconds(ACK_TIMEOUT_S / 2)
            self.settle()
        healthy = {
            one.rank: one.incarnation
            for one in self.all_processes()
            if one.is_member and not one.is_hung and one.incarnation in self.model.alive
        }
        view = self.model.view
        found = {rank: view.state_of(rank) for rank in healthy}
        assert found == self.model.expected(healthy)
        for rank, incarnation in healthy.items():
            assert view.seats_incarnation(rank, incarnation)
            assert self.processes[rank].shared.now.view == view
            assert self.processes[rank].shared.now.state is found[rank]
        if healthy:  # else no rank is there to find the others gone
            hung = {one.rank for one in self.all_processes() if one.is_hung and not one.is_dead}
            assert set(view.ranks) - hung <= set(healthy)
            assert all(seat.state is not RankState.JOINING for seat in view.seats)

    def settle(self) -> None:
        quiet = 0
        for _ in range(200):
            self.clock.now += 0.1
            members = [one for one in self.all_processes() if self.member(one.rank) is one]
            news = [self.read(one, batches=100) for one in members]
            quiet = 0 if any(news) else quiet + 1
            if quiet > RANKS:  # each rank's turn has come
                return
        raise AssertionError("it never settles")

    def teardown(self) -> None:
        if hasattr(self, "model"):
            self.settles()
            for one in self.all_processes():
                one.store.close()


@pytest.mark.parametrize("steps", [4000, exhaustive(40_000)])
def test_a_group_does_what_its_model_foretells(steps: int) -> None:
    run_steps(GroupMachine, steps)
