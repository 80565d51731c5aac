"""Payload: what a read delivers, and the names of what has been delivered; and the buffers that payloads lie in.

A buffer is lent as a numpy array that owns the loan: every view derived from it (a payload's arrays, a torch tensor
over one of them) keeps the loan alive, and the buffer can be lent again only when the last of them is gone. So no
later payload ever appears in an array that is still held. The same keeps a buffer out of the pool while a
receive into it is in flight: the link holds a view of it until UCX has released it, for good if UCX never does.

Buffers that a GPU copies from are page-locked: once, when they are allocated, for as long as they live.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Final, Literal, NamedTuple, Self, TypeAlias

import numpy as np
import numpy.typing as npt
from typing_extensions import Buffer

from ucxx_transport.errors import ConfigError, SlotError, StaleSlotError
from ucxx_transport.schema import Schema, SlotRef
from ucxx_transport.schema.fields import ArrayTree
from ucxx_transport.schema.wire_form import refuse

Transport = Literal["view", "copy", "ucx"]
Bytes = npt.NDArray[np.uint8]

# Fields lie at multiples of 64 bytes behind a 64-byte header, so the buffer itself starts at one.
_ALIGNMENT = 64
_SMALLEST_BYTES = 4096

_PAGE_BYTES: Final = 4096
"""What is page-locked is locked by whole pages, which two buffers must not share."""


PageLocker: TypeAlias = Callable[[Bytes], object]
"""Page-locks the memory of an array for as long as the array lives; raises a `ConfigError` where that cannot be."""


class Payload:
    """One delivered payload: its bytes, and its arrays as views of them.

    The memory behind it (a pooled buffer, or the ring's slot itself after a read in place) is recycled only when
    neither the payload nor any array, slice or tensor made from it is left. `release()` drops the payload's own hold;
    call it, or use `with`, as soon as the data is used up: an unreleased view keeps its slot from being written.

    It is read-only, however it came, since others may see it. numpy answers a write with "output array is read-only" or
    "assignment destination is read-only": copy an array before you write to it, or read `into` memory of yours.

    Attributes:
        ref: the reference it was read by.
        schema: the fields of its arrays; None for a raw ring's.
        transport: "view" (the slot, in place), "copy" (copied out of the slot), "ucx".
        record: of a payload that was taken: what its writer noted of it, a rollout worker's record or else the `meta`;
            None when that was nothing, and for one that was read by its reference.
    """

    __slots__ = ("_arrays", "_root", "record", "ref", "schema", "transport")

    def __init__(self, ref: SlotRef, root: Bytes, schema: Schema | None, transport: Transport) -> None:
        self.ref = ref
        self.record: Mapping[str, object] | None = None
        self.transport: Transport = transport
        root.setflags(write=False)
        self._root: Bytes | None = root
        self.schema = schema
        self._arrays: ArrayTree | None = None

    @property
    def nbytes(self) -> int:
        """Length of the payload in bytes."""
        return self.ref.nbytes

    @property
    def buffer(self) -> memoryview:
        """The payload's bytes, without a copy; read-only unless it was read `into` memory of the caller's.

        Raises:
            SlotError: it has been released.
        """
        return self._held().data

    @property
    def arrays(self) -> ArrayTree:
        """The payload's fields as nested dicts and lists of arrays, without a copy; `{"data": bytes}` for a raw ring.

        Read-only unless it was read `into` memory of the caller's.

        Raises:
            SlotError: the payload has been released.
            ProtocolError: the bytes are not a payload of the schema.
        """
        root, schema = self._held(), self.schema
        arrays = self._arrays  # once: another thread may release meanwhile
        if arrays is None:
            arrays = {"data": root} if schema is None else schema.views(root.data, writable=root.flags.writeable)
            self._arrays = arrays
        return arrays

    @property
    def released(self) -> bool:
        """Whether `release()` has been called."""
        return self._root is None

    def release(self) -> None:
        """Give up this payload's hold on its memory; arrays taken from it stay valid while they live. Idempotent."""
        self._root = None
        self._arrays = None

    def copied_into(self, into: Buffer) -> Payload:
        """The same payload, in memory of the caller's, and writable; its own memory is given back.

        Args:
            into: writable, contiguous, at least `nbytes` bytes.

        Raises:
            ConfigError: `into` is something else.
        """
        target = writable_bytes(into, self.nbytes)
        np.copyto(target, self._held())
        self._root, self._arrays = target, None
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def __repr__(self) -> str:
        ref, state = self.ref, " released" if self.released else ""
        name = f"{ref.ring_name} slot={ref.slot} generation={ref.generation}"
        return f"<Payload {name} {ref.nbytes} B {self.transport}{state}>"

    def _held(self) -> Bytes:
        if self._root is None:
            raise SlotError("the payload has been released; read its arrays before release()", slot=self.ref.slot)
        return self._root


class Deduplicator:
    """The newest generation of each ring's slots that this client has delivered or discarded. Thread-safe.

    It drops the duplicates that a lost acknowledgement allows. A generation only grows, so the newest one of each slot
    is all there is to remember. Beyond `max_rings` the ring longest unused is forgotten.
    """

    def __init__(self, max_rings: int) -> None:
        self._max_rings = max_rings
        self.rings: OrderedDict[bytes, dict[int, int]] = OrderedDict()
        self._lock = threading.Lock()

    def check(self, ref: SlotRef) -> None:
        """Refuse (StaleSlotError) a payload that this client, or a newer one of its slot, was delivered before."""
        slots = self.rings.get(ref.ring_id)
        if slots is not None and slots.get(ref.slot, 0) >= ref.generation:
            raise StaleSlotError(
                "this client has already received or discarded this payload, or a newer one of its slot; keep the "
                "first read's payload or a copy of its arrays, and write what several read with readers=N",
                slot=ref.slot,
                generation=ref.generation,
                delivered=slots[ref.slot],
            )

    def claim(self, ref: SlotRef, note: list[SlotRef] | None = None) -> None:
        """Deliver a payload, once: of several reads of it that came this far, one gets it. Errors as `check`.

        Call it while the slot is still held (before it is consumed): then no newer payload of the slot can be faster.
        It is in `note` before: an interrupt may come before it is delivered (`forget`).
        """
        with self._lock:
            slots = self.rings.get(ref.ring_id)
            if slots is not None and slots.get(ref.slot, 0) >= ref.generation:
                self.check(ref)
            if slots is None:
                slots = self.rings[ref.ring_id] = {}
                if len(self.rings) > self._max_rings:
                    self.rings.popitem(last=False)
            else:
                self.rings.move_to_end(ref.ring_id)
            if note is not None:
                note[:] = (ref,)
            slots[ref.slot] = ref.generation

    def forget(self, ref: SlotRef) -> None:
        """A payload was claimed, and an interrupt came before it was delivered."""
        with self._lock:
            slots = self.rings.get(ref.ring_id, {})
            if slots.get(ref.slot) == ref.generation:
                del slots[ref.slot]


def writable_bytes(into: Buffer, nbytes: int) -> Bytes:
    """The first `nbytes` bytes of a caller's buffer, or a ConfigError: none, read-only, not contiguous, or shorter."""
    try:
        view = memoryview(into)
    except TypeError:
        refuse("into", into, f"a writable, contiguous buffer of at least {nbytes} bytes, such as an array")
    if view.readonly or not view.c_contiguous or view.nbytes < nbytes:
        text = f"into must be a writable, contiguous buffer of at least {nbytes} bytes"
        raise ConfigError(text, nbytes=view.nbytes, readonly=view.readonly, contiguous=view.c_contiguous)
    return np.frombuffer(view.cast("B"), dtype=np.uint8)[:nbytes]


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
        if self._idle.get(wanted):
            self._idle_bytes -= wanted
            return self._idle[wanted].pop()
        alignment = _ALIGNMENT if self._page_locker is None else _PAGE_BYTES
        try:
            raw = np.empty(wanted + alignment, dtype=np.uint8)
        except MemoryError as exc:  # a reference's size is not trusted
            raise ConfigError(f"no memory for a payload of {nbytes} bytes; release others", nbytes=nbytes) from exc
        start = -raw.ctypes.data % alignment
        piece = raw[start : start + wanted]
        if self._page_locker is not None:
            self._page_locker(piece)
        self._allocations += 1
        return piece.data  # which keeps this very array

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
