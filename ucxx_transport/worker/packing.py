"""TrajectoryPacker: trajectories into a ring's slots, each field straight to its place, narrowed only where asked for.

What may be narrowed is the table of `narrowing`; what becomes of leaves on a GPU that of `device_leaves`. Neither looks
at a trajectory whose leaves are all in host memory and of which nothing is narrowed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ucxx_transport.errors import ConfigError
from ucxx_transport.gpu import DeviceArray, RuntimeFinder, runtime_of
from ucxx_transport.logs import get_logger
from ucxx_transport.schema.dtypes import DType, casts_exactly
from ucxx_transport.schema.tensors import Array, DeviceArrayError, as_array
from ucxx_transport.worker.device_leaves import DeviceLeaves, stand_in
from ucxx_transport.worker.narrowing import refuse_what_does_not_fit, too_large

if TYPE_CHECKING:
    from ucxx_transport.ring import SharedRingBuffer
    from ucxx_transport.schema import Schema, SlotRef, TensorSpec

_log = get_logger(__name__)


class TrajectoryPacker:
    """Writes trajectories of one schema into one ring. Close it before the ring.

    Raises:
        ConfigError: `narrow`, the fields whose values may lose precision, names no field of the schema.
    """

    def __init__(
        self,
        ring: SharedRingBuffer,
        schema: Schema,
        narrow: Iterable[str] = (),
        *,
        runtimes: RuntimeFinder = runtime_of,
    ) -> None:
        self._ring = ring
        self._schema = schema
        self._may_narrow = frozenset(narrow)
        unknown = sorted(self._may_narrow - {field.name for field in schema})
        if unknown:
            raise ConfigError(f"narrow names {unknown[0]!r}, which is no field of the schema", field="narrow")
        self._narrow = [(index, field) for index, field in enumerate(schema) if field.name in self._may_narrow]
        self._warned: set[str] = set()
        self._devices = DeviceLeaves(ring, runtimes)
        self._meets_devices = False

    def write(self, trajectory: Mapping[str, object], **options: Any) -> SlotRef:
        """Write one trajectory; options and errors as `SharedRingBuffer.write`."""
        if not self._meets_devices:
            try:
                if not self._narrow:
                    return self._ring.write(trajectory, **options)
                return self._write_leaf_by_leaf(self._schema.gather(trajectory), {}, **options)
            except DeviceArrayError:  # before a slot was touched
                self._meets_devices = True
        leaves = self._schema.gather(trajectory)
        taken = self._devices.take(leaves, self._schema.fields, self._may_narrow, self._warn)
        return self._write_leaf_by_leaf(leaves, taken, **options)

    def close(self) -> None:
        """Wait for the copies under way, and let the ring's memory be unmapped. Idempotent."""
        self._devices.close()

    def _write_leaf_by_leaf(self, leaves: list[Any], taken: dict[int, DeviceArray], **options: Any) -> SlotRef:
        wide = self._take_wide(leaves, taken)
        tree = self._schema.nest(leaves)
        if not wide and not taken:
            return self._ring.write(tree, **options)
        arrays, placement = self._schema.arrange(tree)
        lengths = dict(zip(self._schema.varlen, placement.lengths, strict=True))
        if taken:
            self._devices.lock_pages(next(iter(taken.values())))
        with self._ring.reserve(lengths=lengths, **options) as lease:
            targets = self._schema.gather(lease.arrays)
            with self._devices.copying(taken, targets) if taken else nullcontext():
                for index, (target, array) in enumerate(zip(targets, arrays, strict=True)):
                    if index not in taken:
                        _fill(target, wide.get(index, array), self._schema.fields[index])
        return lease.ref

    def _take_wide(self, leaves: list[Any], taken: Mapping[int, DeviceArray]) -> dict[int, Array]:
        """The host leaves that lose precision, by position; stood in for in `leaves` until their place is known."""
        wide: dict[int, Array] = {}
        for index, field in self._narrow:
            if index in taken:
                continue
            array = as_array(leaves[index], field.name)
            if array.dtype is not field.dtype and not casts_exactly(array.dtype, field.dtype):
                refuse_what_does_not_fit(array.dtype, field, partial(_bounds, array))
                self._warn(array.dtype, field)
                wide[index] = array
                leaves[index] = stand_in(array.shape, field.dtype)
        return wide

    def _warn(self, given: DType, field: TensorSpec) -> None:
        if field.name not in self._warned:
            self._warned.add(field.name)
            _log.warning("values_narrowed", field=field.name, given=given.name, stored=field.dtype.name)


def _fill(target: Any, source: Array, field: TensorSpec) -> None:
    overflowed = False
    try:
        with np.errstate(all="ignore", over="raise"):
            np.copyto(target, source, casting="unsafe")
    except FloatingPointError:
        overflowed = True
    if target.dtype.kind not in "biufc" or target.dtype.name.startswith(("bfloat16", "float8")):
        overflowed = not np.array_equal(np.isfinite(target), np.isfinite(source))  # those of ml_dtypes raise no flag
    if overflowed:
        raise too_large(source.dtype, field)


def _bounds(array: Array) -> tuple[int, int] | None:
    return (int(array.min()), int(array.max())) if array.size else None
