"""Payloads as a ring writes them, without a ring."""

from __future__ import annotations

import struct
from collections.abc import Mapping

from ucxx_transport.schema import Schema
from ucxx_transport.schema.tensors import copy_fields, view_fields


def pack_into(schema: Schema, memory: bytearray, tree: Mapping[str, object]) -> int:
    """Write a payload of `schema` to `memory`, each field to its place; its bytes."""
    arrays, placement = schema.arrange(tree)
    struct.pack_into(f"<{len(placement.lengths)}Q", memory, 0, *placement.lengths)
    copy_fields(view_fields(memoryview(memory), placement), arrays)
    return placement.nbytes
