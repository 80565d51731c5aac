"""The read entries of a slot: its attempts in flight, and who has had the payload. Under the lock, like `SlotTable`."""

from __future__ import annotations

from collections.abc import MutableSequence
from typing import NamedTuple

from ucxx_transport.ring.layout import (
    ENTRY_LEASE,
    ENTRY_PID,
    ENTRY_READER,
    ENTRY_START,
    ENTRY_WORDS,
    FIRST_ENTRY,
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

    __slots__ = ("_offsets", "_words")

    def __init__(self, words: MutableSequence[int], entries: int) -> None:
        """Bind to memory.

        Args:
            words: the segment as 64-bit words.
            entries: how many a slot has.
        """
        self._words = words
        self._offsets = range(FIRST_ENTRY, FIRST_ENTRY + ENTRY_WORDS * entries, ENTRY_WORDS)

    def find(self, base: int, lease_id: int, owner: Owner) -> int:
        """The word of an attempt in flight, 0 when it is not."""
        words = self._words
        sought = lease_id << 1
        for offset in self._offsets:
            if words[base + offset + ENTRY_LEASE] == sought:
                entry = base + offset
                # lease ids are unique in a process only
                if words[entry + ENTRY_PID] == owner.pid and words[entry + ENTRY_START] == owner.start:
                    return entry
        return 0

    def survey(self, base: int, reader: int) -> Survey:
        """Count the entries; `reader` 0 is nobody in particular."""
        words = self._words
        first_empty = in_flight = reads = 0
        had_by_reader = False
        for offset in self._offsets:
            lease = words[base + offset + ENTRY_LEASE]
            if lease == 0:
                if first_empty == 0:
                    first_empty = base + offset
            elif lease & 1:
                reads += 1
                if reader and words[base + offset + ENTRY_READER] == reader:
                    had_by_reader = True
            else:
                in_flight += 1
        return Survey(first_empty, in_flight, reads, had_by_reader)

    def in_flight(self, base: int) -> list[int]:
        """The words of the attempts in flight."""
        words = self._words
        return [base + offset for offset in self._offsets if words[base + offset] and not words[base + offset] & 1]

    def owner(self, entry: int) -> Owner:
        """Whose attempt an entry is."""
        return Owner(self._words[entry + ENTRY_PID], self._words[entry + ENTRY_START])

    def clear(self, base: int) -> None:
        """Forget attempts and reads."""
        words = self._words
        for offset in self._offsets:
            if words[base + offset + ENTRY_LEASE]:
                words[base + offset + ENTRY_LEASE] = 0
