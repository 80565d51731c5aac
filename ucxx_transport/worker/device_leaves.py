"""DeviceLeaves: leaves of a trajectory on a GPU, with stand-ins for checks, copied straight into the slot.

| step                      | a leaf on a GPU                                                                          |
|---------------------------|------------------------------------------------------------------------------------------|
| before a slot is touched  | adopted: shape and dtype without a copy, the current stream ordered after its producer   |
|                           | converted on the device where its field's dtype is another, refused as on the host       |
|                           | the ring's mapping page-locked, once                                                     |
| into the slot             | one copy begun, of contiguous bytes; host leaves are copied at the same time             |
| before commit or abort    | waited for, once a device: nothing is copied into a slot that another holder has         |
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from ucxx_transport.errors import ConfigError
from ucxx_transport.gpu import DeviceArray, RuntimeFinder, page_lock, runtime_of
from ucxx_transport.schema.dtypes import DType, casts_exactly
from ucxx_transport.schema.tensors import Array, is_on_device
from ucxx_transport.schema.tree import flatten
from ucxx_transport.worker.narrowing import refuse_what_does_not_fit, too_large

if TYPE_CHECKING:
    from ucxx_transport.gpu import LeafRuntime
    from ucxx_transport.ring import SharedRingBuffer
    from ucxx_transport.schema import TensorSpec


@lru_cache(maxsize=256)
def stand_in(shape: tuple[int, ...], dtype: DType) -> Array:
    """An array of that shape and dtype for what looks at no more; without bytes of its own, whatever its shape."""
    return np.broadcast_to(np.zeros((), dtype), shape)


def without_devices(trajectory: Mapping[str, object], runtimes: RuntimeFinder = runtime_of) -> dict[str, object]:
    """Leaves by path, those on a GPU stood in for, for a schema; a ConfigError where one cannot be a payload."""
    leaves = flatten(trajectory)
    for name, leaf in leaves.items():
        if is_on_device(leaf):
            array = runtimes(leaf, name).adopt(leaf, name)
            leaves[name] = stand_in(array.shape, array.dtype)
    return leaves


class DeviceLeaves:
    """Takes leaves off GPUs into the slots of one ring, whose memory it page-locks at the first. Thread-safe."""

    def __init__(self, ring: SharedRingBuffer, runtimes: RuntimeFinder = runtime_of) -> None:
        self._ring = ring
        self._runtimes = runtimes
        # One at a time: a GPU copies one thing at a time to the host, and the ring must not be unlocked under a copy.
        self._copying = threading.Lock()
        self._unlock: Callable[[], object] | None = None
        self._closed = False

    def take(
        self,
        leaves: list[Any],
        fields: Sequence[TensorSpec],
        may_narrow: frozenset[str],
        warn: Callable[[DType, TensorSpec], None],
    ) -> dict[int, DeviceArray]:
        """Those of `leaves` that are on a GPU, by position, each ready for its field; stood in for in `leaves`.

        A leaf whose dtype its field cannot have stays as it is: its stand-in fails the check of the fields. `warn` is
        called with a dtype and the field that it is narrowed for.

        Raises:
            ConfigError: a leaf cannot be taken, or a value does not fit its field; the message names the field.
        """
        taken: dict[int, DeviceArray] = {}
        for index, field in enumerate(fields):
            leaf = leaves[index]
            if type(leaf) is np.ndarray or not is_on_device(leaf):
                continue
            array = self._runtimes(leaf, field.name).adopt(leaf, field.name)
            if array.dtype is not field.dtype:
                if casts_exactly(array.dtype, field.dtype):
                    array = array.runtime.converted(array, field.dtype, field.name)
                elif field.name in may_narrow:
                    array = _narrowed(array, field, warn)
            taken[index] = array
            leaves[index] = stand_in(array.shape, array.dtype)
        return taken

    @contextmanager
    def copying(self, taken: Mapping[int, DeviceArray], targets: Sequence[Array]) -> Iterator[None]:
        """Copies of what was taken, to its places in a slot: begun here, over when the block is left, however it is."""
        with self._copying:
            self._require_open()
            # noted before they begin: a copy that raises may have begun
            sources = {(array.device, type(array.runtime)): array.runtime for array in taken.values()}
            try:
                for index, array in taken.items():
                    array.runtime.copy_to_host(array, targets[index])
                yield
            finally:
                _wait_for(sources)

    def lock_pages(self, array: DeviceArray) -> None:
        """Page-lock the ring's memory for copies from the device of `array`, unless it is, or raise a PageLockError."""
        with self._copying:
            self._require_open()
            if self._unlock is None:
                self._unlock = page_lock(
                    self._ring.mapping,
                    array.runtime.page_locking(array.device),
                    what="a ring",
                    remedy="lower ring.slots or the size of a slot",
                )

    def close(self) -> None:
        """Wait for the copies under way, and unlock the ring's memory. Idempotent."""
        with self._copying:
            self._closed = True
            if self._unlock is not None:
                self._unlock()

    def _require_open(self) -> None:
        if self._closed:
            raise ConfigError("the writer is closed; make another")


def _narrowed(array: DeviceArray, field: TensorSpec, warn: Callable[[DType, TensorSpec], None]) -> DeviceArray:
    runtime = array.runtime
    refuse_what_does_not_fit(array.dtype, field, lambda: runtime.bounds(array))
    warn(array.dtype, field)
    narrow = runtime.converted(array, field.dtype, field.name)
    if array.dtype.kind not in "iu" and runtime.overflowed(array, narrow):
        raise too_large(array.dtype, field)
    return narrow


def _wait_for(sources: Mapping[tuple[int, type], LeafRuntime]) -> None:
    """Wait for the copies from each device, for the others too where one raises."""
    waiting = iter(sources.items())
    for (device, _), runtime in waiting:
        try:
            runtime.wait(device)
        except BaseException:
            _wait_for(dict(waiting))
            raise
