"""CUDA as far as the transport needs it: what torch's and cupy's ends must do, and what both do alike."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from ucxx_transport.errors import ConfigError
from ucxx_transport.gpu.page_lock import Bytes, PageLocking
from ucxx_transport.schema.wire_form import describe

if TYPE_CHECKING:
    from collections.abc import Callable

    from ucxx_transport.schema.dtypes import DType
    from ucxx_transport.schema.tensors import Array


class DeviceArray(NamedTuple):
    """An array on a GPU, of shape and dtype as a field has them: its library's own object, which keeps the memory.

    A tuple since one is made of each leaf, which a frozen dataclass takes 3 µs for.
    """

    runtime: LeafRuntime
    array: Any
    shape: tuple[int, ...]
    dtype: DType
    device: int


class LeafRuntime(ABC):
    """Takes arrays on GPUs to the host. Everything is ordered by the calling thread's current streams.

    Attributes:
        library: torch, or cupy.
        remedy: what else helps where it cannot take an array.
    """

    library: Any
    remedy = ""

    def adopt(self, leaf: object, field: str) -> DeviceArray:
        """A leaf as an array of this library, without a copy; the current stream waits for who produces it.

        Raises:
            ConfigError: no array of this library, or of a dtype that cannot be a payload; the message names the field.
        """
        try:
            array = self.seen(leaf)
        except (TypeError, ValueError, RuntimeError, BufferError, AttributeError) as exc:
            raise ConfigError(
                f"field {field!r}: {self.library.__name__} cannot take {describe(leaf)} from its GPU "
                f"({type(exc).__name__}: {exc}); copy it to the host first{self.remedy}",
                field=field,
            ) from exc
        dtype, device = self.dtype_and_device(array, field)
        return DeviceArray(runtime=self, array=array, shape=tuple(array.shape), dtype=dtype, device=device)

    @abstractmethod
    def seen(self, leaf: Any) -> Any:
        """The library's own array over the memory of a leaf."""

    @abstractmethod
    def dtype_and_device(self, array: Any, field: str) -> tuple[DType, int]:
        """The dtype that a field has, or a ConfigError, and the device's number."""

    @abstractmethod
    def converted(self, array: DeviceArray, dtype: DType, field: str) -> DeviceArray:
        """The array with its elements as `dtype`, rounded to the nearest, on its device; or a ConfigError."""

    @abstractmethod
    def bounds(self, array: DeviceArray) -> tuple[int, int] | None:
        """The least and the largest of an array of integers, None of none; waits for the device."""

    @abstractmethod
    def overflowed(self, wide: DeviceArray, narrow: DeviceArray) -> bool:
        """Whether an element that was finite is not any more; waits for the device."""

    @abstractmethod
    def copy_to_host(self, array: DeviceArray, target: Array) -> None:
        """Begin one copy to contiguous page-locked memory of the same shape and dtype; does not wait for it.

        What is not contiguous is made so on the device.
        """

    @abstractmethod
    def wait(self, device: int) -> None:
        """Wait until the copies that this thread began from `device` have ended."""

    @abstractmethod
    def to_host(self, array: DeviceArray) -> Array:
        """A copy in ordinary memory; for a few bytes."""

    @abstractmethod
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


class Receiver(ABC):
    """Takes payloads to one GPU. Thread-safe.

    Attributes:
        name: the device, as `device=` has it.
        out_of_memory: what `begin` raises where the GPU has no memory for a payload.
    """

    name: str
    out_of_memory: type[Exception]

    @abstractmethod
    def page_locking(self) -> PageLocking:
        """What locks the memory that payloads are copied from."""

    def upload(self, source: Bytes) -> Upload:
        """Begin one copy of all of `source`, which must stay as it is until the copy is done; does not wait for it.

        Raises:
            ConfigError: the GPU has no memory for it.
        """
        try:
            return self.begin(source)
        except self.out_of_memory as exc:
            raise ConfigError(
                f"{self.name} has no memory for a payload of {source.nbytes} bytes: fetch smaller batches, or leave "
                "the trainer less of it",
                field="device",
                nbytes=source.nbytes,
            ) from exc

    @abstractmethod
    def begin(self, source: Bytes) -> Upload:
        """See `upload`."""


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
