"""Groups of processes: they join when they are ready, and are killed at the worst moments.

On one store in the gate, and on the other where there is time: the conformance suite proves the two equal.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import pytest

from tests.support.exhaustive import exhaustive
from tests.support.programs import Program, program
from tests.support.sidecars import sidecars_of
from tests.support.stopping import stop_process
from tests.support.store_rigs import StoreRig
from tests.support.waiting import wait_until
from ucxx_transport.groups import GroupView, RankState
from ucxx_transport.groups.view import MemberRecord
from ucxx_transport.membership.store import Store

pytestmark = pytest.mark.parametrize("own_rig", ["local", exhaustive("etcd")], indirect=True)

MINUTE = 60.0
LONG_LIVED_S = 20.0
"""An interval whose lease outlives a test, unless it is revoked."""

SHORT_LIVED_S = 1.0


class Cluster:
    """Processes that are ranks, and a look into their store."""

    def __init__(self, rig: StoreRig, stack: ExitStack) -> None:
        self.url = rig.url
        self.stack = stack
        self.store: Store = rig.open()
        self.store.snapshot()  # the first call makes the file

    def start(self, rank: int, *, interval_s: float = SHORT_LIVED_S, ack_timeout_s: float = MINUTE) -> Program:
        """A process that has not joined."""
        running: AbstractContextManager[Program] = program(
            "group_rank", self.url, str(rank), str(interval_s), str(ack_timeout_s)
        )
        one = self.stack.enter_context(running)
        assert "turns" in one.hear()
        return one

    def joined(self, *ranks: int, **settings: float) -> list[Program]:
        """Processes that have joined."""
        programs = [self.start(rank, **settings) for rank in ranks]
        for one in programs:
            assert "error" not in one.ask(join=MINUTE)
        return programs

    def is_quiet(self) -> bool:
        """Whether every member has acknowledged the view."""
        epochs = {
            MemberRecord.from_bytes(entry.value).epoch for entry in self.store.snapshot("groups/trainers/members/")
        }
        return epochs == {self.view.epoch}

    @property
    def view(self) -> GroupView:
        entry = self.store.get("groups/trainers/view")
        assert entry is not None
        return GroupView.from_bytes(entry.value)


@pytest.fixture
def cluster(own_rig: StoreRig, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    monkeypatch.setenv("UCXX_TRANSPORT_STORE__NAMESPACE", str(own_rig.settings["namespace"]))
    with ExitStack() as stack:
        yield Cluster(own_rig, stack)


def state_of(one: Program) -> dict[str, Any]:
    return one.ask(state=True)


def until(holds: Callable[[], object], what: str) -> None:
    wait_until(holds, MINUTE, what=what)


def test_a_rank_that_warms_up_is_invisible_and_the_others_work_on(cluster: Cluster) -> None:
    first, _ = cluster.joined(0, 1)
    until(cluster.is_quiet, "all have acknowledged")
    content = cluster.store.snapshot()
    before = state_of(first)
    recovering = cluster.start(2)
    until(lambda: state_of(recovering)["turns"] > 200, "it warms up")
    until(lambda: state_of(first)["turns"] > before["turns"] + 200, "the others work on")
    after = state_of(first)
    assert cluster.store.snapshot().entries == content.entries, "nothing of it is in the store"
    assert after["statistics"] == before["statistics"], "no view, no acknowledgement, nothing to wait for"
    assert first.ask(peer=2) == {"peer": "isolated"}
    joined = recovering.ask(join=MINUTE)
    assert joined["active"] == [0, 1, 2]
    assert joined["addresses"] == {"0": "host-0", "1": "host-1", "2": "host-2"}
    until(lambda: state_of(first)["active"] == [0, 1, 2], "the others have it")


def test_processes_that_start_together_are_one_group(cluster: Cluster) -> None:
    programs = [cluster.start(rank) for rank in range(4)]
    for one in programs:
        one.tell(join=MINUTE)
    assert all("error" not in one.hear() for one in programs)
    until(lambda: {tuple(state_of(one)["active"]) for one in programs} == {(0, 1, 2, 3)}, "all know all")
    for one in programs:
        one.ask(leave=True)
    assert cluster.view.ranks == ()


def test_a_joiner_killed_while_it_waits_is_not_waited_for(cluster: Cluster) -> None:
    first, second = cluster.joined(0, 1)
    second.ask(stick=True)
    joiner = cluster.start(2)
    joiner.tell(join=MINUTE)
    until(lambda: cluster.view.state_of(2) is RankState.JOINING and state_of(second)["stuck"], "it is waited for")
    joiner.signal(signal.SIGKILL)
    until(lambda: cluster.view.state_of(2) is RankState.GONE, "the view is without it")
    until(lambda: state_of(first)["statistics"]["lost"] == 1, "and counted")
    second.ask(unstick=True)
    third = cluster.start(3)
    assert third.ask(join=MINUTE)["active"] == [0, 1, 3]


@pytest.mark.exhaustive  # `tests/unit/groups/test_group.py` shows it in one process
def test_a_member_killed_while_it_should_acknowledge_is_not_waited_for(cluster: Cluster) -> None:
    first, second = cluster.joined(0, 1)
    second.ask(stick=True)
    joiner = cluster.start(2)
    joiner.tell(join=MINUTE)
    until(lambda: cluster.view.state_of(2) is RankState.JOINING and state_of(second)["stuck"], "it is waited for")
    second.signal(signal.SIGKILL)
    assert joiner.hear()["active"] == [0, 2]
    until(lambda: state_of(first)["statistics"]["lost"] == 1, "it is counted as lost")


@pytest.mark.exhaustive  # `tests/unit/groups/test_group.py` shows it in one process
def test_a_member_that_lives_and_does_not_acknowledge_is_dropped_and_comes_back(cluster: Cluster) -> None:
    first, second = cluster.joined(0, 1, interval_s=LONG_LIVED_S, ack_timeout_s=1.0)
    second.ask(stick=True)
    (joiner,) = cluster.joined(2, interval_s=LONG_LIVED_S, ack_timeout_s=1.0)
    assert state_of(joiner)["active"] == [0, 2]
    until(lambda: state_of(first)["statistics"]["dropped"] == 1, "it is counted as dropped")
    second.ask(unstick=True)
    until(lambda: state_of(second)["state"] == "gone", "it finds out")
    assert second.ask(join=MINUTE)["active"] == [0, 1, 2]


def test_of_two_processes_that_claim_a_rank_exactly_one_has_it(cluster: Cluster) -> None:
    rivals = [cluster.start(0), cluster.start(0)]
    for one in rivals:
        one.tell(join=MINUTE)
    answers = [one.hear() for one in rivals]
    assert sorted(answer.get("error", "") for answer in answers) == ["", "DuplicateSourceError"]
    winner = rivals[["error" in answer for answer in answers].index(False)]
    assert state_of(winner)["state"] == "active"


def test_a_killed_rank_s_next_process_takes_its_place_with_a_larger_epoch(cluster: Cluster) -> None:
    first, second = cluster.joined(0, 1)
    epoch = cluster.view.epoch
    second.signal(signal.SIGKILL)
    joined = cluster.start(1).ask(join=MINUTE)
    assert joined["epoch"] > epoch
    assert joined["active"] == [0, 1]
    until(lambda: state_of(first)["active"] == [0, 1], "the other has it")


def test_a_process_that_was_stopped_for_longer_than_its_lease_finds_out_and_joins_again(cluster: Cluster) -> None:
    first, second = cluster.joined(0, 1)
    # Stopped in the middle of a write it would hold the lock of the file; when all is quiet, none is due for a while.
    until(cluster.is_quiet, "all have acknowledged")
    stop_process(second.pid)
    until(lambda: state_of(first)["active"] == [0], "its lease has ended")
    second.signal(signal.SIGCONT)
    until(lambda: state_of(second)["state"] == "gone", "it finds out")
    assert second.ask(join=MINUTE)["active"] == [0, 1]


def test_a_busy_interpreter_costs_a_rank_nothing(cluster: Cluster) -> None:
    first, second = cluster.joined(0, 1)
    epoch = cluster.view.epoch
    second.tell(hold=4.5 * SHORT_LIVED_S)
    assert second.hear() == {}, "its lease would have ended"
    assert cluster.view.epoch == epoch
    assert state_of(first)["statistics"]["lost"] == 0
    assert state_of(second)["state"] == "active"


def test_a_killed_rank_is_gone_long_before_its_lease_would_have_been(cluster: Cluster) -> None:
    first, second = cluster.joined(0, 1, interval_s=10 * LONG_LIVED_S)
    until(lambda: state_of(first)["active"] == [0, 1], "the first has the view that it is to lose the second from")
    until(lambda: sidecars_of(second.pid), "it has a sidecar")
    state_of(second)  # and has sent it the lease
    second.signal(signal.SIGKILL)
    alone = wait_until(
        lambda: (state := state_of(first))["active"] == [0] and state, MINUTE, what="the view is without it"
    )
    assert alone["statistics"]["lost"] == 1, "a view and its counts are of one moment"
