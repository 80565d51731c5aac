"""The transitions of a reader. See `slot_table` for what makes them safe to cut off."""

from __future__ import annotations

from ucxx_transport.errors import BusyError, StaleSlotError
from ucxx_transport.ring.layout import (
    COUNTER_WORD,
    ENTRY_LEASE,
    ENTRY_PID,
    ENTRY_READER,
    ENTRY_START,
    FIRST_ENTRY,
    IN_TRANSITION_WORD,
    REQUIRED_READS,
    STATE,
    Counter,
)
from ucxx_transport.ring.slot_headers import Hold, PayloadFacts, SlotHeaders
from ucxx_transport.ring.states import STATE_MASK, SlotEvent, SlotState, advance, generation_of, state_of

# An attribute of an enum costs 0.3 µs in Python 3.11, a module's name nothing; these are on the hot path.
_READY = int(SlotState.READY)
_READING = int(SlotState.READING)
_ACQUIRE = SlotEvent.ACQUIRE
_JOIN = SlotEvent.JOIN
_LEAVE = SlotEvent.LEAVE
_CONSUME = SlotEvent.CONSUME
_RELEASE = SlotEvent.RELEASE
_ACQUIRED = COUNTER_WORD + Counter.ACQUIRED
_FREED = COUNTER_WORD + Counter.FREED
_CONSUMED = int(Counter.CONSUMED)


class ReadTransitions(SlotHeaders):
    """READY → READING, within READING, and READING → READY or FREE."""

    __slots__ = ()

    def acquire(self, hold: Hold, reader: int) -> PayloadFacts:
        """READY → READING, or one attempt more within READING.

        Args:
            hold: the attempt; its generation is the one asked for.
            reader: who reads, 0 for nobody in particular.

        Raises:
            StaleSlotError: another generation, no payload, or one that all its readers, or this one, have had.
            BusyError: the slot carries as many attempts as it can.
        """
        words = self._words
        base = self._base(hold.slot)
        word = words[base + STATE]
        state = word & STATE_MASK
        if generation_of(word) != hold.generation or state < _READY:
            raise self._stale(hold, word, "the slot was recycled, or its payload was read, dropped or never written")
        entry = (
            base + FIRST_ENTRY
        )  # of a payload with one reader, READY means that nobody has had it: all entries are empty
        if state != _READY or words[base + REQUIRED_READS] != 1:
            entry = self._entry_for(base, hold, reader, word)
        words[IN_TRANSITION_WORD] = hold.slot + 1
        words[_ACQUIRED] += 1
        words[entry + ENTRY_PID] = hold.owner.pid
        words[entry + ENTRY_START] = hold.owner.start
        words[entry + ENTRY_READER] = reader
        words[entry + ENTRY_LEASE] = hold.lease_id << 1
        words[base + STATE] = advance(word, _ACQUIRE if state == _READY else _JOIN)
        words[IN_TRANSITION_WORD] = 0
        return self._facts(base)

    def finalise(self, hold: Hold, reason: Counter) -> bool:
        """End a read attempt. The last one takes the slot to FREE, or back to READY while a reader is missing.

        Args:
            hold: the attempt.
            reason: why, which is counted. `CONSUMED`: its reader has had the payload.

        Returns:
            Whether the attempt was in flight; False changes nothing.
        """
        words = self._words
        base = self._base(hold.slot)
        word = words[base + STATE]
        if word & STATE_MASK != _READING or generation_of(word) != hold.generation:
            return False
        leases = self._entries.leases(base)
        entry = self._entries.find(base, leases, hold.lease_id, hold.owner)
        if entry == 0:
            return False
        words[IN_TRANSITION_WORD] = hold.slot + 1
        words[COUNTER_WORD + reason] += 1
        required = words[base + REQUIRED_READS]
        in_flight, reads, counts = 0, 0, reason == _CONSUMED
        if required != 1 or len(leases) - leases.count(0) > 1:
            entries = self._entries.survey(base, leases, words[entry + ENTRY_READER])
            in_flight, reads = entries.in_flight - 1, entries.reads
            # A second read by one reader, or one more than asked for, is no record worth keeping.
            counts = counts and reads < required and not entries.had_by_reader
        words[entry + ENTRY_LEASE] = hold.lease_id << 1 | 1 if counts else 0
        self._leave_reading(base, in_flight, reads + counts)
        words[IN_TRANSITION_WORD] = 0
        return True

    def _entry_for(self, base: int, hold: Hold, reader: int, word: int) -> int:
        """The entry that a read attempt may take.

        Raises:
            StaleSlotError: all readers, or this one, have had the payload.
            BusyError: no more attempts go in.
        """
        entries = self._entries.survey(base, self._entries.leases(base), reader)
        if entries.had_by_reader or entries.reads >= self._words[base + REQUIRED_READS]:
            raise self._stale(hold, word, "the payload was read already, though an attempt is still in flight")
        if entries.in_flight >= self._geometry.max_attempts:
            self.count(Counter.BUSY)
            raise BusyError(
                "the slot carries as many read attempts as it can", slot=hold.slot, attempts=entries.in_flight
            )
        return entries.first_empty

    def _leave_reading(self, base: int, in_flight: int, reads: int) -> None:
        """Take a READING slot out of READING if nothing is in flight any more."""
        words = self._words
        word = words[base + STATE]
        if in_flight:
            words[base + STATE] = advance(word, _LEAVE)
        elif reads >= words[base + REQUIRED_READS]:
            words[_FREED] += 1
            words[base + STATE] = advance(word, _CONSUME)
            self._entries.clear(base)
        else:
            words[base + STATE] = advance(word, _RELEASE)

    def _stale(self, hold: Hold, word: int, why: str) -> StaleSlotError:
        self.count(Counter.STALE)
        return StaleSlotError(
            f"stale slot: {why}",
            slot=hold.slot,
            generation=hold.generation,
            found_generation=generation_of(word),
            state=state_of(word).name,
        )
