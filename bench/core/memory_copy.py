"""The ceiling of every copy: memcpy within one process, all pages warm, over as many sources as a ring has slots."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.core.payloads import PayloadPattern
from bench.core.reader import ReaderSettings, Reading, run_reader

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from numpy.typing import NDArray

__all__ = ["OwnMemory", "run_memory_copy_reader"]


def run_memory_copy_reader(connection: Connection) -> None:
    """Be the process that copies within itself."""
    run_reader(connection, _open)


class OwnMemory:
    """Stands where a source process stands: offers the reader what the reader holds itself."""

    cpu_s = 0.0

    def __init__(self) -> None:
        self._slots = 0

    def open(self, *, size_bytes: int, slots: int) -> None:
        """Offer `slots` payloads of `size_bytes` from now on."""
        del size_bytes
        self._slots = slots

    def fill(self) -> list[tuple[int, dict[str, Any]]]:
        """The same offers each time: payload number = slot."""
        return [(slot, {"slot": slot}) for slot in range(self._slots)]

    def watch_cpu(self) -> None:
        """There is no process behind it."""


class _Copied:
    transport = "memcpy"

    def __init__(self, destination: NDArray[np.uint8]) -> None:
        self.buffer = destination.data

    def release(self) -> None:
        """The destination is used again for the next copy."""


class _MemoryCopy:
    def __init__(self, settings: ReaderSettings) -> None:
        pattern = PayloadPattern(settings.size_bytes)
        self._sources = [pattern.payload(slot).copy() for slot in range(settings.slots)]
        self._destination = np.empty(settings.size_bytes, dtype=np.uint8)
        self._copied = _Copied(self._destination)

    def resolve(self, reference: Mapping[str, Any]) -> NDArray[np.uint8]:
        slot: int = reference["slot"]
        return self._sources[slot]

    def read(self, reference: NDArray[np.uint8]) -> _Copied:
        np.copyto(self._destination, reference)
        return self._copied


@contextmanager
def _open(settings: ReaderSettings) -> Iterator[Reading]:
    copying = _MemoryCopy(settings)
    yield Reading(resolve=copying.resolve, read=copying.read)
