"""Trajectories into a ring's slots, each field straight to its place, narrowed only where that was asked for.

| given to a field that may be narrowed | becomes                                                           |
|---------------------------------------|-------------------------------------------------------------------|
| a dtype that keeps its values there   | copied as it is                                                   |
| a wider float                         | rounded to the nearest; one that overflows is refused             |
| a wider integer                       | the same number; one that does not fit is refused                 |
| another kind (a float to an integer)  | refused: convert it first                                         |
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import structlog

from ucxx_transport.errors import ConfigError
from ucxx_transport.schema.dtypes import casts_exactly
from ucxx_transport.schema.tensors import Array, as_array

if TYPE_CHECKING:
    from ucxx_transport.ring import SharedRingBuffer
    from ucxx_transport.schema import Schema, SlotRef, TensorSpec

_log = structlog.get_logger(__name__)


class TrajectoryPacker:
    """Writes trajectories of one schema into one ring.

    Args:
        ring: made for `schema`.
        schema: the fields.
        narrow: names of the fields whose values may lose precision on the way in; each is warned of once.

    Raises:
        ConfigError: `narrow` names no field of the schema.
    """

    def __init__(self, ring: SharedRingBuffer, schema: Schema, narrow: Iterable[str] = ()) -> None:
        self._ring = ring
        self._schema = schema
        wanted = frozenset(narrow)
        unknown = sorted(wanted - {field.name for field in schema})
        if unknown:
            raise ConfigError(f"narrow names {unknown[0]!r}, which is no field of the schema", field="narrow")
        self._narrow = [(index, field) for index, field in enumerate(schema) if field.name in wanted]
        self._warned: set[str] = set()

    def write(
        self,
        trajectory: Mapping[str, object],
        *,
        readers: int | None = None,
        meta: Mapping[str, object] | None = None,
        deadline_s: float | None = None,
    ) -> SlotRef:
        """Write one trajectory; arguments and errors as `SharedRingBuffer.write`."""
        if not self._narrow:
            return self._ring.write(trajectory, readers=readers, meta=meta, deadline_s=deadline_s)
        leaves = self._schema.gather(trajectory)
        wide: dict[int, Array] = {}
        for index, field in self._narrow:
            array = as_array(leaves[index], field.name)
            if array.dtype is not field.dtype and not casts_exactly(array.dtype, field.dtype):
                _refuse_what_does_not_fit(array, field)
                self._warn(array, field)
                wide[index] = array
                # stands for the field until its place is known: no bytes of its own, whatever its shape
                leaves[index] = np.broadcast_to(np.zeros((), field.dtype), array.shape)
        tree = self._schema.nest(leaves)
        if not wide:
            return self._ring.write(tree, readers=readers, meta=meta, deadline_s=deadline_s)
        arrays, _ = self._schema.arrange(tree)
        lengths = self._schema.lengths_of(tree)
        with self._ring.reserve(lengths=lengths, readers=readers, meta=meta, deadline_s=deadline_s) as lease:
            targets = self._schema.gather(lease.arrays)
            for index, (target, array) in enumerate(zip(targets, arrays, strict=True)):
                _fill(target, wide.get(index, array), self._schema.fields[index])
        return lease.ref

    def _warn(self, array: Array, field: TensorSpec) -> None:
        if field.name not in self._warned:
            self._warned.add(field.name)
            _log.warning("values are narrowed", field=field.name, given=array.dtype.name, stored=field.dtype.name)


def _fill(target: Any, source: Array, field: TensorSpec) -> None:
    too_large = False
    try:
        with np.errstate(all="ignore", over="raise"):
            np.copyto(target, source, casting="unsafe")
    except FloatingPointError:
        too_large = True
    if target.dtype.kind not in "biufc" or target.dtype.name.startswith(("bfloat16", "float8")):
        too_large = not np.array_equal(np.isfinite(target), np.isfinite(source))  # those of ml_dtypes raise no flag
    if too_large:
        raise ConfigError(
            f"field {field.name!r}: a value of {source.dtype.name} is too large for {field.dtype.name}; "
            "scale it, or give the schema the other dtype",
            field=field.name,
        )


def _refuse_what_does_not_fit(array: Array, field: TensorSpec) -> None:
    given, stored = array.dtype, field.dtype
    if given.kind in "iu" and stored.kind in "iu":
        bounds = np.iinfo(stored)
        if array.size and not (int(array.min()) >= bounds.min and int(array.max()) <= bounds.max):
            raise ConfigError(
                f"field {field.name!r}: a value of {given.name} does not fit {stored.name}; "
                "give the schema the other dtype",
                field=field.name,
            )
    elif not (_is_float(given.name) and _is_float(stored.name)):
        raise ConfigError(
            f"field {field.name!r}: {given.name} is not narrowed to {stored.name}, which is of another kind; "
            f"convert it first (array.astype({stored.name!r})) or give the schema the other dtype",
            field=field.name,
        )


def _is_float(name: str) -> bool:
    return "float" in name
