"""Leases: this process's writes and read attempts as objects, and what becomes of one that is dropped unfinished.

A hold is registered here *before* its transition happens in the segment. So for every hold in a segment that names this
process, either its object is alive here, or the hold is an orphan (its call was cut off by an exception, or its owner
dropped it while the lock was taken) and may be reclaimed.
"""

from __future__ import annotations

import itertools
import os
import struct
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, Final, Self
from weakref import ref

import numpy as np
import numpy.typing as npt

from ucxx_transport.errors import ConfigError, SlotError, TransportError
from ucxx_transport.logs import get_logger
from ucxx_transport.ring import layout
from ucxx_transport.ring.layout import ABORTED, CONSUMED, RELEASED
from ucxx_transport.ring.transitions import HoldWords, Transitions
from ucxx_transport.schema import SlotRef
from ucxx_transport.schema.wire_form import record_and_meta

_log = get_logger(__name__)

# How long a finaliser waits for the lock, which runs wherever a reference goes. While others are to be settled it does
# not wait: a thousand arrays that go while the lock's holder is stopped cost their thread this once.
_LOST_WAIT_S: Final = 0.05
_fill: Final = struct.Struct("<7Q").pack_into  # a third of the time that the type takes with values
_name: Final = struct.Struct("<2Q").pack_into
_BYTE: Final = np.dtype(np.uint8)
_next_lease_id = itertools.count(1).__next__
live: dict[int, ref[Any]] = {}
"""This process's holds that have not ended: each as long as it is there, or the array that it was handed over to. A
forked child inherits the objects only."""
unsettled: list[Hold] = []  # dropped while the lock was not to be had: `settle` ends them


class Hold:
    """One hold on one slot, by this process. numpy arrays made over it keep it.

    A write is given its slot and generation by its transition. `reason` says as what a drop ends it: `ABORTED` for a
    write, `RELEASED` for a read, `CONSUMED` for one that an array keeps. `lease_id` is unique in this process. `words`
    is the hold as the transitions take it; `layout` names them.
    """

    __slots__ = ("__weakref__", "lease_id", "reason", "transitions", "words")

    def __init__(
        self, transitions: Transitions, slot: int = 0, generation: int = 0, reader: int = 0, reason: int = ABORTED
    ) -> None:
        lease_id = self.lease_id = _next_lease_id()
        words = self.words = HoldWords()
        pid, start = transitions.owner()
        _fill(words, 0, slot, generation, lease_id, pid, start, reader, transitions.address)
        self.transitions = transitions
        self.reason = reason
        live[lease_id] = ref(self)

    def begin(self, slot: int, generation: int, reader: int) -> None:
        """Make it another hold of this process, once it has ended."""
        words = self.words
        _name(words, 0, slot, generation)
        words[layout.HOLD_READER] = reader
        live[self.lease_id] = ref(self)

    @property
    def slot(self) -> int:
        """The slot's index."""
        return self.words[layout.HOLD_SLOT]

    @property
    def generation(self) -> int:
        """Which write to that slot it is, or reads."""
        return self.words[layout.HOLD_GENERATION]

    @property
    def nbytes(self) -> int:
        """Bytes of the payload, or reserved for it."""
        return self.words[layout.HOLD_NBYTES]

    @property
    def buffer(self) -> memoryview:
        """The payload's memory: read-only for a read; for a write, not to be written to after `commit`."""
        self.require_live()
        return np.asarray(self).data

    @property
    def arrays(self) -> dict[str, Any]:
        """Arrays straight over the slot, nested as the schema says; a raw ring's is `{"data": uint8}`.

        Those of a read are read-only; copy what must outlive `mark_consumed` or `release_reading`.
        """
        self.require_live()
        memory, schema = np.asarray(self), self.transitions.schema
        if schema is None:
            return {layout.RAW_FIELD: memory}
        return schema.views(memory.data, writable=self.reason == ABORTED)

    @property
    def __array_interface__(self) -> dict[str, Any]:
        """The payload's bytes for numpy, read-only for a read. An array made of this keeps the hold."""
        words, transitions = self.words, self.transitions
        start = transitions.first_payload + words[layout.HOLD_SLOT] * transitions.stride
        read_only = self.reason != ABORTED
        return {"shape": (words[layout.HOLD_NBYTES],), "typestr": "|u1", "data": (start, read_only), "version": 3}

    def require_live(self) -> None:
        """Refuse, by a SlotError, one that has ended, or is another process's."""
        if self.lease_id not in live:
            kind = "write" if self.reason == ABORTED else "read"
            text = f"this {kind} lease has ended, or was inherited by a forked process"
            raise SlotError(text, slot=self.slot, generation=self.generation)

    def end(self, reason: int, wait_s: float | None = None) -> bool:
        """End it; False changes nothing: it had ended, was reclaimed, or is another process's."""
        lease_id = self.lease_id
        if lease_id not in live:
            return False
        ended = self.transitions.finalise(self.words, reason, wait_s)
        live.pop(lease_id, None)
        return ended

    def forget(self) -> None:
        """Take it out of the registry: it has ended, or never began."""
        live.pop(self.lease_id, None)

    def settle(self, wait_s: float) -> None:
        """End it as a drop does; later where the lock is not to be had."""
        try:
            self.end(self.reason, wait_s)
        except TransportError:
            unsettled.append(self)

    def __enter__(self) -> Self:
        return self

    # Also what an array calls that it was handed over to, to serve `again`. At the end of the process, which is
    # reclaimed, the names of this module may be gone.
    def __del__(
        self,
        again: list[Any] | None = None,
        _: object = None,
        known: dict[int, ref[Any]] = live,
        is_ending: Callable[[], bool] = sys.is_finalizing,
    ) -> None:
        if self.lease_id in known and not is_ending():
            self.settle(0.0 if unsettled else _LOST_WAIT_S)
            if again is not None and self.lease_id not in known:
                self.reason = RELEASED
                again.append(self)


