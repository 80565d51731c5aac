"""SlotReader and ReadLease: read attempts are entered, and each is ended exactly once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Self

import numpy as np
import numpy.typing as npt
import xxhash

from ucxx_transport.errors import ChecksumError, ConfigError, SlotError, StaleSlotError, TransportError
from ucxx_transport.ring import layout
from ucxx_transport.ring.core import RingCore
from ucxx_transport.ring.holds import DetachedRead, Hold, settle, unsettled
from ucxx_transport.ring.layout import Counter, message_bytes
from ucxx_transport.ring.states import MAX_GENERATION
from ucxx_transport.schema.envelope import unpack_envelope

if TYPE_CHECKING:
    from ucxx_transport.schema import Schema, SlotRef

_MAX_READER: Final = (1 << 63) - 1
# An attribute of an enum costs 0.3 µs in Python 3.11.
_CONSUMED: Final = Counter.CONSUMED
_RELEASED: Final = Counter.RELEASED


class ReadLease(Hold):
    """One read attempt on a payload, from `acquire()`. As a context manager: leaving it unfinalised releases it."""

    __slots__ = ("_core", "_schema")

    _core: RingCore
    _schema: Schema | None

    @property
    def attempt(self) -> int:
        """The attempt's id, unique in this process."""
        return self.lease_id

    @property
    def nbytes(self) -> int:
        """Bytes of the payload."""
        self._require_held()
        return self.words[layout.HOLD_NBYTES]

    @property
    def checksum(self) -> int | None:
        """xxh3_64 of the payload, None when the ring takes none."""
        return self.words[layout.HOLD_CHECKSUM] if self.words[layout.HOLD_HAS_CHECKSUM] else None

    @property
    def buffer(self) -> memoryview:
        """The payload, read-only."""
        self._require_held()
        return np.asarray(self).data

    @property
    def arrays(self) -> dict[str, Any]:
        """Read-only arrays over the payload, nested as the schema says; a raw ring's is `{"data": uint8}`.

        They are the slot's own memory: copy what must outlive `mark_consumed` or `release_reading`.
        """
        self._require_held()
        memory = np.asarray(self)
        return {layout.RAW_FIELD: memory} if self._schema is None else self._schema.views(memory.data)

    @property
    def commit_time_ns(self) -> int:
        """When the payload was committed: nanoseconds since 1970 by its writer's clock."""
        return self.words[layout.HOLD_COMMIT_TIME]

    @property
    def message(self) -> memoryview:
        """The payload as a server sends it, read-only: [header of 64 bytes | payload | zeros to 8 | trailer of 16].

        It does not keep the attempt.
        """
        if not self.is_live:
            self._require_held()
        core, words = self._core, self.words
        start = core.first_payload_byte + words[layout.HOLD_SLOT] * core.stride_bytes - layout.HEADROOM_BYTES
        return core.readable[start : start + message_bytes(words[layout.HOLD_NBYTES])]

    @property
    def envelope(self) -> bytes:
        """What the writer said of the payload, as msgpack; b"" when it said nothing, or too much."""
        self._require_held()
        core, words = self._core, self.words
        room = core.identity.geometry.envelope_bytes
        start = core.first_payload_byte + words[layout.HOLD_SLOT] * core.stride_bytes - layout.HEADROOM_BYTES - room
        return bytes(core.readable[start : start + words[layout.HOLD_ENVELOPE_BYTES]])

    @property
    def record(self) -> dict[str, object] | None:
        """The envelope's content: the payload's `meta`, or, of a rollout worker's, its record; None without one.

        `EpisodeRecord.from_envelope(lease.record, ring.reference(lease))` makes a record of it.

        Raises:
            ProtocolError: the envelope is no mapping of plain values.
        """
        return unpack_envelope(self.envelope)

    def is_of(self, ring_id: bytes) -> bool:
        """Whether it is an attempt on that ring."""
        return self._core.identity.ring_id == ring_id

    def mark_consumed(self) -> bool:
        """End the attempt: its reader has had the payload.

        Returns:
            Whether this call ended it. False changes nothing and is counted: it had ended, or was reclaimed.
        """
        return self._core.end_read(self, _CONSUMED)

    def release_reading(self) -> bool:
        """End the attempt without having had the payload: it is READY again unless another attempt has it.

        Returns:
            Whether this call ended it. False changes nothing and is counted.
        """
        return self._core.end_read(self, _RELEASED)

    def detach(self) -> npt.NDArray[np.uint8]:
        """Hand the attempt over to an array.

        Returns:
            The payload, read-only, shape (nbytes,), uint8. When it and every view derived from it are gone, in any
            thread and at any time, the attempt is consumed. The lease itself ends with this call.

        Raises:
            SlotError: the lease has ended.
        """
        return np.asarray(DetachedRead(self))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Release the attempt if it was neither finalised nor detached."""
        if self.is_live:
            self.release_reading()

    def _require_held(self) -> None:
        if not self.is_live:
            raise SlotError(
                "this read lease has ended, or was inherited by a forked process",
                slot=self.slot,
                generation=self.generation,
            )


class SlotReader:
    """The reading half of a ring handle."""

    __slots__ = ("_core", "_ring_id", "_schema", "_slots")

    def __init__(self, core: RingCore, schema: Schema | None) -> None:
        """Bind to a ring."""
        self._core = core
        self._ring_id = core.identity.ring_id
        self._schema = schema
        self._slots = core.identity.geometry.slots

    def acquire(self, slot: int, generation: int, reader: int, wait_s: float | None = None) -> ReadLease:
        """See `SharedRingBuffer.acquire_slot`."""
        if not 0 <= slot < self._slots:
            self._core.transitions.count(Counter.OUT_OF_RANGE)
            raise SlotError("the ring has no such slot", slot=slot, slots=self._slots)
        if not 0 <= generation <= MAX_GENERATION:
            raise self._stale("the slot has no such generation", slot, generation)
        lease = self.new_lease(slot, generation, reader)
        try:
            self._core.transitions.acquire(lease.words, wait_s)
        except TransportError:
            lease.forget()
            raise
        return lease

    def acquire_ref(self, ref: SlotRef, reader: int, wait_s: float | None = None) -> ReadLease:
        """See `SharedRingBuffer.acquire`."""
        if ref.ring_id != self._ring_id:
            raise self._stale(
                "the reference names another ring, or an earlier one of that name",
                ref.slot,
                ref.generation,
                ring_id=ref.ring_id.hex(),
                found_ring_id=self._ring_id.hex(),
            )
        lease = self.new_lease(ref.slot, ref.generation, reader)
        try:
            self._core.transitions.acquire(lease.words, wait_s)
        except TransportError:
            lease.forget()
            raise
        return lease

    def new_lease(self, slot: int, generation: int, reader: int) -> ReadLease:
        """A lease of an attempt yet to begin, on any u64 as slot and generation: `ring.c` refuses what is not there."""
        if not 0 <= reader <= _MAX_READER:
            raise ConfigError("a reader's id is 0 (unnamed) to 2**63 - 1", field="reader", value=reader)
        if unsettled:
            settle()
        core = self._core
        lease = ReadLease(core.transitions, core.owner(), slot, generation, reader, _RELEASED)
        lease._core = core  # noqa: SLF001 - the one maker of leases: a constructor of their own would be one call more
        lease._schema = self._schema  # noqa: SLF001
        return lease

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
            arrays = {layout.RAW_FIELD: copy} if self._schema is None else self._schema.views(copy.data, writable=True)
            lease.mark_consumed()
        return arrays

    def _stale(self, why: str, slot: int, generation: int, **facts: object) -> StaleSlotError:
        self._core.transitions.count(Counter.STALE)
        return StaleSlotError(f"stale slot: {why}", slot=slot, generation=generation, **facts)
