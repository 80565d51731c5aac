"""The transitions of a writer. See `slot_table` for what makes them safe to cut off."""

from __future__ import annotations

from ucxx_transport.errors import SlotError
from ucxx_transport.ring.layout import (
    CHECKSUM,
    COUNTER_WORD,
    CURSOR_WORD,
    HAS_CHECKSUM,
    IN_TRANSITION_WORD,
    NBYTES,
    REQUIRED_READS,
    SEQUENCE,
    SEQUENCE_WORD,
    STATE,
    WRITER,
    WRITER_PID,
    WRITER_START,
    Counter,
)
from ucxx_transport.ring.owner import Owner
from ucxx_transport.ring.slot_headers import Hold, SlotHeaders
from ucxx_transport.ring.states import STATE_MASK, SlotEvent, SlotState, advance, generation_of, state_of

# An attribute of an enum costs 0.3 µs in Python 3.11, a module's name nothing; these are on the hot path.
_WRITING = int(SlotState.WRITING)
_READY = int(SlotState.READY)
_RESERVE = SlotEvent.RESERVE
_OVERWRITE = SlotEvent.OVERWRITE
_COMMIT = SlotEvent.COMMIT
_ABORT = SlotEvent.ABORT
_DISCARD = SlotEvent.DISCARD
_WRITTEN = COUNTER_WORD + Counter.WRITTEN
_OVERWRITTEN = COUNTER_WORD + Counter.OVERWRITTEN
_COMMITTED = COUNTER_WORD + Counter.COMMITTED
_COMMITTED_BYTES = COUNTER_WORD + Counter.COMMITTED_BYTES


class WriteTransitions(SlotHeaders):
    """FREE or READY → WRITING → READY or FREE, and READY → FREE."""

    __slots__ = ()

    def reserve(self, slot: int, lease_id: int, owner: Owner) -> int:
        """FREE or READY → WRITING, and the cursor moves behind the slot.

        Returns:
            The slot's new generation.

        Raises:
            SlotError: the slot is WRITING or READING.
        """
        words = self._words
        base = self._base(slot)
        word = words[base + STATE]
        overwrites = word & STATE_MASK == _READY
        reserved = advance(word, _OVERWRITE if overwrites else _RESERVE)
        words[IN_TRANSITION_WORD] = slot + 1
        if overwrites:  # counted before it happens: a kill in between may count one too many, never one too few
            words[_OVERWRITTEN] += 1
        words[_WRITTEN] += 1
        words[base + WRITER_PID] = owner.pid
        words[base + WRITER_START] = owner.start
        words[base + WRITER] = lease_id
        words[base + STATE] = reserved
        if overwrites:
            self._entries.clear(base)
        words[CURSOR_WORD] = (slot + 1) % self._geometry.slots
        words[IN_TRANSITION_WORD] = 0
        return generation_of(reserved)

    def commit(self, hold: Hold, nbytes: int, checksum: int | None, required_reads: int) -> None:
        """WRITING → READY: the payload of a write is complete.

        Raises:
            SlotError: the hold has ended: committed, aborted, or reclaimed.
        """
        words = self._words
        base = self._base(hold.slot)
        if not self._is_writer(base, hold):
            self.count(Counter.LATE_FINALISE)
            raise SlotError(
                "this write lease no longer holds its slot; nothing was committed",
                slot=hold.slot,
                generation=hold.generation,
                state=state_of(words[base + STATE]).name,
            )
        ready = advance(words[base + STATE], _COMMIT)
        words[IN_TRANSITION_WORD] = hold.slot + 1
        sequence = words[SEQUENCE_WORD] + 1
        words[SEQUENCE_WORD] = sequence
        words[base + NBYTES] = nbytes
        words[base + SEQUENCE] = sequence
        words[base + CHECKSUM] = 0 if checksum is None else checksum
        words[base + HAS_CHECKSUM] = checksum is not None
        words[base + REQUIRED_READS] = required_reads
        words[_COMMITTED] += 1
        words[_COMMITTED_BYTES] += nbytes
        words[base + STATE] = ready
        words[base + WRITER] = 0
        words[IN_TRANSITION_WORD] = 0

    def abort(self, hold: Hold, reason: Counter) -> bool:
        """WRITING → FREE: a write ends without a payload.

        Returns:
            Whether this hold had the slot; False changes nothing.
        """
        words = self._words
        base = self._base(hold.slot)
        if not self._is_writer(base, hold):
            return False
        free = advance(words[base + STATE], _ABORT)
        words[IN_TRANSITION_WORD] = hold.slot + 1
        self.count(reason)
        words[base + STATE] = free
        words[base + WRITER] = 0
        words[IN_TRANSITION_WORD] = 0
        return True

    def discard(self, slot: int, generation: int) -> bool:
        """READY → FREE, if the slot holds that generation, unread."""
        words = self._words
        base = self._base(slot)
        word = words[base + STATE]
        if word & STATE_MASK != _READY or generation_of(word) != generation:
            return False
        free = advance(word, _DISCARD)
        words[IN_TRANSITION_WORD] = slot + 1
        self.count(Counter.DISCARDED)
        words[base + STATE] = free
        self._entries.clear(base)
        words[IN_TRANSITION_WORD] = 0
        return True

    def _is_writer(self, base: int, hold: Hold) -> bool:
        words = self._words
        word = words[base + STATE]
        return (
            word & STATE_MASK == _WRITING
            and generation_of(word) == hold.generation
            and words[base + WRITER] == hold.lease_id
            and words[base + WRITER_PID] == hold.owner.pid
            and words[base + WRITER_START] == hold.owner.start
        )
