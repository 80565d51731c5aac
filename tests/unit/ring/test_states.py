from __future__ import annotations

import itertools

import pytest

from ucxx_transport.errors import SlotError
from ucxx_transport.ring.states import (
    TRANSITIONS,
    SlotEvent,
    SlotState,
    advance,
    generation_of,
    state_of,
)

EXPECTED = {
    ("FREE", "RESERVE"): "WRITING",
    ("READY", "OVERWRITE"): "WRITING",
    ("WRITING", "COMMIT"): "READY",
    ("WRITING", "ABORT"): "FREE",
    ("READY", "ACQUIRE"): "READING",
    ("READING", "JOIN"): "READING",
    ("READING", "LEAVE"): "READING",
    ("READING", "CONSUME"): "FREE",
    ("READING", "RELEASE"): "READY",
    ("READY", "DISCARD"): "FREE",
}


def word(state: SlotState, generation: int) -> int:
    return generation << 8 | state


def test_the_table_is_the_design_s_and_nothing_else() -> None:
    assert {(source.name, event.name): target.name for (source, event), target in TRANSITIONS.items()} == EXPECTED


@pytest.mark.parametrize("generation", [0, 1, 2**56 - 2])
def test_every_pair_of_state_and_event(generation: int) -> None:
    for state, event in itertools.product(SlotState, SlotEvent):
        before = word(state, generation)
        if (state, event) not in TRANSITIONS:
            with pytest.raises(SlotError) as caught:
                advance(before, event)
            assert caught.value.facts == {"state": state.name, "event": event.name, "generation": generation}
            continue
        after = advance(before, event)
        assert state_of(after) is TRANSITIONS[state, event]
        grows = state_of(after) is SlotState.WRITING
        assert generation_of(after) == generation + grows


def test_the_numbers_of_the_states_are_the_segment_s() -> None:
    assert [(state.name, state.value) for state in SlotState] == [
        ("FREE", 0),
        ("WRITING", 1),
        ("READY", 2),
        ("READING", 3),
    ]


def test_a_damaged_state_word_is_an_error_whatever_happens_to_it() -> None:
    with pytest.raises(SlotError, match="no known state"):
        state_of(5)
    for event in SlotEvent:
        with pytest.raises(SlotError):
            advance(5, event)
