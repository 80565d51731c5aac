"""SharedRingBuffer: a ring of payloads in shared memory, written by rollout workers, read in place or served from."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy.typing as npt

from ucxx_transport.errors import SlotError
from ucxx_transport.ring.layout import SEQUENCE_WORD
from ucxx_transport.ring.opening import attach_ring, create_ring
from ucxx_transport.ring.owner import Owner, owner_alive
from ucxx_transport.ring.reading import ReadLease
from ucxx_transport.ring.ring_handle import RingHandle
from ucxx_transport.ring.writing import WriteLease
from ucxx_transport.schema import SlotRef
from ucxx_transport.schema.envelope import meta_of
from ucxx_transport.schema.slot_ref import renumbered, with_meta

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from ucxx_transport.config import RingConfig


class SharedRingBuffer(RingHandle):
    """One process's handle on a ring. Every call is safe from any thread and any process that has a handle.

    The handle that made the ring removes it from the host on `close`, on leaving `with`, and at exit; one that attached
    never does. Closing does not end leases: arrays of theirs stay valid, and the memory goes with the last of them.

    >>> with SharedRingBuffer.create(RingConfig(slots=4, slot_bytes=64)) as ring:
    ...     ref = ring.write_raw(b"an episode")
    ...     with ring.acquire(ref) as lease:
    ...         bytes(lease.buffer), lease.mark_consumed()
    (b'an episode', True)
    """

    __slots__ = ()

    @classmethod
    def create(
        cls,
        config: RingConfig,
        *,
        owner: Owner | None = None,
        alive: Callable[[int, int], bool] = owner_alive,
        clock: Callable[[], float] = time.monotonic,
    ) -> Self:
        """Make a ring, after removing those of dead creators on this host.

        Args:
            config: sizes and policies.
            owner: in whose name this handle takes slots; None for this process.
            alive: whether the process (pid, start time) lives.
            clock: monotonic seconds.

        Raises:
            ConfigError: the name is in use by a live creator, or the ring does not fit its folder.
        """
        return cls(*create_ring(config), owner=owner, alive=alive, clock=clock)

    @classmethod
    def attach(
        cls,
        name: str,
        *,
        folder: Path | str | None = None,
        descriptor: int | None = None,
        populate: bool = True,
        owner: Owner | None = None,
        alive: Callable[[int, int], bool] = owner_alive,
        clock: Callable[[], float] = time.monotonic,
    ) -> Self:
        """Open a ring that another process, or another handle, made.

        Args:
            name: its `name`, or that of a SlotRef (`ring_name`).
            folder: where its segment is; None for the setting `ring.folder` of this process.
            descriptor: of its segment (`RingHandle.duplicate`), whose name may be gone; stays the caller's.
            populate: map all its pages now; the first read of each is half as fast otherwise.
            owner: in whose name this handle takes slots; None for this process.
            alive: whether the process (pid, start time) lives.
            clock: monotonic seconds.

        Raises:
            ConfigError: no such ring on this host (`facts["reason"]` "missing"), or it is of another pid namespace.
            NotReadyError: it is still being made.
            ProtocolError: no ring, another layout version, or damaged; says what was found.
        """
        where = None if folder is None else Path(folder)
        parts = attach_ring(name, populate=populate, folder=where, descriptor=descriptor)
        return cls(*parts, owner=owner, alive=alive, clock=clock)

    def write(
        self,
        data: Mapping[str, Any],
        *,
        readers: int | None = None,
        meta: Mapping[str, object] | None = None,
        deadline_s: float | None = None,
        envelope: bytes | None = None,
    ) -> SlotRef:
        """Copy arrays into a slot and make them readable. A failed write leaves no trace but its count.

        Args:
            data: a value for every field of the schema, nested as its names say.
            readers: reads that free this payload, at most the ring's own; None for that.
            meta: what to say about the payload in its reference; msgpack- and JSON-safe, 64 KiB at most. Those who
                `take` it have it too, if it takes no more than the ring's `envelope_bytes` as msgpack.
            deadline_s: how long to wait for a slot under `on_full="block"`, and for the lock; None: as configured.
            envelope: what those who `take` it have instead of `meta`: a mapping as msgpack (`schema.envelope`).

        Raises:
            ConfigError: the data does not fit the schema; no slot was touched.
            RingFullError: every slot is being read or written, or, with `on_full="raise"`, none is free.
            DeadlineExceededError: no slot, or the lock, in time.
        """
        if not self._open:
            self._require_open()
        return self._writer.write(data, readers, meta, deadline_s, envelope)

    def write_raw(
        self,
        buffer: Buffer | npt.NDArray[Any],
        *,
        readers: int | None = None,
        meta: Mapping[str, object] | None = None,
        deadline_s: float | None = None,
        envelope: bytes | None = None,
    ) -> SlotRef:
        """Copy bytes into a slot of a raw ring: any contiguous buffer, whatever its elements. Else as `write`."""
        if not self._open:
            self._require_open()
        return self._writer.write_raw(buffer, readers, meta, deadline_s, envelope)

    def reserve(
        self,
        nbytes: int | None = None,
        *,
        lengths: Mapping[str, int] | None = None,
        readers: int | None = None,
        meta: Mapping[str, object] | None = None,
        deadline_s: float | None = None,
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
            ConfigError: a size or length does not fit.
            RingFullError: as for `write`.
            DeadlineExceededError: as for `write`.
        """
        self._require_open()
        return self._writer.reserve(nbytes, lengths, readers, meta, deadline_s, envelope=envelope)

    def acquire(self, ref: SlotRef, *, reader: int = 0, deadline_s: float | None = None) -> ReadLease:
        """Begin to read a payload in place. Leave the lease by `mark_consumed`, or it is released.

        Args:
            ref: the payload's name.
            reader: who reads, where several do (`readers` > 1): a reader's second read does not count. 0: unnamed; each
                of its reads counts.
            deadline_s: how long to wait for the ring's lock; None: as configured.

        Raises:
            StaleSlotError: the payload is not in the ring any more, or never was.
            SlotError: the ring has no such slot.
            BusyError: the slot carries as many read attempts as it can.
        """
        if not self._open:
            self._require_open()
        return self._reader.acquire_ref(ref, reader, deadline_s)

    def acquire_slot(self, slot: int, generation: int, *, reader: int = 0) -> ReadLease:
        """`acquire` for the server: the ring's id has been checked, the numbers have not."""
        self._require_open()
        return self._reader.acquire(slot, generation, reader)

    def take(
        self,
        max_payloads: int,
        *,
        max_bytes: int | None = None,
        newest: bool = False,
        reader: int = 0,
        deadline_s: float | None = None,
    ) -> list[ReadLease]:
        """Begin to read what is there, without references. No two takers get the same payload for the same read.

        Args:
            max_payloads: how many at most.
            max_bytes: of them all; the first that exceeds what is left of it ends the list. None: without a limit.
            newest: the newest first; else the oldest.
            reader: as for `acquire`; it is given none that it has had or holds.
            deadline_s: how long to wait for the ring's lock; None: as configured.

        Returns:
            A lease for each payload, in order; [] when there is none for this reader (see `wait_for_ready`). Each has
            the payload's `record`; `reference` gives its name.

        Raises:
            ConfigError: the very first payload is larger than `max_bytes`; `facts["nbytes"]` says how large. Or one of
                the numbers is out of its range.
        """
        self._require_open()
        return self._taker.take(max_payloads, max_bytes, reader, deadline_s, newest=newest)

    def wait_for_ready(self, wait_s: float, *, reader: int = 0) -> bool:
        """Wait until something has become READY since `take` left nothing for this reader, through this handle.

        Args:
            wait_s: how long at most. Any other thread runs meanwhile, and Ctrl-C ends it.
            reader: as for `take`.

        Returns:
            Whether something has: `take` again, another taker may be faster. Before the first `take`: whether anything
            is READY.
        """
        self._require_open()
        return self._taker.wait(wait_s, reader)

    def reference(self, lease: ReadLease) -> SlotRef:
        """The reference of a payload that was taken, with the `meta` that its writer gave it, if its envelope has it.

        Raises:
            SlotError: the lease has ended, or is of another ring.
            ProtocolError: the payload's envelope is malformed.
        """
        self._require_open()
        if not lease.is_of(self.ring_id):
            raise SlotError("this lease is of another ring", slot=lease.slot, name=self.name)
        ref = renumbered(self._references.template(), lease.slot, lease.generation, lease.nbytes, lease.checksum)
        meta = meta_of(lease.record)
        return with_meta(ref, meta)[0] if meta else ref

    def read(self, ref: SlotRef, *, reader: int = 0) -> dict[str, Any]:
        """A copy of a payload's arrays, nested as the schema says (`{"data": uint8}` of a raw ring); consumes it.

        Raises:
            ChecksumError: the ring takes checksums and this one does not match; the payload is released, not consumed.
            StaleSlotError: as for `acquire`, like the others there.
        """
        self._require_open()
        return self._reader.read(ref, reader)

    def discard(self, ref: SlotRef) -> bool:
        """Drop an unread payload.

        Returns:
            Whether this call freed its slot. False: it is being read, or not in the ring any more.
        """
        self._require_open()
        if ref.ring_id != self.ring_id or ref.slot >= self.slots:
            return False
        return self._core.transitions.discard(ref.slot, ref.generation)

    @property
    def write_sequence(self) -> int:
        """Number of the write that was completed last; 0 before the first."""
        self._require_open()
        return self._core.words[SEQUENCE_WORD]

    def discard_until(self, sequence: int) -> int:
        """Drop the unread payloads of all writes up to one: their references must not be read any more.

        Args:
            sequence: the last write to drop, a `write_sequence` of before.

        Returns:
            How many payloads of these writes are still being read, and slots written again: call again, until there are
            none. A write that is completed later than `sequence` keeps its payload, whenever it began.

        Raises:
            DeadlineExceededError: the ring's lock was not to be had in time.
        """
        self._require_open()
        return self._core.transitions.discard_until(sequence)

    def ready_refs(self) -> list[SlotRef]:
        """References of the payloads that wait to be read, oldest first; without `meta` (see `take`, `reference`)."""
        self._require_open()
        template = self._references.template()
        return [
            renumbered(template, ready.slot, ready.generation, ready.nbytes, ready.checksum)
            for ready in self._core.transitions.ready()
        ]

    def reclaim_dead(self) -> int:
        """Give back the slots that dead processes hold. Writes do so by themselves when the ring is full.

        Returns:
            How many holds were ended.
        """
        self._require_open()
        return self._core.reclaim_dead()
