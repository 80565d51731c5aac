from __future__ import annotations

import threading
from dataclasses import replace
from itertools import count

import pytest

from tests.support.memory_store import MemoryStore
from ucxx_transport.errors import DeadlineExceededError
from ucxx_transport.groups.group_view import GroupView, Seat
from ucxx_transport.groups.group_writes import change_view
from ucxx_transport.groups.patience import Patience
from ucxx_transport.groups.rank_states import RankEvent, RankState
from ucxx_transport.membership.keys import view_key

VIEW = GroupView(epoch=4, seats=(Seat(rank=1, incarnation="new", state=RankState.ACTIVE, awaited_epoch=3),))


@pytest.fixture
def store() -> MemoryStore:
    store = MemoryStore()
    store.put(view_key("g"), VIEW.to_bytes())
    return store


def patience() -> Patience:
    """For a hundred tries."""
    tries = count()
    return Patience(
        deadline=100.0,
        clock=lambda: float(next(tries)),
        backoff_s=1e-6,
        max_backoff_s=1e-6,
        given_up=threading.Event(),
    )


def stored(store: MemoryStore) -> GroupView:
    return GroupView.from_bytes(store.data.entries[view_key("g")].value)


def test_a_life_that_leaves_does_not_take_the_next_one_s_seat_along(store: MemoryStore) -> None:
    assert change_view(store, "g", RankEvent.LEAVE, [1], patience(), incarnation="old") == 4
    assert stored(store) == VIEW
    assert change_view(store, "g", RankEvent.LEAVE, [1], patience(), incarnation="new") == 5
    assert stored(store).state_of(1) is RankState.GONE


def test_a_change_that_was_overtaken_is_made_to_what_is_there_now(store: MemoryStore) -> None:
    races = iter(range(3))

    def another_first(key: str) -> None:
        if next(races, None) is not None:
            store.beside().put(key, replace(stored(store), epoch=stored(store).epoch + 10).to_bytes())

    store.before_put = another_first
    assert change_view(store, "g", RankEvent.DEACTIVATE, [1], patience()) == 35
    assert stored(store).state_of(1) is RankState.INACTIVE


def test_a_change_ends_with_its_patience(store: MemoryStore) -> None:
    store.cut_off()
    with pytest.raises(DeadlineExceededError) as caught:
        change_view(store, "g", RankEvent.DEACTIVATE, [1], patience())
    assert caught.value.facts["waiting_for"] == "store"
    assert change_view(store.beside(), "g", RankEvent.DEACTIVATE, [7], patience()) == 4
