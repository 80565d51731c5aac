from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import count

import pytest

from tests.support.memory_store import MemoryStore
from tests.support.shared_states import shared_state
from ucxx_transport.errors import DeadlineExceededError
from ucxx_transport.groups.participant import change_view
from ucxx_transport.groups.state import Retrying
from ucxx_transport.groups.view import GroupView, RankEvent, RankState, Seat
from ucxx_transport.membership.entries import GroupKeys

VIEW = GroupView(epoch=4, seats=(Seat(rank=1, incarnation="new", state=RankState.ACTIVE, awaited=3),))


@pytest.fixture
def store() -> MemoryStore:
    store = MemoryStore()
    store.put(GroupKeys("g").view, VIEW.to_bytes())
    return store


def ticking() -> Callable[[], float]:
    """A clock that a hundred reads use up."""
    reads = count()
    return lambda: float(next(reads))


def change(store: MemoryStore, event: RankEvent, rank: int, *, incarnation: str | None = None) -> int:
    shared = shared_state(store, 1, clock=ticking())
    return change_view(Retrying(shared, 100.0, "changing"), event, [rank], incarnation=incarnation)


def stored(store: MemoryStore) -> GroupView:
    return GroupView.from_bytes(store.data.entries[GroupKeys("g").view].value)


def test_a_life_that_leaves_does_not_take_the_next_one_s_seat_along(store: MemoryStore) -> None:
    assert change(store, RankEvent.LEAVE, 1, incarnation="old") == 4
    assert stored(store) == VIEW
    assert change(store, RankEvent.LEAVE, 1, incarnation="new") == 5
    assert stored(store).state_of(1) is RankState.GONE


def test_a_change_that_was_overtaken_is_made_to_what_is_there_now(store: MemoryStore) -> None:
    races = iter(range(3))

    def another_first(key: str) -> None:
        if next(races, None) is not None:
            store.beside().put(key, replace(stored(store), epoch=stored(store).epoch + 10).to_bytes())

    store.before_put = another_first
    assert change(store, RankEvent.DEACTIVATE, 1) == 35
    assert stored(store).state_of(1) is RankState.INACTIVE


def test_a_change_ends_at_its_deadline(store: MemoryStore) -> None:
    store.cut_off()
    with pytest.raises(DeadlineExceededError) as caught:
        change(store, RankEvent.DEACTIVATE, 1)
    assert caught.value.facts["waiting_for"] == "store"
    assert change(store.beside(), RankEvent.DEACTIVATE, 7) == 4
