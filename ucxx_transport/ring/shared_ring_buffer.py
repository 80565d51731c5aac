"""SharedRingBuffer: a ring of payloads in shared memory, written by rollout workers, read in place or served from."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from ucxx_transport.errors import ConfigError, NotReadyError, ProtocolError
from ucxx_transport.ring import layout
from ucxx_transport.ring.layout import Geometry, Identity, round_up
from ucxx_transport.ring.orphans import sweep_orphans
from ucxx_transport.ring.owner import boot_id, current_owner, pid_namespace
from ucxx_transport.ring.reading import ReadableRing
from ucxx_transport.ring.segment import Segment, create_segment, open_segment
from ucxx_transport.ring.transitions import Transitions
from ucxx_transport.ring.writing import WritableRing
from ucxx_transport.schema import Schema, SlotRef
from ucxx_transport.schema.slot_ref import renumbered

if TYPE_CHECKING:
    from ucxx_transport.config import RingConfig


class SharedRingBuffer(WritableRing, ReadableRing):
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
        closed: whether `close` was called on this handle.

    >>> with SharedRingBuffer.create(RingConfig(slots=4, slot_bytes=64)) as ring:
    ...     ref = ring.write_raw(b"an episode")
    ...     with ring.acquire(ref) as lease:
    ...         bytes(lease.buffer), lease.mark_consumed()
    (b'an episode', True)
    """

    @classmethod
    def create(cls, config: RingConfig, **seams: Any) -> Self:
        """Make a ring, after removing those of dead creators on this host.

        Args:
            config: sizes and policies.
            **seams: `owner`, `alive` and `clock` of `RingHandle`.

        Raises:
            ConfigError: the name is in use by a live creator, or the ring does not fit its folder.
        """
        return cls(*create_ring(config), **seams)

    @classmethod
    def attach(
        cls,
        name: str,
        *,
        folder: Path | str | None = None,
        descriptor: int | None = None,
        populate: bool = True,
        **seams: Any,
    ) -> Self:
        """Open a ring that another process, or another handle, made.

        Args:
            name: its `name`, or that of a SlotRef (`ring_name`).
            folder: where its segment is; None for the setting `ring.folder` of this process.
            descriptor: of its segment (`RingHandle.duplicate`), whose name may be gone; stays the caller's.
            populate: map all its pages now; the first read of each is half as fast otherwise.
            **seams: as for `create`.

        Raises:
            ConfigError: no such ring on this host (`facts["reason"]` "missing"), or it is of another pid namespace.
            NotReadyError: it is still being made.
            ProtocolError: no ring, another layout version, or damaged; says what was found.
        """
        segment = open_segment(name, None if folder is None else Path(folder), descriptor)
        identity, schema = read_identity(segment)
        if populate:
            segment.populate(write=False)
        return cls(segment, identity, schema, **seams)

    def ready_refs(self) -> list[SlotRef]:
        """References of the payloads that wait to be read, oldest first; without `meta` (see `take`, `reference`)."""
        self._require_open()
        template = self._template()
        return [
            renumbered(
                template,
                words[layout.HOLD_SLOT],
                words[layout.HOLD_GENERATION],
                words[layout.HOLD_NBYTES],
                words[layout.HOLD_CHECKSUM] if words[layout.HOLD_HAS_CHECKSUM] else None,
            )
            for words in self._transitions.ready()
        ]

    def discard(self, ref: SlotRef) -> bool:
        """Drop an unread payload.

        Returns:
            Whether this call freed its slot. False: it is being read, or not in the ring any more.
        """
        self._require_open()
        return ref.ring_id == self.ring_id and self._transitions.discard(ref.slot, ref.generation)

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
        return self._transitions.discard_until(sequence)


def create_ring(config: RingConfig) -> tuple[Segment, Identity, Schema | None]:
    """Make a segment that describes itself, after a sweep of what dead creators left; errors as `create_segment`."""
    folder = Path(config.folder)
    sweep_orphans(folder)
    schema = None
    if config.schema is not None:
        given = config.schema
        schema = given if isinstance(given, Schema) else Schema.from_dict(given.to_dict())
    described = b"" if schema is None else schema.to_bytes()
    creator = current_owner()
    identity = Identity(
        geometry=Geometry(
            slots=config.slots,
            # a schema of empty arrays alone has payloads of no bytes
            slot_bytes=max(1, schema.nbytes) if schema is not None else (config.slot_bytes or 1),
            readers=config.readers,
            schema_bytes=len(described),
            envelope_bytes=round_up(config.envelope_bytes, 64),
        ),
        ring_id=secrets.token_bytes(16),
        fingerprint=0 if schema is None else schema.fingerprint,
        on_full=config.on_full,
        checksum=config.checksum,
        block_timeout_ns=int(config.block_timeout_s * 1e9),
        lock_timeout_ns=int(config.lock_timeout_s * 1e9),
        creator_pid=creator.pid,
        creator_start=creator.start,
        boot_id=boot_id(),
        pid_namespace=pid_namespace(),
    )
    name = config.name or f"{os.getpid()}-{secrets.token_hex(6)}"
    segment = create_segment(name, identity.geometry.total_bytes, folder)
    try:
        if config.prefault:
            segment.populate(write=True)
        Transitions(segment, identity).initialise()
        segment.memory[layout.SCHEMA_BYTE : layout.SCHEMA_BYTE + len(described)] = np.frombuffer(described, np.uint8)
        for index, word in enumerate(identity.to_words()):
            segment.words[index] = word
        segment.words[layout.COMPLETE_WORD] = 1  # the last store
    except BaseException:
        segment.unlink()
        raise
    return segment, identity, schema


def read_identity(segment: Segment) -> tuple[Identity, Schema | None]:
    """Check that a segment is a ring which this process can use, and what it says of itself; errors as `attach`."""
    words = segment.words[: layout.IDENTITY_WORDS].tolist()
    blank = not any(words[: layout.COMPLETE_WORD + 1])
    of_ours = words[layout.MAGIC_WORD] == layout.MAGIC and words[layout.VERSION_WORD] == layout.LAYOUT_VERSION
    if blank or (of_ours and not words[layout.COMPLETE_WORD]):  # its sizes may not be there yet
        raise NotReadyError("the ring is still being made; try again", name=segment.name)
    identity = Identity.from_words(words, segment.nbytes)
    if identity.boot_id != boot_id() or identity.pid_namespace != pid_namespace():
        raise ConfigError(
            "the ring was made in another pid namespace, so dead owners and live ones look the same: share the "
            "namespace (docker: --pid=container:…; Kubernetes: shareProcessNamespace), or read over UCX (local='off')",
            field="name",
            name=segment.name,
            reason="pid_namespace",
            creator_namespace=identity.pid_namespace,
            own_namespace=pid_namespace(),
        )
    geometry, schema = identity.geometry, None
    if geometry.schema_bytes:
        schema = Schema.from_bytes(segment.memory[layout.SCHEMA_BYTE :][: geometry.schema_bytes].tobytes())
        if schema.fingerprint != identity.fingerprint or schema.nbytes > geometry.slot_bytes:
            raise ProtocolError("a ring whose schema is not the one it names", field="schema", name=segment.name)
    return identity, schema
