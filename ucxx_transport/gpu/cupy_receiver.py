"""Payloads as cupy arrays on a GPU.

cupy's pool gives memory back to the stream it was allocated on as soon as the last array over it goes, whatever still
reads it on another stream. torch has `record_stream` for that; here the memory of a payload is held back until events
have passed on the streams that its arrays were handed to:

| the payload's arrays are        | its memory is                                                                      |
|---------------------------------|------------------------------------------------------------------------------------|
| alive                           | theirs                                                                             |
| gone, never handed out          | free: whatever comes next on the receiver's stream comes after the copy            |
| gone, handed out to streams     | held: at the next upload an event is recorded on each; free when all have passed   |
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from typing import TYPE_CHECKING, Any, Final

from ucxx_transport.errors import ConfigError
from ucxx_transport.gpu.choosing import check_index
from ucxx_transport.gpu.cupy_runtime import CupyPageLocking, has_dtype, import_cupy

if TYPE_CHECKING:
    from ucxx_transport.gpu.runtime import Bytes, PageLocking, Upload
    from ucxx_transport.schema.dtypes import DType

_PER_THREAD_STREAM: Final = 2
"""`cudaStreamPerThread`: another stream in every thread that names it."""


class CupyReceiver:
    """See `Receiver`. Its copies go by one stream of its own, which no kernel of the trainer's holds up.

    Args:
        device: as the caller has it. index: the number in it, None for cupy's current device.

    Raises:
        ConfigError: cupy is not installed, or finds no such GPU.
    """

    def __init__(self, device: str, index: int | None) -> None:
        cupy = import_cupy(f"device={device!r}")
        runtime = cupy.cuda.runtime
        try:
            count = runtime.getDeviceCount()
        except runtime.CUDARuntimeError as exc:
            raise _no_gpu(device, cupy, str(exc)) from exc
        if not count:
            raise _no_gpu(device, cupy, "it counts none")
        self._cupy = cupy
        self._device = check_index(device, index, count, runtime.getDevice)
        with cupy.cuda.Device(self._device):
            self._stream = cupy.cuda.Stream(non_blocking=True)
        self._held = _HeldMemory(cupy)

    @property
    def name(self) -> str:
        """See `Receiver`."""
        return f"cupy:{self._device}"

    def page_locking(self) -> PageLocking:
        """See `Receiver`."""
        return CupyPageLocking(self._cupy, self._device)

    def upload(self, source: Bytes) -> Upload:
        """See `Receiver`."""
        cupy = self._cupy
        runtime = cupy.cuda.runtime
        with cupy.cuda.Device(self._device), self._stream:
            self._held.let_go()
            try:
                memory = cupy.cuda.alloc(max(1, source.nbytes))
            except cupy.cuda.memory.OutOfMemoryError as exc:
                raise ConfigError(
                    f"{self.name} has no memory for a payload of {source.nbytes} bytes: fetch smaller batches, or "
                    "leave the trainer less of it",
                    field="device",
                    nbytes=source.nbytes,
                ) from exc
            if source.nbytes:
                address = source.__array_interface__["data"][0]
                runtime.memcpyAsync(memory.ptr, address, source.nbytes, runtime.memcpyHostToDevice, self._stream.ptr)
            event = cupy.cuda.Event(disable_timing=True)
            event.record(self._stream)
            return _CupyUpload(cupy, self._device, self._held.lend(memory), source.nbytes, event)


class _Loan:
    """A payload's memory as its arrays hold it: they keep this object, and so the memory, whatever else has gone."""

    __slots__ = ("__weakref__", "memory", "streams")

    def __init__(self, memory: Any) -> None:
        self.memory = memory
        self.streams: list[Any] = []


class _Guard(weakref.ref[_Loan]):
    """What outlives a loan: the memory, and the streams that it was handed to."""

    __slots__ = ("memory", "streams")
    memory: Any
    streams: list[Any]


class _HeldMemory:
    """Memory whose arrays are gone and which a stream may still read. Thread-safe.

    Args:
        cupy: the module.
    """

    def __init__(self, cupy: Any) -> None:
        self._cupy = cupy
        self._lock = threading.Lock()
        self._guards: set[_Guard] = set()
        # A loan may end in any thread, inside any lock: its callback only appends here, which is atomic.
        self._returned: deque[_Guard] = deque()
        self._waiting: list[tuple[Any, list[Any]]] = []

    def lend(self, memory: Any) -> _Loan:
        """A loan of `memory`, a `MemoryPointer`."""
        loan = _Loan(memory)
        guard = _Guard(loan, self._returned.append)
        guard.memory = memory
        guard.streams = loan.streams
        with self._lock:
            self._guards.add(guard)
        return loan

    def let_go(self) -> None:
        """Free what nothing reads any more; with the device as the current one."""
        with self._lock:
            while self._returned:
                guard = self._returned.popleft()
                self._guards.discard(guard)
                events = [self._passed(stream) for stream in guard.streams]
                self._waiting.append((guard.memory, events))
            self._waiting = [
                (memory, events) for memory, events in self._waiting if not all(event.done for event in events)
            ]

    def _passed(self, stream: Any) -> Any:
        cuda = self._cupy.cuda
        event = cuda.Event(disable_timing=True)
        # nothing can be recorded on another thread's own stream; the default stream's events come after all of those
        event.record(cuda.Stream.null if stream.ptr == _PER_THREAD_STREAM else stream)
        return event


class _CupyUpload:
    """See `Upload`."""

    __slots__ = ("_cupy", "_device", "_event", "_loan", "_nbytes")

    def __init__(self, cupy: Any, device: int, loan: _Loan, nbytes: int, event: Any) -> None:
        self._cupy = cupy
        self._device = device
        self._loan = loan
        self._nbytes = nbytes
        self._event = event

    @property
    def done(self) -> bool:
        """See `Upload`."""
        return bool(self._event.done)

    def wait(self) -> None:
        """See `Upload`."""
        self._event.synchronize()

    def ready(self) -> None:
        """See `Upload`."""
        with self._cupy.cuda.Device(self._device):
            stream = self._cupy.cuda.get_current_stream()
            stream.wait_event(self._event)
            if stream not in self._loan.streams:
                self._loan.streams.append(stream)

    def view(self, offset: int, shape: tuple[int, ...], dtype: DType) -> Any:
        """See `Upload`."""
        cupy = self._cupy
        if not has_dtype(cupy, dtype):
            raise ConfigError(
                f"cupy {cupy.__version__} has no {dtype.name}; receive such payloads with device='cuda:{self._device}' "
                "(torch tensors) or device='numpy'",
                field="device",
            )
        loan = self._loan
        memory = cupy.cuda.UnownedMemory(loan.memory.ptr, max(1, self._nbytes), loan, self._device)
        return cupy.ndarray(shape, dtype, cupy.cuda.MemoryPointer(memory, offset))


def _no_gpu(device: str, cupy: Any, why: str) -> ConfigError:
    return ConfigError(
        f"device={device!r}: cupy {cupy.__version__} finds no GPU that it can use here ({why}); leave device out for "
        "numpy arrays",
        field="device",
    )
