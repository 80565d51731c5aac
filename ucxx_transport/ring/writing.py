"""WriteLease and SlotWriter: a slot is found under the ring's policy, filled, and made readable, or left FREE."""

from __future__ import annotations

import struct
import time
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

import numpy as np
import numpy.typing as npt
import xxhash

from ucxx_transport.backoff import pause_s
from ucxx_transport.errors import ConfigError, DeadlineExceededError, RingFullError, SlotError, TransportError
from ucxx_transport.ring.claims import Claim
from ucxx_transport.ring.core import RingCore
from ucxx_transport.ring.layout import RAW_FIELD, Counter
from ucxx_transport.ring.references import ReferenceMaker
from ucxx_transport.ring.slot_headers import Hold
from ucxx_transport.schema import Schema, SlotRef
from ucxx_transport.schema.placement import Placement, byte_view, view_fields
from ucxx_transport.schema.tensors import Array, copy_fields

if TYPE_CHECKING:
    from typing_extensions import Buffer

_FIRST_PAUSE_S: Final = 0.2e-3
_LONGEST_PAUSE_S: Final = 2e-3
_RECLAIM_EVERY_S: Final = 0.1
"""While waiting for a slot: how often to look for holds of processes that died since."""

_REMEMBERED_SLOTS: Final = 1024
"""Slots whose arrays are kept from write to write, some 150 bytes each: making 8 costs 2.5 µs."""


