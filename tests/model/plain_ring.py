"""A ring as dictionaries, and the names of its payloads: what the wire machine's port stands before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from tests.support.payloads import answer_with, ref_to
from ucxx_transport.errors import BusyError, StaleSlotError
from ucxx_transport.schema import SlotRef

Key = tuple[int, int]
"""Slot and generation."""


def key_of(ref: SlotRef) -> Key:
    """What names a payload of one ring."""
    return ref.slot, ref.generation


class ModelLease(Protocol):
    """A read attempt."""

    nbytes: int

    def message(self) -> bytes: ...
    def mark_consumed(self) -> bool: ...
    def release_reading(self) -> bool: ...


class ModelRing(Protocol):
    """What the port needs of a ring, and the machine of both."""

    ring_id: bytes

    def write(self, content: bytes) -> SlotRef | None: ...
    def acquire(self, slot: int, generation: int, reader: int) -> ModelLease: ...
    def ready(self) -> list[SlotRef]: ...
    def is_reading(self) -> bool: ...


# --- A ring of dictionaries ------------------------------------------------------------------------------------------


@dataclass
class PlainSlot:
    """One slot: READY if it has content, is not consumed and nobody reads it."""

    generation: int = 0
    written: int = 0
    content: bytes | None = None
    reader: int = 0
    readers: int = 0
    consumed: bool = False


@dataclass
class PlainLease:
    """One attempt on a slot of a `PlainRing`."""

    ring: PlainRing
    slot: PlainSlot
    index: int
    nbytes: int

    def message(self) -> bytes:
        content = self.slot.content or b""
        return answer_with(ref_to(self.ring.ring_id, self.index, self.slot.generation, len(content)), content)

    def mark_consumed(self) -> bool:
        first = not self.slot.consumed
        self.slot.consumed = True
        self._leave()
        return first

    def release_reading(self) -> bool:
        self._leave()
        return True

    def _leave(self) -> None:
        self.slot.readers -= 1
        if not self.slot.readers and self.slot.consumed:
            self.slot.content = None


class PlainRing:
    """`readers=1`: only the reader that has a payload may enter it again, until it is consumed."""

    ring_id = b"plain ring......"

    def __init__(self, slots: int) -> None:
        self.slots = [PlainSlot() for _ in range(slots)]
        self._written = 0

    def write(self, content: bytes) -> SlotRef | None:
        free = [slot for slot in self.slots if slot.content is None]
        ready = sorted((slot for slot in self.slots if not slot.readers), key=lambda slot: slot.written)
        if not free and not ready:
            return None
        slot = (free or ready)[0]
        self._written += 1
        slot.generation, slot.written, slot.content, slot.consumed = slot.generation + 1, self._written, content, False
        return ref_to(self.ring_id, self.slots.index(slot), slot.generation, len(content))

    def acquire(self, slot: int, generation: int, reader: int) -> PlainLease:
        found = self.slots[slot]
        if found.generation != generation or found.content is None or (found.readers and found.consumed):
            raise StaleSlotError("stale")
        if found.readers and found.reader != reader:
            raise BusyError("another reader")
        found.reader = reader
        found.readers += 1
        return PlainLease(self, found, slot, len(found.content))

    def ready(self) -> list[SlotRef]:
        there = [
            (index, slot) for index, slot in enumerate(self.slots) if slot.content is not None and not slot.readers
        ]
        there.sort(key=lambda item: item[1].written)
        return [ref_to(self.ring_id, index, slot.generation, len(slot.content or b"")) for index, slot in there]

    def is_reading(self) -> bool:
        return any(slot.readers for slot in self.slots)
