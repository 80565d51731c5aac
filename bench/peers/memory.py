"""What every peer's source holds, and where its reader receives: plain memory, as many pieces as a ring has slots."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from bench.core.payloads import PayloadPattern

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from bench.core.ends import Offer

__all__ = ["ReceiveBuffers", "Received", "Slots"]


class Slots:
    """A source's payloads."""

    memory: list[NDArray[np.uint8]]

    def __init__(self) -> None:
        self.memory = []
        self._written = 0

    def open(self, *, size_bytes: int, slots: int) -> None:
        """Hold so many."""
        self._pattern = PayloadPattern(size_bytes)
        self.memory = [np.zeros(size_bytes, dtype=np.uint8) for _ in range(slots)]

    def fill(self, port: int) -> list[Offer]:
        """A payload into every slot; a reference is the port that serves it, and the slot."""
        offers: list[Offer] = []
        for slot, memory in enumerate(self.memory):
            np.copyto(memory, self._pattern.payload(self._written))
            offers.append((self._written, (port, slot)))
            self._written += 1
        return offers


class Received:
    """A payload in a receive buffer, which is used again when its turn comes round."""

    __slots__ = ("buffer",)

    def __init__(self, buffer: memoryview) -> None:
        self.buffer = buffer

    def release(self) -> None:
        """Nothing."""


class ReceiveBuffers:
    """A reader's receive buffers, warm, taken in turn: one more than are held at a time."""

    def __init__(self, size_bytes: int, slots: int) -> None:
        self.received = [Received(np.zeros(size_bytes, dtype=np.uint8).data) for _ in range(slots + 1)]
        self._turn = -1

    def next(self) -> int:
        """The index of the next one."""
        self._turn = (self._turn + 1) % len(self.received)
        return self._turn
