"""Placement: where the fields of one payload lie, given its actual lengths, and arrays over them.

```
offset 0                 64-aligned            64-aligned
| lengths: u64 × varlen  | field 0, its bytes  | field 1, its bytes | …      a payload with varlen fields
| field 0, its bytes     | field 1, its bytes  | …                           a payload without
```
Little-endian. A varlen field takes only the rows it has, so the next field moves up. The bytes between two fields are
unspecified. `nbytes` ends with the last field's last byte.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import repeat
from math import prod
from typing import TYPE_CHECKING, Protocol, TypeAlias

import numpy as np

from ucxx_transport.errors import ConfigError, ProtocolError
from ucxx_transport.schema.dtypes import DType
from ucxx_transport.schema.tensor_spec import TensorSpec
from ucxx_transport.schema.tensors import Array

if TYPE_CHECKING:
    from typing_extensions import Buffer

    # numpy tells type checkers of its buffers from Python 3.12 on
    Memory: TypeAlias = Buffer | Array

ALIGNMENT_BYTES = 64
"""A cache line and the widest vector register; also what an aligned device copy wants."""

LENGTH_BYTES = 8
_CACHED_PLACEMENTS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """The byte map of one payload.

    Attributes:
        lengths: actual leading length of each varlen field, in order.
        offsets: each field's first byte.
        shapes: each field's actual shape.
        dtypes: each field's dtype.
        nbytes: size of the payload.
    """

    lengths: tuple[int, ...]
    offsets: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[DType, ...]
    nbytes: int


class Placer(Protocol):
    """Lengths in, placement out; the lengths must have been checked against the maxima."""

    def __call__(self, lengths: tuple[int, ...], /) -> Placement:
        """The byte map for these lengths of the varlen fields."""


def make_placer(specs: Sequence[TensorSpec]) -> Placer:
    """A function from actual lengths to a `Placement`, remembering the last 256.

    A placement costs about 2 µs for 8 fields, a remembered one 0.1: trajectories that end early have many lengths, so
    both count.
    """
    fields = tuple(specs)
    dtypes = tuple(spec.dtype for spec in fields)
    table_bytes = _aligned(LENGTH_BYTES * sum(spec.varlen for spec in fields))
    # (varlen?, bytes of a row or of the whole field, the fixed part of the shape)
    plan = tuple(
        (True, prod(spec.shape[1:]) * spec.dtype.itemsize, spec.shape[1:])
        if spec.varlen
        else (False, spec.nbytes, spec.shape)
        for spec in fields
    )

    def place(lengths: tuple[int, ...], /) -> Placement:
        remaining = iter(lengths)
        offsets, shapes = [], []
        end = table_bytes
        for varlen, fixed_bytes, fixed_shape in plan:
            offset = (end + ALIGNMENT_BYTES - 1) & -ALIGNMENT_BYTES
            offsets.append(offset)
            if varlen:
                length = next(remaining)
                shapes.append((length, *fixed_shape))
                end = offset + length * fixed_bytes
            else:
                shapes.append(fixed_shape)
                end = offset + fixed_bytes
        return Placement(
            lengths=lengths,
            offsets=tuple(offsets),
            shapes=tuple(shapes),
            dtypes=dtypes,
            nbytes=end,
        )

    return lru_cache(maxsize=_CACHED_PLACEMENTS)(place)


def _aligned(nbytes: int) -> int:
    return (nbytes + ALIGNMENT_BYTES - 1) & -ALIGNMENT_BYTES


def byte_view(buffer: Memory, *, writable: bool) -> memoryview:
    """The memory of `buffer` as plain bytes, writable or not writable as asked.

    Raises:
        ConfigError: not a contiguous buffer, or read-only where writable was asked for.
    """
    try:
        memory = memoryview(buffer)  # type: ignore[arg-type]  # an array is one, to type checkers too from 3.12 on
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
    """The table of lengths that a writer left, unchecked, each once read; a ProtocolError for a shorter payload."""
    if len(memory) < count * LENGTH_BYTES:
        raise ProtocolError(
            f"a payload of {len(memory)} bytes ends within its table of {count} lengths", nbytes=len(memory)
        )
    return struct.unpack_from(f"<{count}Q", memory)
