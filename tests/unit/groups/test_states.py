from __future__ import annotations

import itertools

import pytest

from ucxx_transport.errors import RegistryError
from ucxx_transport.groups.view import TRANSITIONS, RankEvent, RankState, advance

EXPECTED = {
    ("ISOLATED", "ADMIT"): "JOINING",
    ("GONE", "ADMIT"): "JOINING",
    ("JOINING", "ACTIVATE"): "ACTIVE",
    ("JOINING", "DEACTIVATE"): "INACTIVE",
    ("ACTIVE", "DEACTIVATE"): "INACTIVE",
    ("INACTIVE", "RECALL"): "JOINING",
    ("JOINING", "LEAVE"): "GONE",
    ("ACTIVE", "LEAVE"): "GONE",
    ("INACTIVE", "LEAVE"): "GONE",
    ("JOINING", "LOSE"): "GONE",
    ("ACTIVE", "LOSE"): "GONE",
    ("INACTIVE", "LOSE"): "GONE",
    ("JOINING", "DROP"): "GONE",
    ("ACTIVE", "DROP"): "GONE",
}


def test_the_table_is_the_design_s_and_nothing_else() -> None:
    assert {(source.name, event.name): target.name for (source, event), target in TRANSITIONS.items()} == EXPECTED


def test_every_pair_of_state_and_event_advances_by_the_table_or_is_refused() -> None:
    for state, event in itertools.product(RankState, RankEvent):
        if (state, event) in TRANSITIONS:
            assert advance(state, event) is TRANSITIONS[state, event], (state, event)
            continue
        with pytest.raises(RegistryError) as caught:
            advance(state, event)
        assert caught.value.facts == {"state": state.name, "event": event.name}


def test_all_states_but_isolated_and_gone_have_a_seat() -> None:
    assert {state for state in RankState if not state.is_seated} == {RankState.ISOLATED, RankState.GONE}
