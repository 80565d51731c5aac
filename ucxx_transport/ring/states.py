"""The life of a slot: states, events, one table, and the one function that makes a new state.

`TRANSITIONS` is the table; a transition to WRITING is the slot's next generation.

A *state word* is one unsigned 64-bit integer, `generation << 8 | state`. Every transition of a slot in shared memory is
one store of its state word, so that a process killed at any instruction leaves the slot either before or after it.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from types import MappingProxyType
from typing import Final

from ucxx_transport.errors import SlotError


class SlotState(IntEnum):
    """What a slot holds. The numbers are part of the segment's layout."""

    FREE = 0
    WRITING = 1
    READY = 2
    READING = 3


class SlotEvent(IntEnum):
    """What can happen to a slot."""

    RESERVE = 0
    OVERWRITE = 1
    COMMIT = 2
    ABORT = 3
    ACQUIRE = 4
    JOIN = 5
    LEAVE = 6
    CONSUME = 7
    RELEASE = 8
    DISCARD = 9


TRANSITIONS: Final[Mapping[tuple[SlotState, SlotEvent], SlotState]] = MappingProxyType(
    {
        (SlotState.FREE, SlotEvent.RESERVE): SlotState.WRITING,  # a writer has the slot
        (SlotState.READY, SlotEvent.OVERWRITE): SlotState.WRITING,  # the oldest unread payload is dropped for a new one
        (SlotState.WRITING, SlotEvent.COMMIT): SlotState.READY,  # the payload is complete
        (SlotState.WRITING, SlotEvent.ABORT): SlotState.FREE,  # the writer failed, gave up, or died
        # the first read attempt enters; then further ones, and some end while others are in flight
        (SlotState.READY, SlotEvent.ACQUIRE): SlotState.READING,
        (SlotState.READING, SlotEvent.JOIN): SlotState.READING,
        (SlotState.READING, SlotEvent.LEAVE): SlotState.READING,
        # the last attempt in flight ends: all readers have had the payload, or one still wants it
        (SlotState.READING, SlotEvent.CONSUME): SlotState.FREE,
        (SlotState.READING, SlotEvent.RELEASE): SlotState.READY,
        (SlotState.READY, SlotEvent.DISCARD): SlotState.FREE,  # the payload is dropped on request
    }
)

STATE_BITS: Final = 8
STATE_MASK: Final = (1 << STATE_BITS) - 1


def state_of(word: int) -> SlotState:
    """The state in a state word; a SlotError where it holds none: the memory is not a slot's, or damaged."""
    try:
        return SlotState(word & STATE_MASK)
    except ValueError:
        raise SlotError("a state word holds no known state", word=word) from None


def generation_of(word: int) -> int:
    """The generation in a state word: how many writes the slot has seen, 0 before the first."""
    return word >> STATE_BITS


def advance(word: int, event: SlotEvent) -> int:
    """The state word after `event`: the only maker of state words. A SlotError: the table has no such transition."""
    state = state_of(word)
    target = TRANSITIONS.get((state, event))
    if target is None:
        text = f"a slot cannot {event.name} while {state.name}"
        raise SlotError(text, state=state.name, event=event.name, generation=generation_of(word))
    return generation_of(word) + (target is SlotState.WRITING) << STATE_BITS | target
