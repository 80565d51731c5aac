"""ReadLease and SlotReader: read attempts are entered, and payloads copied out."""

from __future__ import annotations

from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt
import xxhash

from ucxx_transport.errors import ChecksumError, ConfigError, SlotError, StaleSlotError, TransportError
from ucxx_transport.ring.claims import Claim
from ucxx_transport.ring.core import RingCore
from ucxx_transport.ring.layout import HEADROOM_BYTES, RAW_FIELD, Counter, frame_bytes
from ucxx_transport.schema import Schema, SlotRef

_MAX_READER: Final = (1 << 63) - 1


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
        return self

    def __exit__(self, *error: object) -> None:
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


class SlotReader:
    """The reading half of a ring handle."""

    __slots__ = ("_core", "_schema")

    def __init__(self, core: RingCore, schema: Schema | None) -> None:
        """Bind to a ring."""
        self._core = core
        self._schema = schema

    def acquire(self, slot: int, generation: int, reader: int, wait_s: float | None = None) -> ReadLease:
        """See `SharedRingBuffer.acquire_slot`."""
        core = self._core
        if not 0 <= slot < core.identity.geometry.slots:
            core.count(Counter.OUT_OF_RANGE)
            raise SlotError("the ring has no such slot", slot=slot, slots=core.identity.geometry.slots)
        if not 0 <= reader <= _MAX_READER:
            raise ConfigError("a reader's id is 0 (nobody in particular) to 2**63 - 1", field="reader", value=reader)
        claim = Claim(core, core.owner(), slot=slot, generation=generation)
        try:
            if wait_s is None:
                facts = core.transact(core.table.acquire, claim.hold, reader)
            else:
                facts = core.transact_within(wait_s, core.table.acquire, claim.hold, reader)
        except TransportError:
            claim.forget()
            raise
        claim.nbytes = facts.nbytes
        return ReadLease(core, claim, facts.checksum, self._schema)

    def acquire_ref(self, ref: SlotRef, reader: int, wait_s: float | None = None) -> ReadLease:
        """See `SharedRingBuffer.acquire`."""
        if ref.ring_id != self._core.identity.ring_id:
            self._core.count(Counter.STALE)
            raise StaleSlotError(
                "stale slot: the reference names another ring, or an earlier one of that name",
                slot=ref.slot,
                generation=ref.generation,
                ring_id=ref.ring_id.hex(),
                found_ring_id=self._core.identity.ring_id.hex(),
            )
        return self.acquire(ref.slot, ref.generation, reader, wait_s)

    def read(self, ref: SlotRef, reader: int) -> dict[str, Any]:
        """See `SharedRingBuffer.read`."""
        with self.acquire_ref(ref, reader) as lease:
            copy = np.frombuffer(lease.buffer, np.uint8).copy()
            if lease.checksum is not None and xxhash.xxh3_64_intdigest(copy.data) != lease.checksum:
                raise ChecksumError(
                    "the payload in the ring is not the one that was written",
                    slot=ref.slot,
                    generation=ref.generation,
                    expected=lease.checksum,
                )
            arrays = {RAW_FIELD: copy} if self._schema is None else self._schema.views(copy.data, writable=True)
            lease.mark_consumed()
        return arrays
