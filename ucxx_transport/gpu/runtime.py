"""CUDA as far as the transport needs it: page-locked memory, what torch's and cupy's ends must do, what both do alike.

Memory that is unmapped while it is registered would leave CUDA with pages of another owner. So the array that stands
for it is watched: its finaliser runs before the memory under it is given back.
"""

from __future__ import annotations

import os
import resource
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from importlib import import_module
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from ucxx_transport.errors import ConfigError
from ucxx_transport.logs import get_logger
from ucxx_transport.schema.fields import DType
from ucxx_transport.schema.tensors import Array
from ucxx_transport.schema.wire_form import describe

_log = get_logger(__name__)

Bytes = npt.NDArray[np.uint8]

_SUCCESS, _CUDART_UNLOADING, _ALREADY_REGISTERED, _NOT_REGISTERED = 0, 4, 712, 713
_NOTHING_LEFT_TO_DO: Final = frozenset({_SUCCESS, _CUDART_UNLOADING, _NOT_REGISTERED})
"""Of `cudaError_t`, <driver_types.h>: `cudaErrorCudartUnloading`, `cudaErrorHostMemory(Already|Not)Registered`."""

_PORTABLE: Final = 1  # `cudaHostRegisterPortable`, <driver_types.h>

_INSTALL: Final = {
    "torch": "pip install 'ucxx_transport[torch]'",
    "cupy": "pip install 'ucxx_transport[cu12]' (or '[cu13]', by the CUDA of the driver)",
}


def import_library(name: str, device: str) -> Any:
    """The module; a ConfigError where it is not installed, or cannot be loaded here."""
    try:
        return import_module(name)
    except ImportError as exc:
        words = f"device={device!r} needs {name}: {_INSTALL[name]}, or leave device out for numpy arrays ({exc})"
        raise ConfigError(words, field="device") from exc


class PageLockError(ConfigError):
    """Memory could not be page-locked for CUDA; no slow copy takes its place. The message says why and what to do."""


class DeviceArray(NamedTuple):
    """An array on a GPU; a tuple since one is made of each leaf, which a frozen dataclass takes 3 µs for."""

    runtime: Runtime
    array: Any  # its library's own object, which keeps the memory
    shape: tuple[int, ...]  # as a field has it
    dtype: DType  # likewise
    device: int


class Runtime(ABC):
    """CUDA by way of one `library`. Copies to the host are ordered by the calling thread's current streams."""

    remedy = ""  # what else helps where it cannot take an array

    def __init__(self, library: Any) -> None:
        self.library = library

    @abstractmethod
    def call(self, device: int, function: str, *arguments: int) -> int:
        """The status of a function of CUDA's, called in the context of that device: any other would be given one."""

    @abstractmethod
    def error_words(self, status: int) -> str:
        """CUDA's words for a status."""

    def page_lock(self, memory: Bytes, device: int, *, what: str, remedy: str) -> Callable[[], object]:
        """Lock the pages of `memory`, for copies to and from `device`, for as long as this very array lives.

        It is contiguous and of a base that has the memory: not a view that is dropped before the memory is. Returned is
        what unlocks it before: unregisters the memory, if this call registered it and it still is. Idempotent.
        A PageLockError: CUDA refuses; it calls the memory `what`, and `remedy` is what makes it smaller.
        """
        address: int = memory.__array_interface__["data"][0]
        status = self.call(device, "HostRegister", address, memory.nbytes, _PORTABLE)
        if status == _ALREADY_REGISTERED:  # by another owner, which unregisters it
            return lambda: None
        if status != _SUCCESS:
            raise PageLockError(
                f"{what} of {memory.nbytes} bytes cannot be page-locked for CUDA: {self.error_words(status)}. Allow "
                f"the process more locked memory ({_limit()}; docker: --ulimit memlock=-1) and the container more "
                f"memory, or {remedy}",
                field="device",
                status=status,
                needed_bytes=memory.nbytes,
            )
        # its base as well, for as long: numpy 2.5 releases that, and so unmaps a ring, before it calls
        return weakref.finalize(memory, self._unregister, device, address, os.getpid(), memory.base)

    def _unregister(self, device: int, address: int, pid: int, _base: object) -> None:
        if os.getpid() != pid:
            return  # a forked child's copy: the registration is its parent's
        status = self.call(device, "HostUnregister", address)
        if status not in _NOTHING_LEFT_TO_DO:
            _log.warning("page_unlock_failed", status=status, reason=self.error_words(status))

    def adopt(self, leaf: object, field: str) -> DeviceArray:
        """A leaf as an array of this library, without a copy, for the current stream; a ConfigError: there is none."""
        try:
            array, dtype, device = self.seen(leaf, field)
        except ConfigError:
            raise
        except (TypeError, ValueError, RuntimeError, BufferError, AttributeError) as exc:
            raise ConfigError(
                f"field {field!r}: {self.library.__name__} cannot take {describe(leaf)} from its GPU "
                f"({type(exc).__name__}: {exc}); copy it to the host first{self.remedy}",
                field=field,
            ) from exc
        return DeviceArray(runtime=self, array=array, shape=tuple(array.shape), dtype=dtype, device=device)

    @abstractmethod
    def seen(self, leaf: Any, field: str) -> tuple[Any, DType, int]:
        """The library's own array over a leaf's memory, its dtype as a field has it (or a ConfigError), its device."""

    @abstractmethod
    def copy_to_host(self, array: DeviceArray, target: Array) -> None:
        """Begin a copy, made contiguous on the device if need be, to page-locked memory of its shape and dtype."""

    @abstractmethod
    def wait(self, device: int) -> None:
        """Wait until the copies that this thread began from `device` have ended."""

    @abstractmethod
    def to_host(self, array: DeviceArray) -> Array:
        """A copy in ordinary memory, which is waited for."""


class Upload(NamedTuple):
    """A payload's bytes on a device, or on their way there. Dropped, its memory is used again only in its turn."""

    done: Callable[[], bool]  # whether the copy has ended: its source may be used again
    wait: Callable[[], object]  # on the host until it has
    ready: Callable[[], object]  # lets the thread's current stream wait for the copy, and the memory for that stream
    view: Callable[[int, tuple[int, ...], DType], Any]
    """An array of that shape and dtype over the bytes from an offset on; a ConfigError: no such dtype there."""


class Receiver(ABC):
    """Takes payloads to one GPU. Thread-safe."""

    runtime: Runtime  # which locks the memory that payloads are copied from
    device: int  # the GPU's number
    name: str  # as `device=` has it
    out_of_memory: type[Exception]  # what `begin` raises where the GPU has no memory for a payload

    def upload(self, source: Bytes) -> Upload:
        """`begin`; a ConfigError: the GPU has no memory for it."""
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
        """Begin one copy of all of `source`, which must stay as it is until the copy is done; does not wait for it."""


def check_index(device: str, index: int | None, count: int, current: Callable[[], int]) -> int:
    """The number of the GPU that `device` names, `current()` where `index` is None; a ConfigError: there is none."""
    if index is None:
        return current()
    if index >= count:
        raise ConfigError(
            f"device={device!r}: this process has {count} GPU{'s' if count > 1 else ''} (CUDA_VISIBLE_DEVICES says "
            f"which); the number must be below {count}",
            field="device",
        )
    return index


def _limit() -> str:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return "ulimit -l is unlimited" if soft == resource.RLIM_INFINITY else f"ulimit -l is {soft >> 10} KiB"
