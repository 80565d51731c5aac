"""SlotReader: enters read attempts and copies payloads out."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import xxhash

from ucxx_transport.errors import ChecksumError, ConfigError, SlotError, StaleSlotError, TransportError
from ucxx_transport.ring.claims import Claim
from ucxx_transport.ring.core import RingCore
from ucxx_transport.ring.layout import Counter
from ucxx_transport.ring.lease import RAW_FIELD, ReadLease
from ucxx_transport.schema import Schema, SlotRef

_MAX_READER: Final = (1 << 63) - 1


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
