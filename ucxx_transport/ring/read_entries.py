"""The read entries of a slot: its attempts in flight, and who has had the payload. Under the lock, like `SlotTable`."""

from __future__ import annotations

from typing import NamedTuple

from ucxx_transport.ring.layout import (
    ENTRY_LEASE,
    ENTRY_PID,
    ENTRY_READER,
    ENTRY_START,
    ENTRY_WORDS,
    FIRST_ENTRY,
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
