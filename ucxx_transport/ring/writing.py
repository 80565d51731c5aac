"""SlotWriter and WriteLease: a slot is found under the ring's policy, filled, and its payload committed, or dropped."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, Self

import numpy as np
import numpy.typing as npt
import xxhash

from ucxx_transport.errors import ConfigError, SlotError, TransportError
from ucxx_transport.logs import get_logger
from ucxx_transport.ring import layout
from ucxx_transport.ring.core import RingCore
from ucxx_transport.ring.holds import Hold, settle, unsettled
from ucxx_transport.ring.references import ReferenceMaker
from ucxx_transport.ring.transitions import Words
from ucxx_transport.schema import Schema, SlotRef
from ucxx_transport.schema.placement import Placement, byte_view, view_fields
from ucxx_transport.schema.slot_ref import renumbered, with_meta
from ucxx_transport.schema.tensors import Array, copy_fields

if TYPE_CHECKING:
    from typing_extensions import Buffer

_log = get_logger(__name__)

_SMALL_BYTES: Final = 16 << 10
"""Copied with the interpreter's lock held, which takes less than releasing it."""

_REMEMBERED_SLOTS: Final = 1024
"""Slots whose arrays are kept from write to write, some 150 bytes each: making 8 costs 2.5 µs."""


class WriteLease:
    """A slot to write to, from `reserve()`.

    Fill `arrays` or `buffer`, then `commit()`. As a context manager: a clean exit commits, an exception aborts.
    """

    __slots__ = ("__weakref__", "_envelope", "_hold", "_meta", "_placement", "_readers", "_ref", "_writer")

    def __init__(
        self,
        writer: SlotWriter,
        hold: Hold,
        *,
        placement: Placement | None,
        readers: int,
        meta: Mapping[str, object] | None,
        envelope: bytes | None,
    ) -> None:
        """Wrap a hold; use `SharedRingBuffer.reserve`."""
        self._writer = writer
        self._hold = hold
        self._placement = placement
        self._readers = readers
        self._meta = meta
        self._envelope = envelope
        self._ref: SlotRef | None = None

    @property
    def slot(self) -> int:
        """The slot's index."""
        return self._hold.slot

    @property
    def generation(self) -> int:
        """Which write to that slot this is."""
        return self._hold.generation

    @property
    def nbytes(self) -> int:
        """Bytes reserved."""
        return self._hold.words[layout.HOLD_NBYTES]

    @property
    def buffer(self) -> memoryview:
        """The slot's memory, writable, `nbytes` long. Not to be written to after `commit`."""
        self._require_open()
        return np.asarray(self._hold).data

    @property
    def arrays(self) -> dict[str, Any]:
        """Writable arrays straight over the slot, nested as the schema says; a raw ring's is `{"data": uint8}`."""
        self._require_open()
        return self._writer.arrays_over(np.asarray(self._hold), self._placement)

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
            reserved = self.nbytes
            used = reserved if nbytes is None else nbytes
            if nbytes is not None and (self._placement is not None or not 0 <= used <= reserved):
                raise ConfigError(
                    f"nbytes must be 0 to {reserved} on a raw ring, and left out on one with a schema",
                    field="nbytes",
                    value=nbytes,
                )
            self._require_open()
            self._hold.words[layout.HOLD_NBYTES] = used
            self._ref = self._writer.commit(self._hold, self._readers, self._meta, self._envelope)
        return self._ref

    def abort(self) -> bool:
        """Give the slot back without a payload.

        Returns:
            Whether this call did; False when the lease was committed, aborted or reclaimed before.
        """
        return self._writer.core.end_write(self._hold)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        """Commit on a clean exit, unless committed or aborted already; abort on an exception."""
        if not self._hold.is_live:
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
        if not self._hold.is_live:
            raise SlotError(
                "this write lease has ended, or was inherited by a forked process",
                slot=self.slot,
                generation=self.generation,
            )


