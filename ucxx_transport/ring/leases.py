"""ReadLease and WriteLease: what a reader and a writer have of one slot."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from ucxx_transport.errors import ConfigError, SlotError
from ucxx_transport.ring import layout
from ucxx_transport.ring.holds import ABORTED, CONSUMED, RELEASED, DetachedRead, Hold
from ucxx_transport.ring.layout import message_bytes
from ucxx_transport.schema.envelope import unpack_envelope
from ucxx_transport.schema.tensors import Placement, view_fields

if TYPE_CHECKING:
    from ucxx_transport.ring.owner import Owner
    from ucxx_transport.ring.transitions import Transitions
    from ucxx_transport.schema import Schema, SlotRef


class ReadLease(Hold):
    """One read attempt on a payload, from `acquire()`. As a context manager: leaving it unfinalised releases it."""

    __slots__ = ("_schema",)

    kind: ClassVar = "read"
    _schema: Schema | None

    @property
    def attempt(self) -> int:
        """The attempt's id, unique in this process."""
        return self.lease_id

    @property
    def nbytes(self) -> int:
        """Bytes of the payload."""
        self.require_live()
        return self.words[layout.HOLD_NBYTES]

    @property
    def checksum(self) -> int | None:
        """xxh3_64 of the payload, None when the ring takes none."""
        return self.words[layout.HOLD_CHECKSUM] if self.words[layout.HOLD_HAS_CHECKSUM] else None

    @property
    def buffer(self) -> memoryview:
        """The payload, read-only."""
        self.require_live()
        return np.asarray(self).data

    @property
    def arrays(self) -> dict[str, Any]:
        """Read-only arrays over the payload, nested as the schema says; a raw ring's is `{"data": uint8}`.

        They are the slot's own memory: copy what must outlive `mark_consumed` or `release_reading`.
        """
        self.require_live()
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
        self.require_live()
        transitions, words = self.transitions, self.words
        start = transitions.first_byte + words[layout.HOLD_SLOT] * transitions.stride - layout.HEADROOM_BYTES
        return transitions.readable[start : start + message_bytes(words[layout.HOLD_NBYTES])]

    @property
    def envelope(self) -> bytes:
        """What the writer said of the payload, as msgpack; b"" when it said nothing, or too much."""
        self.require_live()
        transitions, words = self.transitions, self.words
        start = transitions.first_envelope + words[layout.HOLD_SLOT] * transitions.stride
        return bytes(transitions.readable[start : start + words[layout.HOLD_ENVELOPE_BYTES]])

    @property
    def record(self) -> dict[str, object] | None:
        """The envelope's content: the payload's `meta`, or, of a rollout worker's, its record; None without one.

        `EpisodeRecord.from_envelope(lease.record, ring.reference(lease))` makes a record of it.

        Raises:
            ProtocolError: the envelope is no mapping of plain values.
        """
        return unpack_envelope(self.envelope)

    def mark_consumed(self) -> bool:
        """End the attempt: its reader has had the payload.

        Returns:
            Whether this call ended it. False changes nothing and is counted: it had ended, or was reclaimed.
        """
        return self.end(CONSUMED) or self.transitions.count_late(self.words)

    def release_reading(self) -> bool:
        """End the attempt without having had the payload: it is READY again unless another attempt has it.

        Returns:
            Whether this call ended it. False changes nothing and is counted.
        """
        return self.end(RELEASED) or self.transitions.count_late(self.words)

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
        self.end(RELEASED)


class WriteLease(Hold):
    """A slot to write to, from `reserve()`.

    Fill `arrays` or `buffer`, then `commit()`. As a context manager: a clean exit commits, an exception aborts.
    """

    __slots__ = ("_commit", "_placement", "_ref", "_schema")

    def __init__(
        self,
        transitions: Transitions,
        owner: Owner,
        schema: Schema | None,
        placement: Placement | None,
        commit: Callable[[Hold], SlotRef],
    ) -> None:
        super().__init__(transitions, owner)
        self._schema, self._placement, self._commit = schema, placement, commit
        self._ref: SlotRef | None = None

    @property
    def nbytes(self) -> int:
        """Bytes reserved."""
        return self.words[layout.HOLD_NBYTES]

    @property
    def buffer(self) -> memoryview:
        """The slot's memory, writable, `nbytes` long. Not to be written to after `commit`."""
        self.require_live()
        return np.asarray(self).data

    @property
    def arrays(self) -> dict[str, Any]:
        """Writable arrays straight over the slot, nested as the schema says; a raw ring's is `{"data": uint8}`."""
        self.require_live()
        memory = np.asarray(self)
        if self._schema is None or self._placement is None:
            return {layout.RAW_FIELD: memory}
        return self._schema.nest(view_fields(memory.data, self._placement))

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
            ConfigError: `nbytes` is not 0 to the bytes reserved, or the ring has a schema.
        """
        if self._ref is None:
            reserved = self.nbytes
            if nbytes is not None and (self._schema is not None or not 0 <= nbytes <= reserved):
                raise ConfigError(
                    f"nbytes must be 0 to {reserved} on a raw ring, and left out on one with a schema",
                    field="nbytes",
                    value=nbytes,
                )
            self.require_live()
            self.words[layout.HOLD_NBYTES] = reserved if nbytes is None else nbytes
            self._ref = self._commit(self)
        return self._ref

    def abort(self) -> bool:
        """Give the slot back without a payload.

        Returns:
            Whether this call did; False when the lease was committed, aborted or reclaimed before.
        """
        return self.end(ABORTED)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        """Commit on a clean exit, unless committed or aborted already; abort on an exception."""
        try:
            if kind is None and self.is_live:
                self.commit()
        finally:
            self.abort()  # changes nothing where it is committed
