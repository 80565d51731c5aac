"""What every peer's source holds, as many payloads as a ring has slots, and where its reader receives: plain memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from bench.core.payloads import PayloadPattern

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from bench.core.ends import Offer

__all__ = ["ReceiveBuffers", "Received", "Slots"]


class Slots:
    """A source's payloads, in one block.

    Attributes:
        block: all of them, shape `[slots, size_bytes]`.
        memory: each of them.
    """

    def __init__(self) -> None:
        self.block: NDArray[np.uint8] = np.zeros((0, 0), dtype=np.uint8)
        self.memory: list[NDArray[np.uint8]] = []
        self._written = 0

    def open(self, *, size_bytes: int, slots: int) -> None:
        """Hold so many."""
        self._pattern = PayloadPattern(size_bytes)
        self.block = np.zeros((slots, size_bytes), dtype=np.uint8)
        self.memory = list(self.block)
        self._next = 0

    def fill(self, port: int, count: int) -> list[Offer]:
        """Payloads into the next slots; a reference is the port that serves it, and the slot."""
        offers: list[Offer] = []
        for _ in range(count):
            slot, self._next = self._next, (self._next + 1) % len(self.memory)
            np.copyto(self.memory[slot], self._pattern.payload(self._written))
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
    """A reader's receive buffers, warm, in one block, taken in turn: one more than are held at a time."""

    def __init__(self, size_bytes: int, slots: int) -> None:
        self.block = np.zeros((slots + 1, size_bytes), dtype=np.uint8)
        self.received = [Received(buffer.data) for buffer in self.block]
        self._turn = -1

    def next(self) -> int:
        """The index of the next one."""
        self._turn = (self._turn + 1) % len(self.received)
        return self._turn
