"""Receive buffers that come back by themselves.

A buffer is lent as a numpy array that owns the loan: every view derived from it (a payload's arrays, a torch tensor
over one of them) keeps the loan alive, and the buffer can be lent again only when the last of them is gone. So no
later payload ever appears in an array that is still held. The same keeps a buffer out of the pool while a
receive into it is in flight: the link holds a view of it until UCX has released it, for good if UCX never does.

Buffers that a GPU copies from are page-locked: once, when they are allocated, for as long as they live.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable
from functools import lru_cache
from typing import Final, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from ucxx_transport.errors import ConfigError

Bytes = npt.NDArray[np.uint8]

# Fields lie at multiples of 64 bytes behind a 64-byte header, so the buffer itself starts at one.
_ALIGNMENT = 64
_SMALLEST_BYTES = 4096

_PAGE_BYTES: Final = 4096
"""What is page-locked is locked by whole pages, which two buffers must not share."""

PageLocker: TypeAlias = Callable[[Bytes], object]
"""Page-locks the memory of an array for as long as the array lives; raises a `ConfigError` where that cannot be."""


@lru_cache(maxsize=4096)
def size_class(nbytes: int) -> int:
    """The buffer length lent for `nbytes`: four sizes an octave, at least 4 KiB; so at most a quarter is slack."""
    if nbytes <= _SMALLEST_BYTES:
        return _SMALLEST_BYTES
    step = 1 << max(0, (nbytes - 1).bit_length() - 3)
    return -(-nbytes // step) * step


class _Loan(weakref.ref[Bytes]):
    """One buffer that is out; by itself, since a weak reference to an array has no hash."""

    __slots__ = ("memory",)
    __hash__ = object.__hash__
    __eq__ = object.__eq__
    memory: memoryview


class BufferPoolStatistics(NamedTuple):
    """Buffers that are out, bytes that are kept for reuse, and allocations ever made."""

    lent: int
    idle_bytes: int
    allocations: int


class BufferPool:
    """Lends byte buffers and takes them back when nothing refers to them any more. Thread-safe.

    Idle buffers beyond `keep_bytes` in all are given back to the system; `page_locker` page-locks every buffer.
    """

    def __init__(self, keep_bytes: int, page_locker: PageLocker | None = None) -> None:
        self._keep_bytes = keep_bytes
        self._page_locker = page_locker
        self._lock = threading.Lock()
        self._idle: dict[int, list[memoryview]] = {}
        self._idle_bytes = 0
        self._allocations = 0
        self._loans: set[_Loan] = set()
        # A loan may end in any thread, inside any lock: its callback only appends here, which is atomic.
        self._returned: deque[_Loan] = deque()

    def lend(self, nbytes: int) -> Bytes:
        """A writable array of `nbytes` bytes, 64-byte aligned, contents undefined, or a ConfigError: no such memory."""
        with self._lock:
            wanted = size_class(nbytes)
            if self._page_locker is not None:
                wanted = -(-wanted // _PAGE_BYTES) * _PAGE_BYTES
            returned, loans, memory = self._returned, self._loans, None
            if returned:
                loan = returned[0]
                if loan in loans and len(loan.memory) == wanted <= self._keep_bytes:
                    memory = loan.memory  # the usual way: what was read before is used up
                    loans.remove(loan)
                    returned.popleft()
                else:
                    self._take_back()
            if memory is None:
                memory = self._idle_or_new(wanted, nbytes)
            # An array over a memoryview: numpy bases whatever is derived from it on this very array, not on the memory.
            lent = np.frombuffer(memory, dtype=np.uint8, count=nbytes)
            loan = _Loan(lent, returned.append)
            loan.memory = memory
            loans.add(loan)
        return lent

    def statistics(self) -> BufferPoolStatistics:
        """Counts now."""
        with self._lock:
            self._take_back()
            return BufferPoolStatistics(len(self._loans), self._idle_bytes, self._allocations)

    def close(self) -> None:
        """Give idle buffers back to the system, and those that are out when they come back."""
        with self._lock:
            self._keep_bytes = 0
            self._take_back()
            self._idle.clear()
            self._idle_bytes = 0

    def _idle_or_new(self, wanted: int, nbytes: int) -> memoryview:
        stack = self._idle.get(wanted)
        if stack:
            memory = stack.pop()
            self._idle_bytes -= wanted
            return memory
        try:
            memory = _allocate(wanted, self._page_locker)
        except MemoryError as exc:  # a reference's size is not trusted
            raise ConfigError(f"no memory for a payload of {nbytes} bytes; release others", nbytes=nbytes) from exc
        self._allocations += 1
        return memory

    def _take_back(self) -> None:
        while self._returned:
            loan = self._returned[0]
            is_out = loan in self._loans
            self._loans.discard(loan)
            self._returned.popleft()  # behind the other: an interrupt in between must not keep the loan for good
            if is_out and self._make_room(len(loan.memory)):
                self._idle.setdefault(len(loan.memory), []).append(loan.memory)
                self._idle_bytes += len(loan.memory)

    def _make_room(self, nbytes: int) -> bool:
        """Drop idle buffers of other sizes, which the work no longer asks for, until `nbytes` more fit, if they can."""
        if self._idle_bytes + nbytes <= self._keep_bytes:
            return True
        for other in sorted(self._idle, reverse=True):
            while other != nbytes and self._idle[other] and self._idle_bytes + nbytes > self._keep_bytes:
                self._idle_bytes -= len(self._idle[other].pop())
        return self._idle_bytes + nbytes <= self._keep_bytes


def _allocate(nbytes: int, page_locker: PageLocker | None) -> memoryview:
    alignment = _ALIGNMENT if page_locker is None else _PAGE_BYTES
    raw = np.empty(nbytes + alignment, dtype=np.uint8)
    start = -raw.ctypes.data % alignment
    piece = raw[start : start + nbytes]
    if page_locker is not None:
        page_locker(piece)
    return piece.data  # which keeps this very array
