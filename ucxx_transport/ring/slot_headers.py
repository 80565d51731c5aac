"""Where a slot's header and its read entries are in memory, and the values that its transitions are made of."""

from __future__ import annotations

from typing import NamedTuple

from ucxx_transport.ring.layout import (
    CHECKSUM,
    COUNTER_WORD,
    ENTRY_LEASE,
    ENTRY_PID,
    ENTRY_READER,
    ENTRY_START,
    ENTRY_WORDS,
    FIRST_ENTRY,
    HAS_CHECKSUM,
    NBYTES,
    STATE,
    Geometry,
    Words,
)
from ucxx_transport.ring.owner import Owner


class Survey(NamedTuple):
    """A slot's entries, counted.

    Attributes:
        first_empty: word of the first empty entry, 0 when all are taken.
        in_flight: attempts in flight.
        reads: reads that count: consumed, each by another reader.
        had_by_reader: whether the reader asked about is among them.
    """

    first_empty: int
    in_flight: int
    reads: int
    had_by_reader: bool


class ReadEntries:
    """Looks up and clears the entries of the slot whose header begins at word `base`."""

    __slots__ = ("_count", "_words")

    def __init__(self, words: Words, entries: int) -> None:
        """Bind to memory.

        Args:
            words: the segment as 64-bit words.
            entries: how many a slot has.
        """
        self._words = words
        self._count = entries

    def leases(self, base: int) -> list[int]:
        """The first word of each entry, 0 where it is empty. One slice costs as much as four single loads."""
        start = base + FIRST_ENTRY + ENTRY_LEASE
        return list(self._words[start : start + ENTRY_WORDS * self._count : ENTRY_WORDS])

    def find(self, base: int, leases: list[int], lease_id: int, owner: Owner) -> int:
        """The word of an attempt in flight, 0 when it is not."""
        words = self._words
        sought = lease_id << 1
        if sought not in leases:
            return 0
        for index, lease in enumerate(leases):
            if lease == sought:
                entry = base + FIRST_ENTRY + ENTRY_WORDS * index
                # lease ids are unique in a process only
                if words[entry + ENTRY_PID] == owner.pid and words[entry + ENTRY_START] == owner.start:
                    return entry
        return 0

    def survey(self, base: int, leases: list[int], reader: int) -> Survey:
        """Count the entries; `reader` 0 is nobody in particular."""
        first = base + FIRST_ENTRY
        empty = leases.count(0)
        reads = sum(lease & 1 for lease in leases)
        return Survey(
            first + ENTRY_WORDS * leases.index(0) if empty else 0,
            self._count - empty - reads,
            reads,
            had_by_reader=reader != 0
            and any(
                lease & 1 and self._words[first + ENTRY_WORDS * index + ENTRY_READER] == reader
                for index, lease in enumerate(leases)
            ),
        )

    def in_flight(self, base: int) -> list[int]:
        """The words of the attempts in flight."""
        first = base + FIRST_ENTRY
        return [first + ENTRY_WORDS * index for index, lease in enumerate(self.leases(base)) if lease and not lease & 1]

    def owner(self, entry: int) -> Owner:
        """Whose attempt an entry is."""
        return Owner(self._words[entry + ENTRY_PID], self._words[entry + ENTRY_START])

    def clear(self, base: int) -> None:
        """Forget attempts and reads."""
        for index, lease in enumerate(self.leases(base)):
            if lease:
                self._words[base + FIRST_ENTRY + ENTRY_WORDS * index + ENTRY_LEASE] = 0


class Hold(NamedTuple):
    """One owner's hold on one slot: a write in progress, or a read attempt in flight."""

    slot: int
    generation: int
    lease_id: int
    owner: Owner
    is_write: bool


class PayloadFacts(NamedTuple):
    """What the header says of a payload."""

    nbytes: int
    checksum: int | None


class SlotHeaders:
    """The headers of one segment's slots, and what every kind of transition needs of them.

    Call every method with the segment's lock held, except `peek`, whose answer is of the past when it returns.
    """

    __slots__ = ("_entries", "_first", "_geometry", "_per_slot", "_words")

    def __init__(self, words: Words, geometry: Geometry) -> None:
        """Bind to memory.

        Args:
            words: the segment as 64-bit words.
            geometry: where the headers lie.
        """
        self._words = words
        self._geometry = geometry
        self._first = geometry.first_slot_word
        self._per_slot = geometry.slot_words
        self._entries = ReadEntries(words, geometry.entries)

    def count(self, counter: int, amount: int = 1) -> None:
        """Add to a counter."""
        self._words[COUNTER_WORD + counter] += amount

    def peek(self, slot: int) -> int:
        """A slot's state word."""
        return self._words[self._base(slot) + STATE]

    def facts(self, slot: int) -> PayloadFacts:
        """Size and checksum of the payload in a READY or READING slot."""
        return self._facts(self._base(slot))

    def _base(self, slot: int) -> int:
        return self._first + slot * self._per_slot

    def _facts(self, base: int) -> PayloadFacts:
        words = self._words
        return PayloadFacts(words[base + NBYTES], words[base + CHECKSUM] if words[base + HAS_CHECKSUM] else None)