class ReadLease(Hold):
    """One read attempt on a payload, from `acquire()`. As a context manager: leaving it unfinalised releases it."""

    __slots__ = ()

    @property
    def checksum(self) -> int | None:
        """xxh3_64 of the payload, None when the ring takes none."""
        return self.words[layout.HOLD_CHECKSUM] if self.words[layout.HOLD_HAS_CHECKSUM] else None

    @property
    def commit_time_ns(self) -> int:
        """When the payload was committed: nanoseconds since 1970 by its writer's clock."""
        return self.words[layout.HOLD_COMMIT_TIME]

    @property
    def message(self) -> memoryview:
        """The payload as a server sends it, read-only: [header of 64 bytes | payload | zeros to 8 | trailer of 16].

        It does not keep the attempt.
        """
        first, padded = self.transitions.first_byte, layout.round_up(self.words[layout.HOLD_NBYTES], 8)
        return self._memory(first - layout.HEADROOM_BYTES, layout.HEADROOM_BYTES + padded + layout.TRAILER_BYTES)

    @property
    def envelope(self) -> bytes:
        """What the writer noted of the payload, as msgpack; b"" when that was nothing, or too much."""
        return bytes(self._memory(self.transitions.first_envelope, self.words[layout.HOLD_ENVELOPE_BYTES]))

    @property
    def record(self) -> dict[str, object] | None:
        """The envelope's content: the payload's `meta`, or, of a rollout worker's, its record; None without one.

        `EpisodeRecord.from_envelope(lease.record, ring.reference(lease))` makes a record of it.

        Raises:
            ProtocolError: the envelope is no mapping of plain values.
        """
        return record_and_meta(self.envelope)[0]

    def mark_consumed(self) -> bool:
        """End the attempt: its reader has had the payload.

        False changes nothing and is counted: it had ended, or was reclaimed.
        """
        return self.end(CONSUMED) or self._came_late()

    def release_reading(self) -> bool:
        """End the attempt without having had the payload: it is READY again unless another attempt has it.

        False changes nothing and is counted.
        """
        return self.end(RELEASED) or self._came_late()

    def hand_over(self, again: list[ReadLease] | None = None) -> npt.NDArray[np.uint8]:
        """Hand the attempt, which is in use and which no caller has, over to an array.

        Returns:
            The payload, read-only, shape (nbytes,), uint8. When it and every view derived from it are gone, in any
            thread and at any time, the attempt is consumed; the lease may then serve again, and is appended to `again`.
        """
        self.reason = CONSUMED
        words, transitions = self.words, self.transitions
        start = transitions.first_byte + words[layout.HOLD_SLOT] * transitions.stride
        # An array over a memoryview: numpy bases whatever is derived from it on this very array, not on the memory.
        array = np.frombuffer(transitions.readable, _BYTE, words[layout.HOLD_NBYTES], start)
        live[self.lease_id] = ref(array, partial(self.__del__, again))
        return array

    def __exit__(self, *error: object) -> None:
        """Release the attempt if it was not finalised."""
        self.end(RELEASED)

    def _memory(self, first: int, nbytes: int) -> memoryview:
        """So many bytes, which lie at `first` for slot 0."""
        self.require_live()
        start = first + self.words[layout.HOLD_SLOT] * self.transitions.stride
        return self.transitions.readable[start : start + nbytes]

    def _came_late(self) -> bool:
        """Count a finalise that came too late, and say so once for this handle; False: it changed nothing."""
        transitions = self.transitions
        transitions.count("late_finalise")
        if not transitions.warned_late:
            transitions.warned_late = True
            _log.warning(
                "finalise_ignored",
                ring=transitions.creation.name,
                slot=self.slot,
                generation=self.generation,
                attempt=self.lease_id,
                pid=os.getpid(),
                reason="the lease had ended; counted from here on",
            )
        return False