class SlotWriter:
    """The writing half of a ring handle."""

    __slots__ = (
        *("_bytes", "_envelope_bytes", "_first_byte", "_most_readers", "_overwrites", "_references", "_schema"),
        *("_owner", "_slot_bytes", "_spare", "_stride", "_takes_checksums", "_targets", "_warned_envelope", "core"),
    )

    def __init__(self, core: RingCore, schema: Schema | None, references: ReferenceMaker) -> None:
        """Bind to a ring."""
        self.core = core
        geometry = core.identity.geometry
        self._bytes = core.segment.memory.data
        self._first_byte, self._stride = geometry.payload_byte(0), geometry.stride_bytes
        self._slot_bytes, self._most_readers = geometry.slot_bytes, geometry.readers
        self._envelope_bytes = geometry.envelope_bytes
        self._warned_envelope = False
        self._takes_checksums = core.identity.checksum
        self._overwrites = core.identity.on_full == "overwrite"
        self._schema = schema
        self._references = references
        self._targets: dict[int, tuple[Placement, list[Array]]] = {}
        self._owner = core.owner()
        self._spare: list[Hold] = []  # of writes that are over, to be used again: no caller has had them

    def write(
        self,
        data: Mapping[str, object],
        readers: int | None,
        meta: Mapping[str, object] | None,
        deadline_s: float | None,
        envelope: bytes | None,
    ) -> SlotRef:
        """See `SharedRingBuffer.write`."""
        if self._schema is None:
            if set(data) != {layout.RAW_FIELD}:
                raise ConfigError(
                    f"a raw ring takes write_raw(buffer), or write({{{layout.RAW_FIELD!r}: buffer}}): it has no others",
                    field="data",
                )
            # whatever is no buffer is refused by byte_view
            return self.write_raw(data[layout.RAW_FIELD], readers, meta, deadline_s, envelope)  # type: ignore[arg-type]  # see above
        required = self._most_readers if readers is None else self._required_reads(readers)
        # checked in full before a slot is touched: data that does not fit must not cost an unread payload
        arrays, placement = self._schema.arrange(data)
        hold = self._take(placement.nbytes, deadline_s)
        try:
            if placement.lengths:
                self._write_lengths(hold, placement)
            slot = hold.words[layout.HOLD_SLOT]
            placed = self._targets.get(slot)
            copy_fields(placed[1] if placed and placed[0] is placement else self._targets_in(hold, placement), arrays)
            ref = self.commit(hold, required, meta, envelope)
        except BaseException:
            self._undo(hold)
            raise
        if meta or envelope:
            hold.words[layout.HOLD_ENVELOPE_BYTES] = 0
        self._spare.append(hold)
        return ref

    def write_raw(
        self,
        buffer: Buffer | npt.NDArray[Any],
        readers: int | None,
        meta: Mapping[str, object] | None,
        deadline_s: float | None,
        envelope: bytes | None,
    ) -> SlotRef:
        """See `SharedRingBuffer.write_raw`."""
        if self._schema is not None:
            raise ConfigError("this ring has a schema: write(data) takes its arrays", field="buffer")
        required = self._most_readers if readers is None else self._required_reads(readers)
        # an array says so by `data`: up to Python 3.11 the type of an array is no Buffer to a type checker
        source = byte_view(buffer.data if isinstance(buffer, np.ndarray) else buffer, writable=False)
        nbytes = source.nbytes
        self._check_size(nbytes)
        hold = self._take(nbytes, deadline_s)
        try:
            if nbytes <= _SMALL_BYTES:
                start = self._first_byte + hold.words[layout.HOLD_SLOT] * self._stride
                self._bytes[start : start + nbytes] = source
            else:  # releases the interpreter's lock
                np.copyto(self.core.memory(hold), np.frombuffer(source, np.uint8))
            ref = self.commit(hold, required, meta, envelope)
        except BaseException:
            self._undo(hold)
            raise
        if meta or envelope:
            hold.words[layout.HOLD_ENVELOPE_BYTES] = 0
        self._spare.append(hold)
        return ref

    def reserve(
        self,
        nbytes: int | None,
        lengths: Mapping[str, int] | None,
        readers: int | None,
        meta: Mapping[str, object] | None,
        deadline_s: float | None,
        *,
        envelope: bytes | None,
    ) -> WriteLease:
        """See `SharedRingBuffer.reserve`."""
        required = self._required_reads(readers)
        placement: Placement | None = None
        if self._schema is None:
            if lengths is not None:
                raise ConfigError("a raw ring has no varlen fields: give nbytes", field="lengths")
            size = self.core.identity.geometry.slot_bytes if nbytes is None else nbytes
            self._check_size(size)
        else:
            if nbytes is not None:
                raise ConfigError("this ring has a schema: give lengths of its varlen fields instead", field="nbytes")
            placement = self._schema.layout(lengths)
            size = placement.nbytes
        hold = self._take(size, deadline_s)
        if placement is not None:
            self._write_lengths(hold, placement)
        return WriteLease(self, hold, placement=placement, readers=required, meta=meta, envelope=envelope)

    def arrays_over(self, memory: npt.NDArray[np.uint8], placement: Placement | None) -> dict[str, Any]:
        """Writable arrays over a slot's memory, as the schema says."""
        if self._schema is None or placement is None:
            return {layout.RAW_FIELD: memory}
        return self._schema.nest(view_fields(memory.data, placement))

    def commit(
        self, hold: Hold, required: int, meta: Mapping[str, object] | None, envelope: bytes | None = None
    ) -> SlotRef:
        """Make a filled slot readable, whose word `HOLD_NBYTES` says how long the payload is.

        Raises:
            SlotError: the hold was reclaimed.
            ConfigError: `meta` does not fit a reference; nothing is committed.
        """
        words = hold.words
        checksum = None
        if self._takes_checksums:
            checksum = xxhash.xxh3_64_intdigest(self.core.memory(hold).data)
            words[layout.HOLD_CHECKSUM] = checksum
            words[layout.HOLD_HAS_CHECKSUM] = 1
        # made first: what can go wrong with it must not leave a payload that has no reference
        slot, generation = words[layout.HOLD_SLOT], words[layout.HOLD_GENERATION]
        template = self._references.template()
        if meta:
            template, packed = with_meta(template, meta)
            envelope = envelope or packed
        ref = renumbered(template, slot, generation, words[layout.HOLD_NBYTES], checksum)
        if envelope and self._envelope_bytes:
            self._write_envelope(words, envelope)
        self.core.transitions.commit(words, required)
        hold.rest()
        if not slot:
            self.core.look_for_name(generation)
        return ref

    def _write_envelope(self, words: Words, envelope: bytes) -> None:
        nbytes = words[layout.HOLD_ENVELOPE_BYTES] = len(envelope)
        room = self._envelope_bytes
        if nbytes <= room:
            start = self._first_byte + words[layout.HOLD_SLOT] * self._stride - layout.HEADROOM_BYTES - room
            self._bytes[start : start + nbytes] = envelope
        elif not self._warned_envelope:  # counted by the commit
            self._warned_envelope = True
            _log.warning(
                "envelope_left_out",
                ring=self.core.segment.name,
                slot=words[layout.HOLD_SLOT],
                generation=words[layout.HOLD_GENERATION],
                nbytes=nbytes,
                reason=f"larger than ring.envelope_bytes = {room}: those who take the payload do not have it",
            )

    def _take(self, nbytes: int, deadline_s: float | None) -> Hold:
        """A slot in WRITING; a RingFullError or DeadlineExceededError, by the policy, where none is to be had."""
        if unsettled:
            settle()
        core = self.core
        owner = core.owner()
        if owner is not self._owner:  # a forked child's holds are its own
            self._owner, self._spare = owner, []
        try:
            hold = self._spare.pop()
            hold.renew()
        except IndexError:
            hold = Hold(core.transitions, owner)
        hold.words[layout.HOLD_NBYTES] = nbytes
        try:
            if not core.transitions.reserve(hold.words, overwrites=self._overwrites, wait_s=deadline_s):
                core.wait_for_slot(hold.words, deadline_s, overwrites=self._overwrites)
        except TransportError:
            hold.forget()  # no slot was given
            raise
        return hold

    def _undo(self, hold: Hold) -> None:
        """After an exception anywhere in a write: no payload of it remains."""
        if not self.core.end_write(hold):
            self.core.transitions.discard(hold.slot, hold.generation)

    def _targets_in(self, hold: Hold, placement: Placement) -> list[Array]:
        """The arrays of a slot for this layout, made, and kept for the next write to it."""
        slot = hold.words[layout.HOLD_SLOT]
        targets = view_fields(self.core.memory(hold).data, placement)
        if len(self._targets) < _REMEMBERED_SLOTS or slot in self._targets:
            self._targets[slot] = (placement, targets)
        return targets

    def _write_lengths(self, hold: Hold, placement: Placement) -> None:
        count = len(placement.lengths)
        start = self.core.identity.geometry.payload_byte(hold.words[layout.HOLD_SLOT])
        struct.pack_into(f"<{count}Q", self.core.segment.memory.data, start, *placement.lengths)

    def _required_reads(self, readers: int | None) -> int:
        most = self._most_readers
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
        most = self._slot_bytes
        if not 0 <= nbytes <= most:
            raise ConfigError(
                f"a payload of {nbytes} bytes does not fit a slot of {most}: raise ring.slot_bytes",
                field="slot_bytes",
                nbytes=nbytes,
                slot_bytes=most,
            )
