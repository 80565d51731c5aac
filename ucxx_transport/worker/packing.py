"""TrajectoryPacker: trajectories into a ring's slots, each field straight to its place.

A trajectory whose leaves are all in host memory is written by the ring as it is, but for a copy of what is narrowed.

| a leaf on a GPU           | is                                                                                       |
|---------------------------|------------------------------------------------------------------------------------------|
| before a slot is touched  | adopted: shape and dtype without a copy, the current stream ordered after its producer   |
|                           | of another dtype than its field: copied to the host, and a host leaf from then on        |
|                           | given memory to be copied to: the ring's mapping is page-locked, once                    |
| into the slot             | one copy begun, of contiguous bytes; host leaves are copied at the same time             |
| before commit or abort    | waited for, once a device: nothing is copied into a slot that another holder has         |

A field that may be narrowed takes a wider float, rounded to the nearest, and a wider integer that is the same number
there. What overflows, does not fit or is of another kind is refused.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from ucxx_transport.errors import ConfigError, nearest_remedy
from ucxx_transport.gpu import RuntimeFinder, on_host, runtime_of
from ucxx_transport.gpu.runtime import DeviceArray
from ucxx_transport.logs import get_logger
from ucxx_transport.ring import SharedRingBuffer
from ucxx_transport.schema import Schema, SlotRef, TensorSpec
from ucxx_transport.schema.episode_record import RewardSummary
from ucxx_transport.schema.fields import DTYPES, DType, casts_exactly, flatten, listed
from ucxx_transport.schema.tensors import Array, DeviceArrayError, as_array, copy_fields, is_on_device, too_narrow
from ucxx_transport.schema.wire_form import describe, misfit

_log = get_logger(__name__)


@lru_cache(maxsize=256)
def _stand_in(shape: tuple[int, ...], dtype: DType) -> Array:
    """An array of that shape and dtype for what looks at no more; without bytes of its own, whatever its shape."""
    return np.broadcast_to(np.zeros((), dtype), shape)


def without_devices(trajectory: Mapping[str, object], runtimes: RuntimeFinder = runtime_of) -> dict[str, object]:
    """Leaves by path, those on a GPU stood in for, for a schema; a ConfigError where one cannot be a payload."""
    leaves = flatten(trajectory)
    for name, leaf in leaves.items():
        if is_on_device(leaf):
            array = runtimes(leaf, name).adopt(leaf, name)
            leaves[name] = _stand_in(array.shape, array.dtype)
    return leaves


@dataclass(eq=False, repr=False)
class TrajectoryPacker:
    """Writes trajectories of one schema into one ring. Thread-safe. Close it before the ring.

    A ConfigError: `narrow`, the fields whose values may lose precision, or `reward`, the one that `rewards_in` sums up,
    names no field of the schema.
    """

    ring: SharedRingBuffer
    schema: Schema
    narrow: Iterable[str] = ()
    reward: str | None = None
    runtimes: RuntimeFinder = runtime_of
    _warned: set[str] = field(default_factory=set, init=False)
    _meets_devices: bool = field(default=False, init=False)
    # One at a time: a GPU copies one thing at a time to the host, and the ring must not be unlocked under a copy.
    _copying: threading.Lock = field(default_factory=threading.Lock, init=False)
    _unlock: Callable[[], object] | None = field(default=None, init=False)
    _closed: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self._may_narrow, offsets = frozenset(self.narrow), self.schema.offsets
        for keyword, name in (*(("narrow", name) for name in sorted(self._may_narrow)), ("reward", self.reward)):
            if name is not None and name not in offsets:
                remedy = nearest_remedy(name, offsets) or f"its fields are {listed([*offsets])}"
                text = f"{keyword} names {describe(name)}, which is no field of the schema; {remedy}"
                raise ConfigError(text, field=keyword)

    def write(self, trajectory: Mapping[str, object], **options: Any) -> SlotRef:
        """Write one trajectory; options and errors as `SharedRingBuffer.write`."""
        if not self._may_narrow and not self._meets_devices:
            try:
                return self.ring.write(trajectory, **options)
            except DeviceArrayError:  # before a slot was touched
                self._meets_devices = True
        schema = self.schema
        leaves = schema.gather(trajectory)
        devices = self._set_apart(leaves)
        tree = schema.nest(leaves)
        if not devices:
            return self.ring.write(tree, **options)
        arrays, placement = schema.arrange(tree)
        self._lock_pages(next(iter(devices.values())))
        lengths = dict(zip(schema.varlen, placement.lengths, strict=True))
        with self.ring.reserve(lengths=lengths, **options) as lease:
            targets = schema.gather(lease.arrays)
            with self._copies(devices, targets):
                rest = [index for index in range(len(arrays)) if index not in devices]
                copy_fields([targets[index] for index in rest], [arrays[index] for index in rest])
        return lease.ref

    def rewards_in(self, trajectory: object) -> tuple[int | None, RewardSummary | None]:
        """How many steps a trajectory has, and a summary of their rewards where these are finite numbers."""
        if (name := self.reward) is None:
            return None, None
        leaf = trajectory.get(name) if isinstance(trajectory, Mapping) else None
        if leaf is None:  # nested, or missing: then writing says so
            leaf = flatten(trajectory).get(name, ())
        rewards = on_host(leaf, name, self.runtimes)
        length = rewards.shape[0] if rewards.ndim else 1
        if rewards.dtype.name not in DTYPES or rewards.dtype.kind == "c":  # refused by the write, or without order
            return length, None
        with np.errstate(all="ignore"):
            values = np.asarray(rewards, np.float64)
            total = float(values.sum())
        if values.size == 0 or not np.isfinite(total):  # as it is not where one of them is not
            return length, None
        least, most = float(values.min()), float(values.max())
        return length, RewardSummary(total=total, mean=total / values.size, least=least, most=most)

    def close(self) -> None:
        """Wait for the copies under way, and let the ring's memory be unmapped. Idempotent."""
        with self._copying:
            self._closed = True
            if self._unlock is not None:
                self._unlock()

    def _set_apart(self, leaves: list[Any]) -> dict[int, DeviceArray]:
        """Those of `leaves` on a GPU, by position, stood in for until they have a place; others narrowed if need be."""
        devices: dict[int, DeviceArray] = {}
        for index, spec in enumerate(self.schema.fields):
            leaf = leaves[index]
            if type(leaf) is not np.ndarray and is_on_device(leaf):
                array = self.runtimes(leaf, spec.name).adopt(leaf, spec.name)
                is_converted = spec.name in self._may_narrow or casts_exactly(array.dtype, spec.dtype)
                if array.dtype is spec.dtype or not is_converted:  # which the check of the fields refuses
                    devices[index] = array
                    leaves[index] = _stand_in(array.shape, array.dtype)
                    continue
                leaf = leaves[index] = array.runtime.to_host(array)
            if spec.name in self._may_narrow:
                given = as_array(leaf, spec.name)
                if given.dtype is not spec.dtype and not casts_exactly(given.dtype, spec.dtype):
                    leaves[index] = self._narrowed(given, spec)
        return devices

    def _narrowed(self, values: Array, field: TensorSpec) -> Array:
        """`values` in the field's dtype: integers as they are, floats rounded to the nearest; the first are logged."""
        given, stored = values.dtype, field.dtype
        are_integers = given.kind in "iu" and stored.kind in "iu"
        if not are_integers and not ("float" in given.name and "float" in stored.name):
            raise too_narrow(given, field)
        with np.errstate(all="ignore"):
            narrowed = values.astype(stored)
        fits = narrowed == values if are_integers else np.isfinite(narrowed) | ~np.isfinite(values)
        if not fits.all():
            text = f"a value of {given.name} does not fit {stored.name}; give the field {given.name} by schema="
            raise misfit(field.name, text)
        if field.name not in self._warned:
            self._warned.add(field.name)
            _log.warning("values_narrowed", field=field.name, given=given.name, stored=stored.name)
        return narrowed

    def _lock_pages(self, array: DeviceArray) -> None:
        """Page-lock the ring's memory for copies from the device of `array`, unless it is, or raise a PageLockError."""
        with self._copying:
            self._require_open()
            if self._unlock is None:
                self._unlock = array.runtime.page_lock(
                    self.ring.mapping, array.device, what="a ring", remedy="lower ring.slots or the size of a slot"
                )

    @contextmanager
    def _copies(self, taken: Mapping[int, DeviceArray], targets: Sequence[Array]) -> Iterator[None]:
        """Copies of what was taken, to its places in a slot: begun here, over when the block is left, however it is."""
        with self._copying, ExitStack() as waits:
            self._require_open()
            # noted before they begin: a copy that raises may have begun
            for device, runtime in {(array.device, array.runtime): None for array in taken.values()}:
                waits.callback(runtime.wait, device)
            for index, array in taken.items():
                array.runtime.copy_to_host(array, targets[index])
            yield

    def _require_open(self) -> None:
        if self._closed:
            raise ConfigError("the writer is closed; make another")