class WriteLease(Hold):
    """A slot to write to, from `reserve()`.

    Fill `arrays` or `buffer`, then `commit()`. As a context manager: a clean exit commits, an exception aborts.
    """

    __slots__ = ("_commit", "_ref")

    def __init__(self, transitions: Transitions, commit: Callable[[Hold], SlotRef]) -> None:
        super().__init__(transitions)
        self._commit = commit
        self._ref: SlotRef | None = None

    @property
    def ref(self) -> SlotRef:
        """The payload's reference; a SlotError before it is committed."""
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
            ConfigError: `nbytes` is not 0 to the bytes reserved, or the ring has a schema.
        """
        if self._ref is None:
            reserved = self.nbytes
            if nbytes is not None and (self.transitions.schema is not None or not 0 <= nbytes <= reserved):
                text = f"nbytes must be 0 to {reserved} on a raw ring, and left out on one with a schema"
                raise ConfigError(text, field="nbytes", value=nbytes)
            self.require_live()
            self.words[layout.HOLD_NBYTES] = reserved if nbytes is None else nbytes
            self._ref = self._commit(self)
            self.forget()
        return self._ref

    def abort(self) -> bool:
        """Give the slot back without a payload; False when the lease was committed, aborted or reclaimed before."""
        return self.end(ABORTED)

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        """Commit on a clean exit, unless committed or aborted already; abort on an exception."""
        try:
            if kind is None and self.lease_id in live:
                self.commit()
        finally:
            self.abort()  # changes nothing where it is committed


def is_live(lease_id: int) -> bool:
    """Whether a hold of this process with that id has its object."""
    reference = live.get(lease_id)
    return reference is not None and reference() is not None


def settle() -> None:
    """End the holds whose objects are gone and that could not be ended then."""
    waiting = unsettled[:]
    unsettled.clear()
    for hold in waiting:
        hold.settle(0.0)


os.register_at_fork(after_in_child=live.clear)
os.register_at_fork(after_in_child=unsettled.clear)
