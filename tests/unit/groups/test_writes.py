from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import count

import pytest

from tests.support.memory_store import MemoryStore
from tests.support.rank_contexts import rank_context
from ucxx_transport.errors import DeadlineExceededError
from ucxx_transport.groups.participant import leave_view
from ucxx_transport.groups.state import Retrying
from ucxx_transport.groups.view import GroupView, RankState, Seat
from ucxx_transport.membership.entries import view_key

VIEW = GroupView(epoch=4, seats=(Seat(rank=1, incarnation="new", state=RankState.ACTIVE, awaited=3),))


@pytest.fixture
def store() -> MemoryStore:
    store = MemoryStore()
    store.put(view_key("g"), VIEW.to_bytes())
    return store


def ticking() -> Callable[[], float]:
    """A clock that a hundred reads use up."""
    reads = count()
    return lambda: float(next(reads))


def leave(store: MemoryStore, incarnation: str) -> GroupView:
    leave_view(Retrying(rank_context(store, 1, clock=ticking()), 100.0, "leaving"), incarnation)
    return GroupView.from_bytes(store.data.entries[view_key("g")].value)


def test_a_life_that_leaves_does_not_take_the_next_one_s_seat_along(store: MemoryStore) -> None:
    assert leave(store, "old") == VIEW
    left = leave(store, "new")
    assert (left.epoch, left.state_of(1)) == (5, RankState.GONE)


def test_a_leave_that_was_overtaken_is_made_of_what_is_there_now(store: MemoryStore) -> None:
    epochs = iter((14, 24, 34))

    def another_first(key: str) -> None:
        if (epoch := next(epochs, None)) is not None:
            store.beside().put(key, replace(VIEW, epoch=epoch).to_bytes())

    store.before_put = another_first
    left = leave(store, "new")
    assert (left.epoch, left.state_of(1)) == (35, RankState.GONE)


def test_a_leave_ends_at_its_deadline(store: MemoryStore) -> None:
    store.cut_off()
    with pytest.raises(DeadlineExceededError) as caught:
        leave(store, "new")
    assert caught.value.facts["waiting_for"] == "store"
