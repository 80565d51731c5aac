"""WriteLease and ReadLease: the right to one slot for a while. Each finalises exactly once, whatever else happens.

A lease is left in one of three ways: by its own call (`commit`, `mark_consumed` …), by leaving its `with` block, or by
being dropped. Arrays and buffers made from a lease keep its slot even when the lease object is gone, but not beyond its
finalise.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from ucxx_transport.errors import ConfigError, SlotError
from ucxx_transport.ring.claims import Claim
from ucxx_transport.ring.layout import HEADROOM_BYTES, frame_bytes

if TYPE_CHECKING:
    from ucxx_transport.ring.core import RingCore
    from ucxx_transport.ring.writing import SlotWriter
    from ucxx_transport.schema import Schema, SlotRef
    from ucxx_transport.schema.placement import Placement

RAW_FIELD = "data"
"""The one array of a raw ring's payload: its bytes as uint8."""


class WriteLease:
    """A slot to write to, from `reserve()`.

    Fill `arrays` or `buffer`, then `commit()`. As a context manager: a clean exit commits, an exception aborts.
    """

    __slots__ = ("__weakref__", "_claim", "_meta", "_placement", "_readers", "_ref", "_writer")

    def __init__(
        self,
        writer: SlotWriter,
        claim: Claim,
        *,
        placement: Placement | None,
        readers: int,
        meta: Mapping[str, object] | None,
    ) -> None:
        """Wrap a claim; use `SharedRingBuffer.reserve`."""
        self._writer = writer
        self._claim = claim
        self._placement = placement
        self._readers = readers
        self._meta = meta
        self._ref: SlotRef | None = None

    @property
    def slot(self) -> int:
        """The slot's index."""
        return self._claim.hold.slot

    @property
    def generation(self) -> int:
        """Which write to that slot this is."""
        return self._claim.hold.generation

    @property
    def nbytes(self) -> int:
        """Bytes reserved."""
        return self._claim.nbytes

    @property
    def buffer(self) -> memoryview:
        """The slot's memory, writable, `nbytes` long. Not to be written to after `commit`."""
        self._require_open()
        return np.asarray(self._claim).data

    @property
    def arrays(self) -> dict[str, Any]:
        """Writable arrays straight over the slot, nested as the schema says; a raw ring's is `{"data": uint8}`."""
        self._require_open()
        return self._writer.arrays_over(np.asarray(self._claim), self._placement)

    @property
    def ref(self) -> SlotRef:
        """The payload's reference, once committed.

        Raises:
            SlotError: not committed.
        """
        if self._ref is None:
            raise SlotError("a write lease has a reference only once it is committed", slot=self.slot)
        return self._ref

    def commit(self, nbytes: int | None = None) -> SlotRef:
        """Make the payload readable.

        Args:
            nbytes: bytes really used, if fewer than reserved (raw rings).

        Returns:
            Its reference, also as `ref`. A second call returns the same.

        Raises:
            SlotError: the lease was aborted, or reclaimed.
            ConfigError: `nbytes` is not 0 to the bytes reserved, or the ring has a schema, or `meta` is no msgpack.
        """
        if self._ref is None:
            used = self._claim.nbytes if nbytes is None else nbytes
            if nbytes is not None and (self._placement is not None or not 0 <= used <= self._claim.nbytes):
                raise ConfigError(
                    f"nbytes must be 0 to {self._claim.nbytes} on a raw ring, and left out on one with a schema",
                    field="nbytes",
                    value=nbytes,
                )
            self._require_open()
            self._ref = self._writer.commit(self._claim, used, self._readers, self._meta)
        return self._ref

    def abort(self) -> bool:
        """Give the slot back without a payload.

        Returns:
            Whether this call did; False when the lease was committed, aborted or reclaimed before.
        """
        return self._writer.abort(self._claim)

    def __enter__(self) -> Self:
        """The lease itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Commit on a clean exit, unless committed or aborted already; abort on an exception."""
        if not self._claim.is_live:
            return
        if kind is not None:
            self.abort()
            return
        try:
            self.commit()
        except BaseException:
            self.abort()
            raise

    def _require_open(self) -> None:
        if not self._claim.is_live:
            raise SlotError(
                "this write lease has ended, or was inherited by a forked process",
                slot=self.slot,
                generation=self.generation,
            )


