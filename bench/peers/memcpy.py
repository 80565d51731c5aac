"""The ceiling of every copy: memcpy within one process, all pages warm, over as many payloads as a ring has slots."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from bench.core.payloads import PayloadPattern

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from bench.core.ends import Offer

__all__ = ["MemcpyReader", "OwnMemory"]


class OwnMemory:
    """Stands where a source's process stands: offers the reader what the reader holds itself."""

    cpu_s = 0.0
    pids = ()
    _slots = _next = 0

    def call(self, verb: str, **arguments: Any) -> list[Offer] | None:
        """The next slots, by turns: payload number = slot."""
        if verb == "open":
            self._slots, self._next = arguments["slots"], 0
            return None
        first, self._next = self._next, self._next + arguments["count"]
        return [(turn % self._slots, turn % self._slots) for turn in range(first, self._next)]

    def watch_cpu(self) -> None:
        """There is no process behind it."""


class _Copied:
    def __init__(self, destination: NDArray[np.uint8]) -> None:
        self.buffer = destination.data

    def release(self) -> None:
        """The destination is used again for the next copy."""


class MemcpyReader:
    """Copies into one destination."""

    def open(self, *, size_bytes: int, slots: int) -> None:
        pattern = PayloadPattern(size_bytes)
        self._payloads = [pattern.payload(slot).copy() for slot in range(slots)]
        self._destination = np.zeros(size_bytes, dtype=np.uint8)
        self._copied = _Copied(self._destination)

    def resolve(self, reference: int) -> NDArray[np.uint8]:
        return self._payloads[reference]

    def read(self, reference: NDArray[np.uint8]) -> _Copied:
        np.copyto(self._destination, reference)
        return self._copied

    def close(self) -> None:
        self._payloads = []
