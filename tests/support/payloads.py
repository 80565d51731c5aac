"""Payloads as a ring writes them, their references and answers, without a ring."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

from ucxx_transport.schema import Schema, SlotRef
from ucxx_transport.schema.tensors import copy_fields, view_fields
from ucxx_transport.wire.codec import encode_reply
from ucxx_transport.wire.frames import ReplyHeader, Status


def ref_to(
    ring_id: bytes = b"R" * 16,
    slot: int = 3,
    generation: int = 8,
    nbytes: int = 100,
    checksum: int | None = None,
    *,
    fingerprint: int = 0,
    host: str | None = None,
    ports: tuple[int, ...] = (),
) -> SlotRef:
    """The reference of a payload, of a raw ring by default, that need not exist."""
    return SlotRef(
        ring_id=ring_id,
        ring_name="ucxx_transport-test",
        slot=slot,
        generation=generation,
        nbytes=nbytes,
        host_id="another host",
        host=host,
        ports=ports,
        fingerprint=fingerprint,
        checksum=checksum,
    )


def answer_with(ref: SlotRef, body: bytes, **changes: Any) -> bytes:
    """A whole and proper answer that brings a payload, as it lies in its slot, but for the `changes` in its header."""
    name = ref.ring_id, ref.slot, ref.generation, ref.checksum, ref.fingerprint
    header = ReplyHeader(Status.OK, len(body), *name)._replace(**changes)
    return encode_reply(header, body)


def pack_into(schema: Schema, memory: bytearray, tree: Mapping[str, object]) -> int:
    """Write a payload of `schema` to `memory`, each field to its place; its bytes."""
    arrays, placement = schema.arrange(tree)
    struct.pack_into(f"<{len(placement.lengths)}Q", memory, 0, *placement.lengths)
    copy_fields(view_fields(memoryview(memory), placement), arrays)
    return placement.nbytes
