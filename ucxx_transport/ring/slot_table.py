"""The slot headers of a segment and all transitions on them. The caller holds the lock; nothing here waits or does I/O.

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

from ucxx_transport.ring.layout import (
    ENTRY_LEASE,
    IN_TRANSITION_WORD,
    STATE,
    WRITER,
    WRITER_PID,
    WRITER_START,
    Counter,
)
from ucxx_transport.ring.owner import Owner
from ucxx_transport.ring.slot_headers import Hold
from ucxx_transport.ring.slot_reads import ReadTransitions
from ucxx_transport.ring.slot_writes import WriteTransitions
from ucxx_transport.ring.states import STATE_MASK, SlotState, generation_of

# An attribute of an enum costs 0.3 µs in Python 3.11, a module's name nothing; these are on the hot path.
_FREE = int(SlotState.FREE)
_WRITING = int(SlotState.WRITING)
_READY = int(SlotState.READY)
_READING = int(SlotState.READING)


class SlotTable(WriteTransitions, ReadTransitions):
    """All transitions of the slots of one segment, who holds what, and the repair of what was cut off."""

    __slots__ = ()

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
