"""SharedRingBuffer: a ring of payloads in shared memory, written by rollout workers, read in place or served from.

Here its writing half: a slot is found under the ring's policy, filled, and committed, or given back.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from time import monotonic
from typing import Any, Final

import numpy as np
import xxhash

from ucxx_transport.config import checked_seconds
from ucxx_transport.errors import ConfigError, DeadlineExceededError, RingFullError, TransportError
from ucxx_transport.logs import get_logger
from ucxx_transport.ring import layout
from ucxx_transport.ring.handle import why_full
from ucxx_transport.ring.layout import ABORTED
from ucxx_transport.ring.leases import Hold, WriteLease, live, settle, unsettled
from ucxx_transport.ring.reading import ReadableRing
from ucxx_transport.ring.states import SlotState
from ucxx_transport.ring.transitions import LOOK_EVERY_S, Transitions, Words
from ucxx_transport.schema.slot_ref import SlotRef, renumbered
from ucxx_transport.schema.tensors import Array, Memory, Placement, byte_view, copy_fields, view_fields
from ucxx_transport.schema.wire_form import checked_meta

_log = get_logger(__name__)

_WRITES_A_LOOK: Final = 1024  # about, from one look whether the ring still has its name to the next: 0.8 µs each
_SMALL_BYTES: Final = 16 << 10  # copied with the interpreter's lock held, which takes less than releasing it
_REMEMBERED_SLOTS: Final = 1024  # whose arrays are kept from write to write, some 150 bytes each: making 8 costs 2.5 µs


class SharedRingBuffer(ReadableRing):
    """One process's handle on a ring. Every call is safe from any thread and any process that has a handle.

    The handle that made the ring removes it from the host on `close`, on leaving `with`, and at exit; one that attached
    never does. Closing does not end leases: arrays of theirs stay valid, and the memory goes with the last of them.

    Attributes:
        name: what `attach` takes; the file is `<folder>/ucxx_transport-<name>`.
        folder: where its segment is.
        ring_id: 16 random bytes, new for every created ring.
        slots: number of slots.
        slot_bytes: bytes of the largest payload.
        readers: reads that free a payload.
        schema: the payloads' fields; None for a raw ring.
        fingerprint: the schema's, 0 for a raw ring.
        mapping: all of the ring's memory in this process, uint8, for registering it with a device.
        server_words: unsigned 64-bit words for the server's own shared statistics; each should have one writer.
        closed: whether `close` was called on this handle.

    >>> with SharedRingBuffer.create(RingConfig(slots=4, slot_bytes=64)) as ring:
    ...     ref = ring.write_raw(b"an episode")
    ...     with ring.acquire(ref) as lease:
    ...         bytes(lease.buffer), lease.mark_consumed()
    (b'an episode', True)
    """

    def __init__(self, transitions: Transitions) -> None:
        super().__init__(transitions)
        self._bytes = transitions.memory
        self._overwrites = self._identity.on_full == "overwrite"
        self._targets: dict[int, tuple[Placement, list[Array]]] = {}
        self._spare: list[Hold] = []  # of writes that are over, to be used again: no caller has had them
        self._look_every = max(1, _WRITES_A_LOOK // self.slots)
        self._warned_envelope = self._warned_name = False

    def write(
        self,
        data: Mapping[str, Any],
        *,
        readers: int | None = None,
        meta: Mapping[str, object] | None = None,
        deadline_s: float | str | None = None,
        envelope: bytes | None = None,
    ) -> SlotRef:
        """Copy arrays into a slot and make them readable. A failed write leaves no trace but its count.

        Args:
            data: a value for every field of the schema, nested as its names say.
            readers: reads that free this payload, at most the ring's own; None for that.
            meta: what to say about the payload in its reference; msgpack- and JSON-safe, 64 KiB at most. Those who
                `take` it have it too, if it takes no more than the ring's `envelope_bytes` as msgpack.
            deadline_s: how long to wait for a slot under `on_full="block"`, and for the lock; None: as configured.
            envelope: what those who `take` it have instead of `meta`: a mapping as msgpack (`schema.wire_form`).

        Raises:
            ConfigError: the data does not fit the schema, or `meta` a reference; no slot was touched.
            RingFullError: every slot is being read or written, or, with `on_full="raise"`, none is free.
            DeadlineExceededError: no slot, or the lock, in time.
        """
        if self.schema is None:
            raise ConfigError("a raw ring has no fields: give its bytes to write_raw(buffer)", field="data")
        # checked in full before a slot is touched: data that does not fit must not cost an unread payload
        arrays, placement = self.schema.arrange(data)
        return self._write(placement.nbytes, arrays, placement, readers, meta, envelope, deadline_s)

    def write_raw(
        self,
        buffer: Memory,
        *,
        readers: int | None = None,
        meta: Mapping[str, object] | None = None,
        deadline_s: float | str | None = None,
        envelope: bytes | None = None,
    ) -> SlotRef:
        """Copy bytes into a slot of a raw ring: any contiguous buffer, whatever its elements. Else as `write`."""
        if self.schema is not None:
            raise ConfigError("this ring has a schema: write(data) takes its arrays", field="buffer")
        source = byte_view(buffer, writable=False)
        nbytes = source.nbytes
        if nbytes > self.slot_bytes:
            self._check_size(nbytes)
        return self._write(nbytes, source, None, readers, meta, envelope, deadline_s)

    def reserve(
        self,
        nbytes: int | None = None,
        *,
        lengths: Mapping[str, int] | None = None,
        readers: int | None = None,
        meta: Mapping[str, object] | None = None,
        deadline_s: float | str | None = None,
        envelope: bytes | None = None,
    ) -> WriteLease:
        """A slot to produce a payload in, without a copy: `with ring.reserve() as lease: lease.arrays["obs"][:] = …`.

        Args:
            nbytes: bytes of a raw payload; None for a whole slot (see `WriteLease.commit`).
            lengths: rows of the schema's varlen fields; one left out has its maximum.
            readers: as for `write`.
            meta: as for `write`.
            deadline_s: as for `write`.
            envelope: as for `write`.

        Raises:
            ConfigError: a size or length does not fit, or `meta` a reference.
            RingFullError: as for `write`.
            DeadlineExceededError: as for `write`.
        """
        placement: Placement | None = None
        if self.schema is None:
            if lengths is not None:
                raise ConfigError("a raw ring has no varlen fields: give nbytes", field="lengths")
            size = self.slot_bytes if nbytes is None else nbytes
            self._check_size(size)
        elif nbytes is not None:
            raise ConfigError("this ring has a schema: give lengths of its varlen fields instead", field="nbytes")
        else:
            placement = self.schema.layout(lengths)
            size = placement.nbytes
        most, meta, envelope = self._agreed(readers, meta, envelope)
        commit = partial(self._commit, readers=most, meta=meta, envelope=envelope)
        lease = WriteLease(self.transitions, commit)
        self._reserve(lease, size, deadline_s)
        if placement is not None:
            self._write_lengths(lease, placement)
        return lease

    def drain(self, wait_s: float | str) -> int:
        """Wait until all payloads have had their readers, for `wait_s` at most; how many are left unread.

        A write under way counts as one. What dead processes hold is given back meanwhile.
        """
        self._require_open()
        words, transitions = self._words, self.transitions
        until_s = monotonic() + checked_seconds(wait_s, "wait_s")
        while True:
            freed = words[layout.FREED_WORD] & 0xFFFFFFFF
            # of one word: a slot on its way from READY to READING is never FREE in between
            unread = self.slots - words[layout.STATE_COUNT_WORD + SlotState.FREE]
            left_s = until_s - monotonic()
            if not unread or left_s <= 0 or self.closed:
                return unread
            with suppress(TransportError):  # the lock is taken: the next turn looks again
                self._reclaim()
            transitions.sleep(freed, left_s)

    def _write(  # noqa: PLR0917 - all that a write is
        self,
        nbytes: int,
        content: Any,
        placement: Placement | None,
        readers: int | None,
        meta: Mapping[str, object] | None,
        envelope: bytes | None,
        deadline_s: float | str | None,
    ) -> SlotRef:
        """Copy what fits into a slot: arrays to their places, or bytes where there is no placement."""
        if readers is not None or meta or envelope:
            readers, meta, envelope = self._agreed(readers, meta, envelope)
        try:
            hold = self._spare.pop()
        except IndexError:
            hold = Hold(self.transitions)
        if hold.lease_id not in live:  # a parent's
            hold = Hold(self.transitions)
        self._reserve(hold, nbytes, deadline_s)
        slot = hold.words[layout.HOLD_SLOT]
        try:
            if placement is not None:
                if placement.lengths:
                    self._write_lengths(hold, placement)
                kept = self._targets.get(slot)
                targets = kept[1] if kept and kept[0] is placement else self._targets_in(hold, placement)
                copy_fields(targets, content)
            elif nbytes <= _SMALL_BYTES:
                start = self.transitions.first_byte + slot * self.transitions.stride
                self._bytes[start : start + nbytes] = content
            else:  # releases the interpreter's lock
                np.copyto(self.transitions.payload(hold.words), np.frombuffer(content, np.uint8))
            ref = self._commit(hold, readers or self.readers, meta, envelope)
        except BaseException:  # anywhere: no payload of it remains
            if not hold.end(ABORTED):
                self.transitions.call("discard", hold.slot, hold.generation)
            raise
        if envelope:
            hold.words[layout.HOLD_ENVELOPE_BYTES] = 0
        self._spare.append(hold)
        return ref

    def _agreed(
        self, readers: int | None, meta: Mapping[str, object] | None, envelope: bytes | None
    ) -> tuple[int, Mapping[str, object] | None, bytes | None]:
        """The reads that free a payload, its reference's meta, and its envelope; a ConfigError where one cannot be."""
        most = self.readers
        if readers is not None and not (hasattr(readers, "__index__") and 1 <= readers <= most):
            text = f"readers must be 1 to the ring's own {most} (ring.readers), not {readers}"
            raise ConfigError(text, field="readers", value=readers)
        if meta:
            meta, packed = checked_meta(meta)
            envelope = envelope or packed
        return (readers or most, meta, envelope if self._identity.envelope_bytes else None)

    def _commit(self, hold: Hold, readers: int, meta: Mapping[str, object] | None, envelope: bytes | None) -> SlotRef:
        """Make a filled slot readable, whose word `HOLD_NBYTES` says how long the payload is."""
        words = hold.words
        checksum = None
        if self._identity.checksum:
            checksum = words[layout.HOLD_CHECKSUM] = xxhash.xxh3_64_intdigest(self.transitions.payload(words).data)
            words[layout.HOLD_HAS_CHECKSUM] = 1
        slot, generation = words[layout.HOLD_SLOT], words[layout.HOLD_GENERATION]
        # made first: what can go wrong with it must not leave a payload that has no reference
        ref = renumbered(self._common(), slot, generation, words[layout.HOLD_NBYTES], checksum, meta)
        if envelope:
            self._write_envelope(hold, envelope)
        self.transitions.commit(words, readers)
        if not slot and generation % self._look_every == 0 and not self._warned_name:
            self._look_for_name()
        return ref

    def _look_for_name(self) -> None:
        """Say once when another program removed the ring's name: readers on this host then go over the network."""
        fd = self._creation.descriptor()
        self._warned_name = fd is not None and os.fstat(fd).st_nlink == 0
        if self._warned_name:
            _log.warning(
                "ring_name_removed",
                ring=self.name,
                path=str(self._creation.path),
                reason="removed by another program, such as systemd-logind (RemoveIPC; `loginctl enable-linger`); the "
                "ring works on, over UCX for those who have not attached yet",
            )

    def _reserve(self, hold: Hold, nbytes: int, deadline_s: float | str | None) -> None:
        """Give a hold a slot in WRITING; errors as `write`."""
        if self.closed:
            self._require_open()
        if unsettled:
            settle()
        words = hold.words
        words[layout.HOLD_NBYTES] = nbytes
        try:
            if deadline_s is not None:
                deadline_s = checked_seconds(deadline_s, "deadline_s")
            if not self.transitions.reserve(words, overwrites=self._overwrites, wait_s=deadline_s):
                self._wait_for_slot(words, deadline_s)
        except TransportError:
            hold.forget()  # no slot was given
            raise

    def _wait_for_slot(self, words: Words, deadline_s: float | None) -> None:
        """Reserve a slot for a write that found none, by the ring's policy; errors as `write`."""
        transitions, blocks = self.transitions, self._identity.on_full == "block"
        block_s = self._identity.block_timeout_ns / 1e9 if deadline_s is None else deadline_s
        reclaim_at = started = monotonic()
        has_waited = False
        while True:
            # tried whatever a look finds: another process may have been the one who took the dead's slots back
            if monotonic() >= reclaim_at:
                self._reclaim()
                reclaim_at = monotonic() + LOOK_EVERY_S
            if transitions.reserve(words, overwrites=self._overwrites):
                return
            left_s = started + (block_s if blocks else 0.0) - monotonic()
            if left_s <= 0:
                break
            if not has_waited:
                has_waited = True
                transitions.count("blocked")
            transitions.sleep(words[layout.HOLD_STATE], left_s)
            self._require_open()
        transitions.count("full")
        text, facts = why_full(transitions)
        if blocks:
            waited_s = round(monotonic() - started, 3)
            raise DeadlineExceededError(f"no slot became free in {waited_s:g} s; {text}", **facts, waited_s=waited_s)
        raise RingFullError(f"no slot can be written; {text}", **facts)

    def _targets_in(self, hold: Hold, placement: Placement) -> list[Array]:
        """The arrays of a slot for this layout, made, and kept for the next write to it."""
        slot = hold.words[layout.HOLD_SLOT]
        targets = view_fields(self.transitions.payload(hold.words).data, placement)
        if len(self._targets) < _REMEMBERED_SLOTS or slot in self._targets:
            self._targets[slot] = (placement, targets)
        return targets

    def _write_lengths(self, hold: Hold, placement: Placement) -> None:
        start = self.transitions.first_byte + hold.words[layout.HOLD_SLOT] * self.transitions.stride
        struct.pack_into(f"<{len(placement.lengths)}Q", self._bytes, start, *placement.lengths)

    def _write_envelope(self, hold: Hold, envelope: bytes) -> None:
        nbytes = hold.words[layout.HOLD_ENVELOPE_BYTES] = len(envelope)
        room = self._identity.envelope_bytes
        if nbytes <= room:
            start = self.transitions.first_envelope + hold.slot * self.transitions.stride
            self._bytes[start : start + nbytes] = envelope
        elif not self._warned_envelope:  # counted by the commit
            self._warned_envelope = True
            _log.warning(
                "envelope_left_out",
                ring=self.name,
                slot=hold.slot,
                generation=hold.generation,
                nbytes=nbytes,
                reason=f"larger than ring.envelope_bytes = {room}: those who take the payload do not have it",
            )

    def _check_size(self, nbytes: int) -> None:
        most = self.slot_bytes
        if not 0 <= nbytes <= most:
            text = f"a payload of {nbytes} bytes does not fit a slot of {most}: raise ring.slot_bytes"
            raise ConfigError(text, field="slot_bytes", nbytes=nbytes, slot_bytes=most)
