"""Opening: a segment is made a ring, or the ring in a segment of another process is found."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ucxx_transport.errors import ConfigError, NotReadyError, ProtocolError
from ucxx_transport.ring import layout
from ucxx_transport.ring.identity import Identity
from ucxx_transport.ring.layout import Geometry
from ucxx_transport.ring.orphans import sweep_orphans
from ucxx_transport.ring.owner import boot_id, current_owner, pid_namespace
from ucxx_transport.ring.segment import Segment, create_segment, open_segment
from ucxx_transport.ring.transitions import Transitions
from ucxx_transport.schema import Schema

if TYPE_CHECKING:
    from ucxx_transport.config import RingConfig


def create_ring(config: RingConfig) -> tuple[Segment, Identity, Schema | None]:
    """Make a segment that describes itself, after a sweep of what dead creators left; errors as `create_segment`."""
    folder = Path(config.folder)
    sweep_orphans(folder)
    schema = None
    if config.schema is not None:
        given = config.schema
        schema = given if isinstance(given, Schema) else Schema.from_dict(given.to_dict())
    schema_bytes = b"" if schema is None else schema.to_bytes()
    creator = current_owner()
    identity = Identity(
        geometry=Geometry(
            slots=config.slots,
            # a schema of empty arrays alone has payloads of no bytes
            slot_bytes=max(1, schema.nbytes) if schema is not None else (config.slot_bytes or 1),
            readers=config.readers,
            schema_bytes=len(schema_bytes),
            envelope_bytes=layout.round_up(config.envelope_bytes, 64),
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
        _describe(segment, identity, schema_bytes)
    except BaseException:
        segment.unlink()
        raise
    return segment, identity, schema


def attach_ring(
    name: str, *, populate: bool, folder: Path | None = None, descriptor: int | None = None
) -> tuple[Segment, Identity, Schema | None]:
    """Map a ring by its name and check that it is one.

    Args:
        name: of the ring.
        populate: map all its pages now.
        folder: where its segment is; None for `segment_folder()`.
        descriptor: of its segment, whose name may be gone; stays the caller's.

    Raises:
        ConfigError: there is no such ring here, or its creator's pids mean nothing here.
        NotReadyError: it is still being made.
        ProtocolError: it is no ring, of another layout version, or damaged; says what was found.
    """
    segment = open_segment(name, folder, descriptor)
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
    schema = None
    if identity.geometry.schema_bytes:
        schema = Schema.from_bytes(schema_bytes(segment, identity))
        if schema.fingerprint != identity.fingerprint or schema.nbytes > identity.geometry.slot_bytes:
            raise ProtocolError("a ring whose schema is not the one it names", field="schema", name=segment.name)
    if populate:
        segment.populate(write=False)
    return segment, identity, schema


def schema_bytes(segment: Segment, identity: Identity) -> bytes:
    """The schema's msgpack form as the segment holds it, b"" for a raw ring."""
    return segment.memory[layout.SCHEMA_BYTE : layout.SCHEMA_BYTE + identity.geometry.schema_bytes].tobytes()


def _describe(segment: Segment, identity: Identity, schema: bytes) -> None:
    """Write what the segment says of itself; the word that makes it complete last."""
    Transitions(segment, identity.geometry, lock_wait_s=0.0).initialise()
    segment.memory[layout.SCHEMA_BYTE : layout.SCHEMA_BYTE + len(schema)] = np.frombuffer(schema, np.uint8)
    for index, word in enumerate(identity.to_words()):
        segment.words[index] = word
    segment.words[layout.COMPLETE_WORD] = 1
