"""Where a slot's header is in memory, and the values that its transitions are made of."""

from __future__ import annotations

from typing import NamedTuple

from ucxx_transport.ring.layout import (
    CHECKSUM,
    COUNTER_WORD,
    HAS_CHECKSUM,
    NBYTES,
    STATE,
    Geometry,
    Words,
)
from ucxx_transport.ring.owner import Owner
from ucxx_transport.ring.read_entries import ReadEntries


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