class SlotWriter:
    """The writing half of a ring handle."""

    __slots__ = ("_core", "_references", "_schema", "_targets")

    def __init__(self, core: RingCore, schema: Schema | None, references: ReferenceMaker) -> None:
        """Bind to a ring."""
        self._core = core
        self._schema = schema
        self._references = references
        self._targets: dict[int, tuple[Placement, list[Array]]] = {}

    def write(
        self,
        data: Mapping[str, object],
        readers: int | None,
        meta: Mapping[str, object] | None,
        deadline_s: float | None,
    ) -> SlotRef:
        """See `SharedRingBuffer.write`."""
        if self._schema is None:
            if set(data) != {RAW_FIELD}:
                raise ConfigError(
                    f"a raw ring takes write_raw(buffer), or write({{{RAW_FIELD!r}: buffer}}): it has no other fields",
                    field="data",
                )
            # whatever is no buffer is refused by byte_view
            return self.write_raw(data[RAW_FIELD], readers, meta, deadline_s)  # type: ignore[arg-type]  # see above
        required = self._required_reads(readers)
        # checked in full before a slot is touched: data that does not fit must not cost an unread payload
        arrays, placement = self._schema.arrange(data)
        claim = self._claim(placement.nbytes, deadline_s)
        try:
            copy_fields(self._targets_in(claim.hold.slot, placement), arrays)
            return self.commit(claim, placement.nbytes, required, meta)
        except BaseException:
            self._undo(claim)
            raise

    def write_raw(
        self,
        buffer: Buffer | npt.NDArray[Any],
        readers: int | None,
        meta: Mapping[str, object] | None,
        deadline_s: float | None,
    ) -> SlotRef:
        """See `SharedRingBuffer.write_raw`."""
        if self._schema is not None:
            raise ConfigError("this ring has a schema: write(data) takes its arrays", field="buffer")
        required = self._required_reads(readers)
        # an array says so by `data`: up to Python 3.11 the type of an array is no Buffer to a type checker
        data = buffer.data if isinstance(buffer, np.ndarray) else buffer
        source = np.frombuffer(byte_view(data, writable=False), np.uint8)
        self._check_size(source.nbytes)
        claim = self._claim(source.nbytes, deadline_s)
        try:
            np.copyto(self._memory(claim.hold.slot, source.nbytes), source)
            return self.commit(claim, source.nbytes, required, meta)
        except BaseException:
            self._undo(claim)
            raise

    def reserve(
        self,
        nbytes: int | None,
        lengths: Mapping[str, int] | None,
        readers: int | None,
        meta: Mapping[str, object] | None,
        deadline_s: float | None,
    ) -> WriteLease:
        """See `SharedRingBuffer.reserve`."""
        required = self._required_reads(readers)
        placement: Placement | None = None
        if self._schema is None:
            if lengths is not None:
                raise ConfigError("a raw ring has no varlen fields: give nbytes", field="lengths")
            size = self._core.identity.geometry.slot_bytes if nbytes is None else nbytes
            self._check_size(size)
        else:
            if nbytes is not None:
                raise ConfigError("this ring has a schema: give lengths of its varlen fields instead", field="nbytes")
            placement = self._schema.layout(lengths)
            size = placement.nbytes
        claim = self._claim(size, deadline_s)
        if placement is not None:
            self._write_lengths(claim.hold.slot, placement)
        return WriteLease(self, claim, placement=placement, readers=required, meta=meta)

    def arrays_over(self, memory: npt.NDArray[np.uint8], placement: Placement | None) -> dict[str, Any]:
        """Writable arrays over a slot's memory, as the schema says."""
        if self._schema is None or placement is None:
            return {RAW_FIELD: memory}
        return self._schema.nest(view_fields(memory.data, placement))

    def commit(self, claim: Claim, nbytes: int, required: int, meta: Mapping[str, object] | None) -> SlotRef:
        """Make a filled slot readable.

        Raises:
            SlotError: the claim was reclaimed.
            ConfigError: `meta` does not fit a reference; nothing is committed.
        """
        hold = claim.hold
        checksum = None
        if self._core.identity.checksum:
            checksum = xxhash.xxh3_64_intdigest(self._memory(hold.slot, nbytes).data)
        # made first: what can go wrong with it must not leave a payload that nobody knows of
        ref = self._references.make(hold.slot, hold.generation, nbytes, checksum, meta)
        self._core.transact(self._core.table.commit, hold, nbytes, checksum, required)
        claim.forget()
        return ref

    def abort(self, claim: Claim) -> bool:
        """Give a slot back without a payload; False when it was not held any more."""
        return self._core.end_write(claim)

    def _claim(self, nbytes: int, deadline_s: float | None) -> Claim:
        """A slot in WRITING.

        Raises:
            RingFullError: none is to be had and the policy is not to wait.
            DeadlineExceededError: none became free in time.
        """
        core = self._core
        claim = Claim(core, core.owner())
        claim.nbytes = nbytes
        wait_s = core.lock_wait_s if deadline_s is None else deadline_s
        try:
            if not core.transact_within(wait_s, self._try_reserve, claim):
                self._wait_for_slot(claim, deadline_s)
        except TransportError:
            claim.forget()  # no slot was given
            raise
        return claim

    def _try_reserve(self, claim: Claim) -> bool:
        """In the critical section: take the best slot, if there is any."""
        core = self._core
        slot = core.search.for_write(may_overwrite=core.identity.on_full == "overwrite")
        if slot is None:
            return False
        hold = claim.guard.hold
        generation = core.table.reserve(slot, hold.lease_id, hold.owner)
        claim.guard.hold = Hold(slot, generation, hold.lease_id, hold.owner, is_write=True)
        return True

    def _wait_for_slot(self, claim: Claim, deadline_s: float | None) -> None:
        core = self._core
        core.reclaim_dead()
        # whatever it found: another process may have been the one who took the dead's slots back
        if core.transact(self._try_reserve, claim):
            return
        on_full = core.identity.on_full
        if on_full != "block":
            core.count(Counter.FULL)
            raise RingFullError(
                "no slot can be written: every one is being read or written"
                if on_full == "overwrite"
                else "no slot is free and the ring's policy is to raise",
                slots=core.identity.geometry.slots,
                on_full=on_full,
            )
        core.count(Counter.BLOCKED)
        started = core.clock()
        wait_s = core.identity.block_timeout_ns / 1e9 if deadline_s is None else deadline_s
        pauses, next_reclaim = 0, started + _RECLAIM_EVERY_S
        while True:
            now = core.clock()
            if now - started >= wait_s:
                core.count(Counter.FULL)
                raise DeadlineExceededError(
                    "no slot became free in time: the readers are too slow, or gone; enlarge ring.slots or choose "
                    "on_full='overwrite'",
                    waited_s=round(now - started, 3),
                    slots=core.identity.geometry.slots,
                )
            pauses += 1
            pause = pause_s(pauses, first_s=_FIRST_PAUSE_S, longest_s=_LONGEST_PAUSE_S)
            time.sleep(min(pause, started + wait_s - now))
            if now >= next_reclaim:
                next_reclaim = now + _RECLAIM_EVERY_S
                core.reclaim_dead()
            if core.search.any_free() and core.transact(self._try_reserve, claim):
                return

    def _undo(self, claim: Claim) -> None:
        """After an exception anywhere in a write: no payload of it remains."""
        hold = claim.hold
        if not self._core.end_write(claim):
            self._core.transact(self._core.table.discard, hold.slot, hold.generation)

    def _targets_in(self, slot: int, placement: Placement) -> list[Array]:
        """The arrays of a slot, for this layout, with the lengths written."""
        placed, targets = self._targets.get(slot, (None, []))
        if placed is not placement:
            targets = view_fields(self._memory(slot, placement.nbytes).data, placement)
            if len(self._targets) < _REMEMBERED_SLOTS or slot in self._targets:
                self._targets[slot] = (placement, targets)
        if placement.lengths:
            self._write_lengths(slot, placement)
        return targets

    def _write_lengths(self, slot: int, placement: Placement) -> None:
        count = len(placement.lengths)
        struct.pack_into(f"<{count}Q", self._memory(slot, placement.nbytes).data, 0, *placement.lengths)

    def _memory(self, slot: int, nbytes: int) -> npt.NDArray[np.uint8]:
        start = self._core.identity.geometry.payload_byte(slot)
        return self._core.segment.memory[start : start + nbytes]

    def _required_reads(self, readers: int | None) -> int:
        most = self._core.identity.geometry.readers
        if readers is None:
            return most
        if not 1 <= readers <= most:
            raise ConfigError(
                f"readers must be 1 to the ring's own {most} (ring.readers), not {readers}",
                field="readers",
                value=readers,
            )
        return readers

    def _check_size(self, nbytes: int) -> None:
        most = self._core.identity.geometry.slot_bytes
        if not 0 <= nbytes <= most:
            raise ConfigError(
                f"a payload of {nbytes} bytes does not fit a slot of {most}: raise ring.slot_bytes",
                field="slot_bytes",
                nbytes=nbytes,
                slot_bytes=most,
            )


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
