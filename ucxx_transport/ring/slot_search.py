"""Which slot the next write takes: the next free one in ring order, else, if told so, the oldest unread one."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ucxx_transport.ring.layout import CURSOR_WORD, SEQUENCE, STATE, WORD_BYTES, Geometry
from ucxx_transport.ring.states import STATE_MASK, SlotState

_NEAR = 4
"""Slots looked at one by one before all are scanned with numpy; in a ring read in order the first one is free."""

_NEVER = 2**64 - 1
_FREE = int(SlotState.FREE)
_READY = np.uint64(SlotState.READY)
_MASK = np.uint64(STATE_MASK)


class SlotSearch:
    """Finds slots by their state. Its answers hold as long as the lock is held, and are hints without it."""

    __slots__ = (
        "_first",
        "_per_slot",
        "_scratch_ready",
        "_scratch_sequences",
        "_scratch_states",
        "_sequences",
        "_slots",
        "_states",
        "_words",
    )

    def __init__(self, words: memoryview, geometry: Geometry) -> None:
        """Bind to memory.

        Args:
            words: the segment as 64-bit words.
            geometry: where the headers lie.
        """
        self._words = words
        self._slots = geometry.slots
        self._first = geometry.first_slot_word
        self._per_slot = geometry.slot_words
        headers = np.frombuffer(
            words, np.uint64, count=geometry.slots * geometry.slot_words, offset=geometry.first_slot_word * WORD_BYTES
        ).reshape(geometry.slots, geometry.slot_words)
        self._states = headers[:, STATE]
        self._sequences = headers[:, SEQUENCE]
        # only used with the lock held
        self._scratch_states = np.empty(geometry.slots, np.uint64)
        self._scratch_sequences = np.empty(geometry.slots, np.uint64)
        self._scratch_ready = np.empty(geometry.slots, np.bool_)

    def states(self) -> npt.NDArray[np.uint64]:
        """The state of every slot, shape (slots,), a copy."""
        return self._states & _MASK

    def any_free(self) -> bool:
        """Whether a slot is FREE; safe without the lock."""
        return bool((self.states() == _FREE).any())

    def slots_in(self, *states: SlotState) -> list[int]:
        """The slots in one of these states, in order."""
        found: list[int] = np.flatnonzero(np.isin(self.states(), [int(state) for state in states])).tolist()
        return found

    def ready_by_age(self) -> list[int]:
        """The READY slots, the one written first leading."""
        ready = np.flatnonzero(self.states() == SlotState.READY)
        ordered: list[int] = ready[np.argsort(self._sequences[ready], kind="stable")].tolist()
        return ordered

    def written_until(self, sequence: int) -> list[int]:
        """The slots in use whose last completed write is not later than the one numbered `sequence`, in order."""
        found: list[int] = np.flatnonzero((self.states() != _FREE) & (self._sequences <= sequence)).tolist()
        return found

    def for_write(self, *, may_overwrite: bool) -> int | None:
        """The slot that a write should take, None when there is none.

        Args:
            may_overwrite: whether an unread payload may be dropped for it: then the one with the lowest write sequence.
        """
        words = self._words
        cursor = words[CURSOR_WORD] % self._slots
        for slot in range(cursor, min(cursor + _NEAR, self._slots)):
            if words[self._first + slot * self._per_slot] & STATE_MASK == _FREE:
                return slot
        states = self._scratch_states
        np.bitwise_and(self._states, _MASK, out=states)
        lowest = int(states.argmin())
        if states.item(lowest) == _FREE:  # FREE is the lowest of all states
            return lowest
        return self._oldest_ready() if may_overwrite else None

    def _oldest_ready(self) -> int | None:
        """The slot that `_scratch_states` says is READY and whose write sequence is the lowest."""
        sequences = self._scratch_sequences
        sequences.fill(_NEVER)
        np.copyto(sequences, self._sequences, where=np.equal(self._scratch_states, _READY, out=self._scratch_ready))
        oldest = int(sequences.argmin())
        return oldest if self._scratch_ready.item(oldest) else None
