"""Payload: what a read delivers; and the names of what has been delivered."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import Literal, Self

import numpy as np
import numpy.typing as npt
from typing_extensions import Buffer

from ucxx_transport.errors import ConfigError, SlotError, StaleSlotError
from ucxx_transport.schema import Schema, SlotRef
from ucxx_transport.schema.fields import ArrayTree
from ucxx_transport.schema.wire_form import refuse

Transport = Literal["view", "copy", "ucx"]


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

    def __init__(self, ref: SlotRef, root: npt.NDArray[np.uint8], schema: Schema | None, transport: Transport) -> None:
        self.ref = ref
        self.record: Mapping[str, object] | None = None
        self.transport: Transport = transport
        root.setflags(write=False)
        self._root: npt.NDArray[np.uint8] | None = root
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
        root = self._held()
        arrays = self._arrays  # once: another thread may release meanwhile
        if arrays is None:
            if self.schema is None:
                arrays = {"data": root}
            else:
                arrays = self.schema.views(root.data, writable=root.flags.writeable)
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
        state = " released" if self._root is None else ""
        ref = self.ref
        name = f"{ref.ring_name} slot={ref.slot} generation={ref.generation}"
        return f"<Payload {name} {ref.nbytes} B {self.transport}{state}>"

    def _held(self) -> npt.NDArray[np.uint8]:
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
                while len(self.rings) > self._max_rings:
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


def writable_bytes(into: Buffer, nbytes: int) -> npt.NDArray[np.uint8]:
    """The first `nbytes` bytes of a caller's buffer, or a ConfigError: none, read-only, not contiguous, or shorter."""
    try:
        view = memoryview(into)
    except TypeError:
        refuse("into", into, f"a writable, contiguous buffer of at least {nbytes} bytes, such as an array")
    if view.readonly or not view.c_contiguous or view.nbytes < nbytes:
        raise ConfigError(
            f"into must be a writable, contiguous buffer of at least {nbytes} bytes",
            nbytes=view.nbytes,
            readonly=view.readonly,
            contiguous=view.c_contiguous,
        )
    return np.frombuffer(view.cast("B"), dtype=np.uint8)[:nbytes]