class ReadLease:
    """One read attempt on a payload, from `acquire()`. As a context manager: leaving it unfinalised releases it."""

    __slots__ = ("__weakref__", "_claim", "_core", "_detached", "_schema", "checksum")

    def __init__(self, core: RingCore, claim: Claim, checksum: int | None, schema: Schema | None) -> None:
        """Wrap a claim; use `SharedRingBuffer.acquire`."""
        self._core = core
        self._claim: Claim | None = claim
        self._detached = claim.guard
        self._schema = schema
        self.checksum = checksum
        """xxh3_64 of the payload, None when the ring takes none."""

    @property
    def slot(self) -> int:
        """The slot's index."""
        return self._detached.hold.slot

    @property
    def generation(self) -> int:
        """Which write to that slot is read."""
        return self._detached.hold.generation

    @property
    def attempt(self) -> int:
        """The attempt's id, unique in this process."""
        return self._detached.hold.lease_id

    @property
    def nbytes(self) -> int:
        """Bytes of the payload."""
        return self._held().nbytes

    @property
    def buffer(self) -> memoryview:
        """The payload, read-only."""
        return np.asarray(self._held()).data

    @property
    def arrays(self) -> dict[str, Any]:
        """Read-only arrays over the payload, nested as the schema says; a raw ring's is `{"data": uint8}`.

        They are the slot's own memory: copy what must outlive `mark_consumed` or `release_reading`.
        """
        memory = np.asarray(self._held())
        return {RAW_FIELD: memory} if self._schema is None else self._schema.views(memory.data)

    def frame(self) -> memoryview:
        """[64 bytes headroom | payload | padding to 8 | 64 bytes tailroom], writable, for the server to send from.

        Headroom and tailroom are shared by all attempts on the slot: write only what every attempt would write.
        """
        claim = self._held()
        start = self._core.identity.geometry.payload_byte(claim.hold.slot) - HEADROOM_BYTES
        return self._core.segment.memory[start : start + frame_bytes(claim.nbytes)].data

    def mark_consumed(self) -> bool:
        """End the attempt: its reader has had the payload.

        Returns:
            Whether this call ended it. False changes nothing and is counted: it had ended, or was reclaimed.
        """
        return self._end(consumed=True)

    def release_reading(self) -> bool:
        """End the attempt without having had the payload: it is READY again unless another attempt has it.

        Returns:
            Whether this call ended it. False changes nothing and is counted.
        """
        return self._end(consumed=False)

    def detach(self) -> npt.NDArray[np.uint8]:
        """Hand the attempt over to an array.

        Returns:
            The payload, read-only, shape (nbytes,), uint8. When it and every view derived from it are gone, in any
            thread and at any time, the attempt is consumed. The lease itself ends with this call.

        Raises:
            SlotError: the lease has ended.
        """
        claim = self._held()
        memory: npt.NDArray[np.uint8] = np.asarray(claim)
        claim.guard.consumes = True
        self._claim = None
        return memory

    def __enter__(self) -> Self:
        """The lease itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release the attempt if it was neither finalised nor detached."""
        if self._claim is not None and self._claim.is_live:
            self.release_reading()

    def _end(self, *, consumed: bool) -> bool:
        if self._claim is None:
            self._core.note_late(self._detached.hold)
            return False
        return self._core.end_read(self._claim, consumed=consumed)

    def _held(self) -> Claim:
        if self._claim is None or not self._claim.is_live:
            raise SlotError(
                "this read lease has ended, or was inherited by a forked process",
                slot=self.slot,
                generation=self.generation,
            )
        return self._claim
