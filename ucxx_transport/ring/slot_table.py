"""SlotTable: all transitions of a segment's slots. The caller holds the lock; nothing here waits or does I/O.

Each change is bracketed by the segment's in-transition word and commits by one store of a state word (or, within
READING, of a read entry's first word). What is written before that store does not count while the old state stands, and
what is written after it does not count under the new one:

| state   | what counts of the header                                                                             |
|---------|-------------------------------------------------------------------------------------------------------|
| FREE    | nothing                                                                                               |
| WRITING | the writer                                                                                            |
| READY   | nbytes, sequence, checksum, required reads, entries of readers that have had the payload              |
| READING | the same, and the entries in flight                                                                   |

So `repair` of a slot is to clear what does not count and, for READING with nothing in flight, to take the transition
that was cut off. It is idempotent, and complete wherever its predecessor was killed or interrupted.
"""

from __future__ import annotations

from ucxx_transport.errors import BusyError, SlotError, StaleSlotError
from ucxx_transport.ring.layout import (
    CHECKSUM,
    COUNTER_WORD,
    CURSOR_WORD,
    ENTRY_LEASE,
    ENTRY_PID,
    ENTRY_READER,
    ENTRY_START,
    FIRST_ENTRY,
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
from ucxx_transport.ring.slot_headers import Hold, PayloadFacts, SlotHeaders
from ucxx_transport.ring.states import STATE_MASK, SlotEvent, SlotState, advance, generation_of, state_of

# An attribute of an enum costs 0.3 µs in Python 3.11, a module's name nothing; these are on the hot path.
_FREE = int(SlotState.FREE)
_WRITING = int(SlotState.WRITING)
_READY = int(SlotState.READY)
_READING = int(SlotState.READING)
_RESERVE = SlotEvent.RESERVE
_OVERWRITE = SlotEvent.OVERWRITE
_COMMIT = SlotEvent.COMMIT
_ABORT = SlotEvent.ABORT
_DISCARD = SlotEvent.DISCARD
_ACQUIRE = SlotEvent.ACQUIRE
_JOIN = SlotEvent.JOIN
_LEAVE = SlotEvent.LEAVE
_CONSUME = SlotEvent.CONSUME
_RELEASE = SlotEvent.RELEASE
_WRITTEN = COUNTER_WORD + Counter.WRITTEN
_OVERWRITTEN = COUNTER_WORD + Counter.OVERWRITTEN
_COMMITTED = COUNTER_WORD + Counter.COMMITTED
_COMMITTED_BYTES = COUNTER_WORD + Counter.COMMITTED_BYTES
_ACQUIRED = COUNTER_WORD + Counter.ACQUIRED
_FREED = COUNTER_WORD + Counter.FREED
_CONSUMED = int(Counter.CONSUMED)


class SlotTable(SlotHeaders):
    """All transitions of the slots of one segment, who holds what, and the repair of what was cut off.

    A writer's: FREE or READY → WRITING → READY or FREE, and READY → FREE. A reader's: READY → READING, within READING,
    and READING → READY or FREE.
    """

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
        # of a payload with one reader, READY means that it has not been read: all entries are empty
        entry = base + FIRST_ENTRY
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

    def holds(self, slot: int) -> list[Hold]:
        """The write or the read attempts that a slot carries."""
        words = self._words
        base = self._base(slot)
        word = words[base + STATE]
        generation = generation_of(word)
        if word & STATE_MASK == _WRITING:
            owner = Owner(words[base + WRITER_PID], words[base + WRITER_START])
            return [Hold(slot, generation, words[base + WRITER], owner, is_write=True)]
        if word & STATE_MASK != _READING:
            return []
        return [
            Hold(slot, generation, words[entry] >> 1, self._entries.owner(entry), is_write=False)
            for entry in self._entries.in_flight(base)
        ]

    def repair(self) -> None:
        """Complete or undo the transition that was cut off, if any was."""
        words = self._words
        marked = words[IN_TRANSITION_WORD]
        if not 1 <= marked <= self._geometry.slots:
            words[IN_TRANSITION_WORD] = 0
            return
        base = self._base(marked - 1)
        state = words[base + STATE] & STATE_MASK
        if state != _WRITING:
            words[base + WRITER] = 0
        if state in (_FREE, _WRITING):
            self._entries.clear(base)
        elif state == _READY:
            for entry in self._entries.in_flight(base):
                words[entry + ENTRY_LEASE] = 0
        else:
            entries = self._entries.survey(base, self._entries.leases(base), 0)
            self._leave_reading(base, entries.in_flight, entries.reads)
        self.count(Counter.REPAIRED_SLOTS)
        words[IN_TRANSITION_WORD] = 0
