"""CUDA as Protocols, as far as the transport needs it: torch and cupy fulfil them, and so does a fake in tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from ucxx_transport.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from ucxx_transport.schema.dtypes import DType
    from ucxx_transport.schema.tensors import Array

Bytes = npt.NDArray[np.uint8]


class PageLocking(Protocol):
    """Page-locking for the copies of one device. Statuses are CUDA's numbers, 0 for success."""

    def host_register(self, address: int, nbytes: int) -> int:
        """`cudaHostRegister`, portable: for all devices of the process."""

    def host_unregister(self, address: int) -> int:
        """`cudaHostUnregister` of what begins at `address`."""

    def error_words(self, status: int) -> str:
        """CUDA's words for a status."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceArray:
    """An array on a GPU, of shape and dtype as a field has them: its library's own object, which keeps the memory."""

    runtime: LeafRuntime
    array: Any
    shape: tuple[int, ...]
    dtype: DType
    device: int


class LeafRuntime(Protocol):
    """Takes arrays on GPUs to the host. Everything is ordered by the calling thread's current streams."""

    def adopt(self, leaf: object, field: str) -> DeviceArray:
        """A leaf as an array of this library, without a copy; the current stream waits for who produces it.

        Raises:
            ConfigError: no array of this library, or of a dtype that cannot be a payload; the message names the field.
        """

    def converted(self, array: DeviceArray, dtype: DType, field: str) -> DeviceArray:
        """The array with its elements as `dtype`, rounded to the nearest, on its device; or a ConfigError."""

    def bounds(self, array: DeviceArray) -> tuple[int, int] | None:
        """The least and the largest of an array of integers, None of none; waits for the device."""

    def overflowed(self, wide: DeviceArray, narrow: DeviceArray) -> bool:
        """Whether an element that was finite is not any more; waits for the device."""

    def copy_to_host(self, array: DeviceArray, target: Array) -> None:
        """Begin one copy to contiguous page-locked memory of the same shape and dtype; does not wait for it.

        What is not contiguous is made so on the device.
        """

    def wait(self, device: int) -> None:
        """Wait until the copies that this thread began from `device` have ended."""

    def to_host(self, array: DeviceArray) -> Array:
        """A copy in ordinary memory; for a few bytes."""

    def page_locking(self, device: int) -> PageLocking:
        """What locks the memory that arrays of `device` are copied to."""


class Upload(Protocol):
    """A payload's bytes on a device, or on their way there. Dropped, its memory is used again only in its turn."""

    @property
    def done(self) -> bool:
        """Whether the copy has ended: its source may be used again."""

    def wait(self) -> None:
        """Wait on the host until it has."""

    def ready(self) -> None:
        """Let the calling thread's current stream wait for the copy, and the memory for that stream."""

    def view(self, offset: int, shape: tuple[int, ...], dtype: DType) -> Any:
        """An array over the bytes from `offset` on; a ConfigError where the library has no such dtype."""


@runtime_checkable
class Receiver(Protocol):
    """Takes payloads to one GPU. Thread-safe."""

    @property
    def name(self) -> str:
        """The device, as `device=` has it."""

    def page_locking(self) -> PageLocking:
        """What locks the buffers that payloads are copied from."""

    def upload(self, source: Bytes) -> Upload:
        """Begin one copy of all of `source`, which must stay as it is until the copy is done; does not wait for it.

        Raises:
            ConfigError: the GPU has no memory for it.
        """


def check_index(device: str, index: int | None, count: int, current: Callable[[], int]) -> int:
    """The number of the GPU that `device` names, `current()` where `index` is None.

    Raises:
        ConfigError: there is no such GPU among the `count` that there are.
    """
    if index is None:
        return current()
    if index >= count:
        raise ConfigError(
            f"device={device!r}: this process has {count} GPU{'s' if count > 1 else ''}, numbered from 0 "
            "(CUDA_VISIBLE_DEVICES says which)",
            field="device",
        )
    return index
