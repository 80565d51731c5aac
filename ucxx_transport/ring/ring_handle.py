"""RingHandle: what a process has of a ring: its name, sizes, state, statistics, address, and the end of its use."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from ucxx_transport.errors import SlotError
from ucxx_transport.ring.core import RingCore
from ucxx_transport.ring.identity import Identity
from ucxx_transport.ring.layout import SERVER_WORD, SERVER_WORDS, STATE_COUNT_WORD, Counter
from ucxx_transport.ring.opening import schema_bytes
from ucxx_transport.ring.owner import Owner, owner_alive
from ucxx_transport.ring.reading import SlotReader
from ucxx_transport.ring.references import AddressBoard, ReferenceMaker, check_address, packed_address
from ucxx_transport.ring.segment import Segment
from ucxx_transport.ring.states import SlotState, state_of
from ucxx_transport.ring.taking import SlotTaker
from ucxx_transport.ring.writing import SlotWriter
from ucxx_transport.schema import Schema


@dataclass(frozen=True, slots=True, kw_only=True)
class RingStatistics:
    """Counts since the ring was made, of all its processes. They live in the segment, so a process's death loses none.

    Attributes:
        slots: number of slots.
        free: slots that hold nothing.
        writing: slots being written.
        ready: slots with a payload to read.
        reading: slots being read.
        written: writes begun.
        committed: writes completed.
        committed_bytes: payload bytes of these.
        overwritten: unread payloads dropped for a new one (`on_full="overwrite"`).
        aborted: writes that ended without a payload: failed, or given up.
        acquired: read attempts begun.
        consumed: read attempts that ended with the payload received.
        released: read attempts that ended without.
        freed: payloads that all their readers have had.
        discarded: payloads dropped on request.
        stale: reads refused because the slot no longer held that payload.
        out_of_range: reads refused because the ring has no such slot.
        busy: reads refused because the slot carried as many attempts as it can.
        late_finalise: finalises by a lease that had ended; they changed nothing.
        reclaimed_writes: writes ended because their process had died, or forgotten them.
        reclaimed_reads: read attempts ended for the same reason.
        full: writes refused because no slot was to be had.
        blocked: writes that had to wait for a slot.
        lock_recoveries: times the lock was taken over from a thread that died with it.
        repaired_slots: transitions that were cut off (kill, interrupt) and completed or undone by the next process.
        envelopes_left_out: payloads whose record or meta is larger than the ring's `envelope_bytes`; it is in their
            reference alone.
    """

    slots: int
    free: int
    writing: int
    ready: int
    reading: int
    written: int
    committed: int
    committed_bytes: int
    overwritten: int
    aborted: int
    acquired: int
    consumed: int
    released: int
    freed: int
    discarded: int
    stale: int
    out_of_range: int
    busy: int
    late_finalise: int
    reclaimed_writes: int
    reclaimed_reads: int
    full: int
    blocked: int
    lock_recoveries: int
    repaired_slots: int
    envelopes_left_out: int


class RingHandle:
    """The part of `SharedRingBuffer` that moves no payload."""

    __slots__ = (
        "__weakref__",
        "_board",
        "_core",
        "_open",
        "_reader",
        "_references",
        "_schema",
        "_segment",
        "_taker",
        "_writer",
    )

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
        self._taker = SlotTaker(self._core, self._reader.new_lease)
        self._open = True

    @property
    def name(self) -> str:
        """What `attach` takes; the file is `<folder>/ucxx_transport-<name>`."""
        return self._segment.name

    @property
    def folder(self) -> Path:
        """Where its segment is."""
        return self._segment.path.parent

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
    def mapping(self) -> npt.NDArray[np.uint8]:
        """All of the ring's memory in this process, for registering it with a device: mapped while this array lives."""
        self._require_open()
        return self._segment.memory

    def duplicate(self) -> int | None:
        """A descriptor of its segment for a process that is to `attach` whatever became of the name; to be closed.

        None where this handle did not make the ring, in this process.
        """
        self._require_open()
        return self._segment.duplicate()

    @property
    def server_words(self) -> memoryview:
        """`SERVER_WORDS` unsigned 64-bit words for the server's own shared statistics; each should have one writer."""
        self._require_open()
        return self._core.words[SERVER_WORD : SERVER_WORD + SERVER_WORDS]

    def slot_state(self, slot: int) -> SlotState:
        """What a slot holds now.

        Raises:
            SlotError: the ring has no such slot.
        """
        self._require_open()
        if not 0 <= slot < self.slots:
            raise SlotError("the ring has no such slot", slot=slot, slots=self.slots)
        return state_of(self._core.state_word(slot))

    def slot_states(self) -> list[SlotState]:
        """What each slot holds now, in order."""
        self._require_open()
        return [SlotState(state) for state in self._core.states().tolist()]

    def get_ready_count(self) -> int:
        """How many payloads wait to be read."""
        self._require_open()
        return self._core.words[STATE_COUNT_WORD + SlotState.READY]

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
        self._core.transitions.publish(packed_address(host, ports))

    def address(self) -> tuple[str | None, tuple[int, ...]]:
        """Host and ports as published last; (None, ()) before, and after a withdrawal."""
        self._require_open()
        return self._board.read()

    def statistics(self) -> RingStatistics:
        """What has happened since the ring was made, and what its slots hold now."""
        self._require_open()
        return _statistics_of(*self._core.transitions.snapshot())

    def unlink(self) -> bool:
        """Remove the ring from the host, if this handle made it: processes that have it keep it, no other can attach.

        Returns:
            Whether this call removed it; False for a handle that attached.
        """
        return self._segment.unlink()

    def close(self) -> None:
        """End the use of this handle; the one that made the ring removes it. Leases stay valid. Idempotent."""
        self._open = False
        self._segment.unlink()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        """Name, sizes and role."""
        role = "closed" if not self._open else "creator" if self.is_creator else "attached"
        return f"<SharedRingBuffer {self.name!r} {self.slots} × {self.slot_bytes} bytes, {role}, pid {os.getpid()}>"

    def _require_open(self) -> None:
        if not self._open:
            raise SlotError("this handle of the ring is closed", name=self.name)


def _statistics_of(counters: Sequence[int], states: Sequence[int]) -> RingStatistics:
    """The statistics, from the counters (`Counter`) and the number of slots in each state (`SlotState`)."""
    counts = {counter.name.lower(): counters[counter] for counter in Counter}
    return RingStatistics(
        slots=sum(states),
        free=states[SlotState.FREE],
        writing=states[SlotState.WRITING],
        ready=states[SlotState.READY],
        reading=states[SlotState.READING],
        **counts,
    )
