"""SharedRingBuffer: a ring of payloads in shared memory, written by rollout workers, read in place or served from."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy.typing as npt

from ucxx_transport.config import RingConfig
from ucxx_transport.errors import SlotError
from ucxx_transport.ring.address_board import AddressBoard, check_address
from ucxx_transport.ring.core import RingCore
from ucxx_transport.ring.identity import Identity
from ucxx_transport.ring.layout import SERVER_WORD, SERVER_WORDS
from ucxx_transport.ring.lease import ReadLease, WriteLease
from ucxx_transport.ring.opening import attach_ring, create_ring, schema_bytes
from ucxx_transport.ring.owner import Owner, owner_alive
from ucxx_transport.ring.reading import SlotReader
from ucxx_transport.ring.references import ReferenceMaker
from ucxx_transport.ring.segment import Segment
from ucxx_transport.ring.states import SlotState, generation_of, state_of
from ucxx_transport.ring.statistics import RingStatistics, read_statistics
from ucxx_transport.ring.writing import SlotWriter
from ucxx_transport.schema import Schema, SlotRef

if TYPE_CHECKING:
    from typing_extensions import Buffer


class SharedRingBuffer:
    """One process's handle on a ring. Every call is safe from any thread and any process that has a handle.

    The handle that made the ring removes it from the host on `close`, on leaving `with`, and at exit; one that attached
    never does. Closing does not end leases: arrays of theirs stay valid, and the memory goes with the last of them.

    >>> with SharedRingBuffer.create(RingConfig(slots=4, slot_bytes=64)) as ring:
    ...     ref = ring.write_raw(b"an episode")
    ...     with ring.acquire(ref) as lease:
    ...         bytes(lease.buffer), lease.mark_consumed()
    (b'an episode', True)
    """

    __slots__ = ("__weakref__", "_board", "_core", "_open", "_reader", "_references", "_schema", "_segment", "_writer")

    def __init__(
        self,
        segment: Segment,
        identity: Identity,
        schema: Schema | None,
        *,
        owner: Owner | None,
        alive: Callable[[int, int], bool],
        clock: Callable[[], float],
    ) -> None:
        """Wrap a complete segment; use `create` or `attach`."""
        self._segment = segment
        self._schema = schema
        self._core = RingCore(segment, identity, owner=owner, alive=alive, clock=clock)
        self._board = AddressBoard(segment.words)
        self._references = ReferenceMaker(self._core, self._board)
        self._writer = SlotWriter(self._core, schema, self._references)
        self._reader = SlotReader(self._core, schema)
        self._open = True

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
            ConfigError: the name is in use by a live creator, or the ring does not fit /dev/shm.
        """
        return cls(*create_ring(config), owner=owner, alive=alive, clock=clock)

    @classmethod
    def attach(
        cls,
        name: str,
        *,
        populate: bool = True,
        owner: Owner | None = None,
        alive: Callable[[int, int], bool] = owner_alive,
        clock: Callable[[], float] = time.monotonic,
    ) -> Self:
        """Open a ring that another process, or another handle, made.

        Args:
            name: its `name`, or that of a SlotRef (`ring_name`).
            populate: map all its pages now; the first read of each is half as fast otherwise.
            owner: in whose name this handle takes slots; None for this process.
            alive: whether the process (pid, start time) lives.
            clock: monotonic seconds.

        Raises:
            ConfigError: no such ring on this host (`facts["reason"]` "missing"), or it is of another pid namespace.
            NotReadyError: it is still being made.
            ProtocolError: no ring, another layout version, or damaged; says what was found.
        """
        return cls(*attach_ring(name, populate=populate), owner=owner, alive=alive, clock=clock)

    @property
    def name(self) -> str:
        """What `attach` takes; the file is `/dev/shm/ucxx_transport-<name>`."""
        return self._segment.name

    @property
    def ring_id(self) -> bytes:
        """16 random bytes, new for every created ring."""
        return self._core.identity.ring_id

    @property
    def slots(self) -> int:
        """Number of slots."""
        return self._core.identity.geometry.slots

    @property
    def slot_bytes(self) -> int:
        """Bytes of the largest payload."""
        return self._core.identity.geometry.slot_bytes

    @property
    def readers(self) -> int:
        """Reads that free a payload."""
        return self._core.identity.geometry.readers

    @property
    def schema(self) -> Schema | None:
        """The payloads' fields; None for a raw ring."""
        return self._schema

    @property
    def schema_bytes(self) -> bytes:
        """The schema as msgpack, b"" for a raw ring."""
        self._require_open()
        return schema_bytes(self._segment, self._core.identity)

    @property
    def fingerprint(self) -> int:
        """The schema's fingerprint, 0 for a raw ring."""
        return self._core.identity.fingerprint

    @property
    def is_creator(self) -> bool:
        """Whether closing this handle removes the ring."""
        return self._segment.is_creator

    @property
    def closed(self) -> bool:
        """Whether `close` was called on this handle."""
        return not self._open

    @property
    def server_words(self) -> memoryview:
        """`SERVER_WORDS` unsigned 64-bit words for the server's own shared statistics; each should have one writer."""
        self._require_open()
        return self._core.words[SERVER_WORD : SERVER_WORD + SERVER_WORDS]

    def write(
        self,
        data: Mapping[str, Any],
        *,
        readers: int | None = None,
        meta: Mapping[str, object] | None = None,
        deadline_s: float | None = None,
    ) -> SlotRef:
        """Copy arrays into a slot and make them readable. A failed write leaves no trace but its count.

        Args:
            data: a value for every field of the schema, nested as its names say.
            readers: reads that free this payload, at most the ring's own; None for that.
            meta: what to say about the payload in its reference; msgpack- and JSON-safe, 64 KiB at most.
            deadline_s: how long to wait for a slot under `on_full="block"`, and for the lock; None: as configured.

        Raises:
            ConfigError: the data does not fit the schema; no slot was touched.
            RingFullError: every slot is being read or written, or, with `on_full="raise"`, none is free.
            DeadlineExceededError: no slot, or the lock, in time.
        """
        self._require_open()
        return self._writer.write(data, readers, meta, deadline_s)

    def write_raw(
        self,
        buffer: Buffer | npt.NDArray[Any],
        *,
        readers: int | None = None,
        meta: Mapping[str, object] | None = None,
        deadline_s: float | None = None,
    ) -> SlotRef:
        """Copy bytes into a slot of a raw ring: any contiguous buffer, whatever its elements. Else as `write`."""
        self._require_open()
        return self._writer.write_raw(buffer, readers, meta, deadline_s)

    def reserve(
        self,
        nbytes: int | None = None,
        *,
        lengths: Mapping[str, int] | None = None,
        readers: int | None = None,
        meta: Mapping[str, object] | None = None,
        deadline_s: float | None = None,
    ) -> WriteLease:
        """A slot to produce a payload in, without a copy: `with ring.reserve() as lease: lease.arrays["obs"][:] = …`.

        Args:
            nbytes: bytes of a raw payload; None for a whole slot (see `WriteLease.commit`).
            lengths: rows of the schema's varlen fields; one left out has its maximum.
            readers: as for `write`.
            meta: as for `write`.
            deadline_s: as for `write`.

        Raises:
            ConfigError: a size or length does not fit.
            RingFullError: as for `write`.
            DeadlineExceededError: as for `write`.
        """
        self._require_open()
        return self._writer.reserve(nbytes, lengths, readers, meta, deadline_s)

    def acquire(self, ref: SlotRef, *, reader: int = 0) -> ReadLease:
        """Begin to read a payload in place. Leave the lease by `mark_consumed`, or it is released.

        Args:
            ref: the payload's name.
            reader: who reads, where several do (`readers` > 1): a reader's second read does not count. 0: nobody in
                particular, who always counts.

        Raises:
            StaleSlotError: the payload is not in the ring any more, or never was.
            SlotError: the ring has no such slot.
            BusyError: the slot carries as many read attempts as it can.
        """
        self._require_open()
        return self._reader.acquire_ref(ref, reader)

    def acquire_slot(self, slot: int, generation: int, *, reader: int = 0) -> ReadLease:
        """`acquire` for the server: the ring's id has been checked, the numbers have not."""
        self._require_open()
        return self._reader.acquire(slot, generation, reader)

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
        return self._core.transact(self._core.table.discard, ref.slot, ref.generation)

    def slot_state(self, slot: int) -> SlotState:
        """What a slot holds now.

        Raises:
            SlotError: the ring has no such slot.
        """
        self._require_open()
        if not 0 <= slot < self.slots:
            raise SlotError("the ring has no such slot", slot=slot, slots=self.slots)
        return state_of(self._core.table.peek(slot))

    def slot_states(self) -> list[SlotState]:
        """What each slot holds now, in order."""
        self._require_open()
        return [SlotState(state) for state in self._core.search.states().tolist()]

    def get_ready_count(self) -> int:
        """How many payloads wait to be read."""
        self._require_open()
        return len(self._core.search.slots_in(SlotState.READY))

    def ready_refs(self) -> list[SlotRef]:
        """References of the payloads that wait to be read, oldest first; without `meta`, which is not in the ring."""
        self._require_open()
        return self._core.transact(self._ready_refs)

    def reclaim_dead(self) -> int:
        """Give back the slots that dead processes hold. Writes do so by themselves when the ring is full.

        Returns:
            How many holds were ended.
        """
        self._require_open()
        return self._core.reclaim_dead()

    def creator_alive(self) -> bool:
        """Whether the process that made the ring lives."""
        return owner_alive(self._core.identity.creator_pid, self._core.identity.creator_start)

    def publish_address(self, host: str | None, ports: Sequence[int]) -> None:
        """Store where the ring's server listens; every SlotRef made after that, in any process, carries it.

        None and no ports withdraw it: the server has stopped.

        Raises:
            ConfigError: no host of 1 to 255 bytes, or not 1 to 64 ports.
        """
        self._require_open()
        check_address(host, ports)
        self._core.transact(self._board.publish, host, tuple(ports))

    def address(self) -> tuple[str | None, tuple[int, ...]]:
        """Host and ports as published last; (None, ()) before, and after a withdrawal."""
        self._require_open()
        return self._board.read()

    def statistics(self) -> RingStatistics:
        """What has happened since the ring was made, and what its slots hold now."""
        self._require_open()
        return read_statistics(self._core.words, self._core.search.states().tolist())

    def unlink(self) -> bool:
        """Remove the ring from the host, if this handle made it: nobody can attach any more, who has it keeps it.

        Returns:
            Whether this call removed it; False for a handle that attached.
        """
        return self._segment.unlink()

    def close(self) -> None:
        """End the use of this handle; the one that made the ring removes it. Leases stay valid. Idempotent."""
        self._open = False
        self._segment.unlink()

    def __enter__(self) -> Self:
        """The handle itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()

    def __repr__(self) -> str:
        """Name, sizes and role."""
        role = "closed" if not self._open else "creator" if self.is_creator else "attached"
        return f"<SharedRingBuffer {self.name!r} {self.slots} × {self.slot_bytes} bytes, {role}, pid {os.getpid()}>"

    def _ready_refs(self) -> list[SlotRef]:
        refs = []
        for slot in self._core.search.ready_by_age():
            facts = self._core.table.facts(slot)
            generation = generation_of(self._core.table.peek(slot))
            refs.append(self._references.make(slot, generation, facts.nbytes, facts.checksum, None))
        return refs

    def _require_open(self) -> None:
        if not self._open:
            raise SlotError("this handle of the ring is closed", name=self.name)
