"""Packer: puts trees of arrays into one piece of memory, field by field, without staging."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from itertools import repeat
from typing import TYPE_CHECKING, cast

import numpy as np

from ucxx_transport.errors import ConfigError, ProtocolError
from ucxx_transport.schema.placement import LENGTH_BYTES, Placement
from ucxx_transport.schema.tensors import Array, copy_fields

if TYPE_CHECKING:
    from typing import TypeAlias

    from typing_extensions import Buffer

    from ucxx_transport.schema.schema import Schema
    from ucxx_transport.schema.tree import ArrayTree

    # numpy tells type checkers of its buffers from Python 3.12 on
    Memory: TypeAlias = Buffer | Array


class Packer:
    """Writes payloads of one schema into one buffer, keeping the views of the last layout.

    Making 8 views costs about 2.5 µs, so whoever writes to the same memory again and again (a slot of a ring) keeps its
    packer. It holds the buffer: drop it before the memory is unmapped.
    """

    __slots__ = ("_memory", "_placement", "_schema", "_views")

    def __init__(self, schema: Schema, buffer: Memory) -> None:
        """Bind `schema` to writable memory.

        Args:
            schema: what the payloads look like.
            buffer: contiguous writable bytes; payloads begin at its first one, best aligned to 64 bytes.

        Raises:
            ConfigError: the buffer is read-only or not contiguous.
        """
        self._schema = schema
        self._memory = byte_view(buffer, writable=True)
        self._placement: Placement | None = None
        self._views: list[Array] = []

    def pack(self, tree: Mapping[str, object]) -> int:
        """Copy a tree of arrays into the buffer, each field straight to its place.

        Nothing is written before everything has been checked.

        Args:
            tree: a value for every field of the schema; a varlen field's array has the rows it has.

        Returns:
            Bytes of the payload, from the buffer's start.

        Raises:
            ConfigError: a field is missing, unknown, of another shape or of a dtype that would narrow, or the buffer is
                too small; the message names the field and the remedy.
        """
        arrays, placement = self._schema.arrange(tree)
        copy_fields(self._views_at(placement), arrays)
        return placement.nbytes

    def views(self, lengths: Mapping[str, int] | None = None) -> ArrayTree:
        """Writable arrays straight over the buffer, for a caller who produces its data in place.

        The lengths are written to the buffer; the arrays hold whatever the memory held.

        Args:
            lengths: rows of each varlen field; one left out has its maximum.

        Raises:
            ConfigError: a length is over its maximum or names no varlen field, or the buffer is too small.
        """
        return self._schema.nest(self._views_at(self._schema.layout(lengths)))

    def _views_at(self, placement: Placement) -> list[Array]:
        if placement is not self._placement:
            if placement.nbytes > len(self._memory):
                raise ConfigError(
                    f"the payload takes {placement.nbytes} bytes and the buffer has {len(self._memory)}: "
                    f"give it Schema.nbytes ({self._schema.nbytes})",
                    nbytes=placement.nbytes,
                    buffer_nbytes=len(self._memory),
                )
            self._views = view_fields(self._memory, placement)
            self._placement = placement
        if placement.lengths:
            struct.pack_into(f"<{len(placement.lengths)}Q", self._memory, 0, *placement.lengths)
        return self._views


def byte_view(buffer: Memory, *, writable: bool) -> memoryview:
    """The memory of `buffer` as plain bytes, writable or not writable as asked.

    Raises:
        ConfigError: not a contiguous buffer, or read-only where writable was asked for.
    """
    try:
        memory = memoryview(cast("Buffer", buffer))
        # cast() refuses memory with gaps
        if memory.ndim != 1 or memory.format != "B" or not memory.contiguous:
            memory = memory.cast("B")
    except (TypeError, ValueError, BufferError) as exc:
        raise ConfigError(
            f"a {type(buffer).__name__} is not a contiguous buffer of bytes: {exc}", field="buffer"
        ) from exc
    if not writable:
        return memory.toreadonly()
    if memory.readonly:
        raise ConfigError("the buffer is read-only; pass writable memory", field="buffer")
    return memory


def view_fields(memory: memoryview, placement: Placement) -> list[Array]:
    """One array per field over `memory`, which must hold `placement.nbytes`."""
    make: Callable[..., Array] = np.ndarray
    # map() over C callables: faster than a comprehension, and this is most of a decode
    return list(map(make, placement.shapes, placement.dtypes, repeat(memory), placement.offsets))


def read_lengths(memory: memoryview, count: int) -> tuple[int, ...]:
    """The table of lengths at the start of a payload, as its writer left it: unchecked numbers, each once read.

    Raises:
        ProtocolError: the payload ends before the table does.
    """
    if len(memory) < count * LENGTH_BYTES:
        raise ProtocolError(
            f"a payload of {len(memory)} bytes ends within its table of {count} lengths", nbytes=len(memory)
        )
    return struct.unpack_from(f"<{count}Q", memory)
