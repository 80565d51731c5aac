from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any

import pytest

from tests.support.memory_store import FakeClock, MemoryStore
from tests.support.shared_states import shared_state
from tests.support.waiting import wait_until
from ucxx_transport.errors import LeaseLostError
from ucxx_transport.groups.decisions import GroupSnapshot
from ucxx_transport.groups.state import GONE, GroupState, MembershipEndedError, SharedState
from ucxx_transport.groups.view import GroupView, RankEvent, RankState, Seat
from ucxx_transport.membership.listeners import ADD, REMOVE


def seat(rank: int, life: int, state: RankState = RankState.ACTIVE) -> Seat:
    ended_by = RankEvent.LOSE if state is RankState.GONE else None
    return Seat(rank=rank, incarnation=f"{rank}.{life}", state=state, awaited=1, ended_by=ended_by)


def view(epoch: int) -> GroupView:
    """Rank 0 stays; rank 1 is there at odd epochs, another life each time, and lost at even ones."""
    life = (epoch + 1) // 2
    return GroupView(epoch=epoch, seats=(seat(0, 0), seat(1, life, RankState.ACTIVE if epoch % 2 else RankState.GONE)))


def contradiction(state: GroupState) -> str:
    """What a view and the counts that came with it do not agree on; "" if they do."""
    counts, epoch = state.statistics, state.epoch
    expected = {"lost": epoch // 2, "admitted": (epoch + 1) // 2 + (epoch > 0)}
    found = {name: getattr(counts, name) for name in expected}
    return "" if found == expected else f"epoch {epoch}: {found} instead of {expected}"


@pytest.fixture
def shared() -> SharedState:
    shared = shared_state(MemoryStore(), 0, clock=FakeClock())
    shared.begin("0.0")
    return shared


def at_each_bytecode(call: Callable[[], object], look: Callable[[], object]) -> None:
    """Call `look` before each bytecode of `call`: what another thread may see."""

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        frame.f_trace = trace  # before the next: see tests/support/interrupts.py
        frame.f_trace_opcodes = True
        if event == "opcode":
            look()
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)


def test_no_reader_sees_a_view_without_the_counts_of_what_it_changed(shared: SharedState) -> None:
    seen: set[tuple[int, str]] = set()
    for epoch in (1, 2, 3, 4):
        seen.clear()
        at_each_bytecode(
            partial(shared.apply, "0.0", view(epoch)),
            lambda: seen.add((shared.now.epoch, contradiction(shared.now))),
        )
        assert seen == {(epoch - 1, ""), (epoch, "")}


def test_a_callback_sees_the_view_and_the_counts_of_what_it_is_called_for(shared: SharedState) -> None:
    found: list[tuple[str, str]] = []

    def note(what: str) -> None:
        found.append((what, contradiction(shared.now)))

    shared.on_view(lambda seen: note(f"view {seen.epoch}"))
    for epoch in (1, 2, 3):
        shared.apply("0.0", view(epoch))
    assert found == [(f"view {epoch}", "") for epoch in (1, 2, 3)]
    found.clear()
    shared.listeners.subscribe(
        {
            ADD: lambda member: note(f"{member.incarnation} came"),
            REMOVE: lambda member: note(f"{member.incarnation} went"),
        }
    )
    for epoch in (4, 5):
        shared.apply("0.0", view(epoch))
    calls = ["0.0 came", "1.2 came", "1.2 went", "view 4", "1.3 came", "view 5"]
    wait_until(lambda: len(found) == len(calls))
    assert sorted(found) == sorted((call, "") for call in calls)
    members = [call for call, _ in found if not call.startswith("view")]
    assert members == ["0.0 came", "1.2 came", "1.2 went", "1.3 came"]


def test_a_view_is_notified_once_its_callbacks_have_returned(shared: SharedState) -> None:
    found: list[GroupView | None] = []
    shared.on_view(lambda _: found.append(shared.now.notified_view()))
    shared.apply("0.0", view(1))
    assert found == [None]
    assert shared.now.notified_view() == view(1)


def test_an_ended_membership_has_its_reason_and_the_next_one_has_none(shared: SharedState) -> None:
    gone: list[object] = []
    shared.listeners.subscribe({GONE: lambda error: gone.append((error, shared.now.state, shared.now.ended))})
    shared.apply("0.0", view(1))
    error = LeaseLostError("it has ended")
    shared.end("0.0", error)
    shared.end("0.0")  # a second one changes nothing
    shared.listeners.wait_idle()
    assert gone == [(error, RankState.GONE, error)]
    assert shared.now.view == view(1), "what was known stays known"
    shared.begin("0.1")
    assert (shared.now.state, shared.now.ended) == (RankState.JOINING, None)


def test_a_thread_that_has_not_heard_of_its_end_yet_changes_nothing(shared: SharedState) -> None:
    shared.apply("0.0", view(1))
    shared.end("0.0")
    left = shared.now
    for late in (partial(shared.show, "0.0", GroupSnapshot(group="g")), partial(shared.apply, "0.0", view(3))):
        with pytest.raises(MembershipEndedError):
            late()
        assert shared.now is left
    shared.begin("0.1")
    assert shared.now.state is RankState.JOINING


@pytest.mark.parametrize("joins_again", [False, True])
def test_no_callback_hears_of_a_view_of_an_earlier_life(shared: SharedState, joins_again: bool) -> None:
    heard: list[int] = []

    def leave(seen: GroupView) -> None:
        if seen.epoch == 2:
            shared.end("0.0")
            if joins_again:
                shared.begin("0.1")
                shared.apply("0.1", view(3))

    shared.on_view(leave)
    shared.on_view(lambda seen: heard.append(seen.epoch))
    shared.apply("0.0", view(1))
    with pytest.raises(MembershipEndedError):
        shared.apply("0.0", view(2))
    assert heard == ([1, 3] if joins_again else [1])
    assert shared.now.notified_epoch == heard[-1]


def test_a_listener_that_comes_later_hears_of_the_members_as_they_are_now(shared: SharedState) -> None:
    shared.apply("0.0", GroupView(epoch=1, seats=(seat(0, 0, RankState.JOINING),)))
    shared.apply("0.0", GroupView(epoch=2, seats=(seat(0, 0),)))
    heard: list[RankState] = []
    shared.listeners.subscribe({ADD: lambda member: heard.append(member.state)})
    assert heard == [RankState.ACTIVE]
