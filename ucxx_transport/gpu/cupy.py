"""cupy: arrays on a GPU to the host, payloads as arrays on a GPU, page-locking. Imported when it is asked for.

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
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Final

import numpy as np

from ucxx_transport.errors import ConfigError
from ucxx_transport.gpu.runtime import Bytes, DeviceArray, Receiver, Runtime, Upload, check_index, import_library
from ucxx_transport.schema.fields import DType, canonical_dtype
from ucxx_transport.schema.tensors import Array


@cache
def has_dtype(cupy: Any, dtype: DType) -> bool:
    """Whether this cupy works with elements of `dtype`: bfloat16 from 14 on, float8 not yet."""
    if dtype.name.startswith("float8"):  # cupy 13 goes by the letter, of which ml_dtypes has one in common with numpy
        return False
    try:
        cupy.array(np.zeros(1, dtype))
    except (TypeError, ValueError, NotImplementedError):
        return False
    return True


class CupyRuntime(Runtime):
    """cupy's own arrays are ordered by the thread's current stream of cupy on their device."""

    remedy = ", or install torch"

    def call(self, device: int, function: str, *arguments: int) -> int:
        runtime = self.library.cuda.runtime
        try:
            with self.library.cuda.Device(device):
                getattr(runtime, function[0].lower() + function[1:])(*arguments)
        except runtime.CUDARuntimeError as error:  # cupy has cleared CUDA's last error already
            return int(error.status)
        return 0

    def error_words(self, status: int) -> str:
        return f"{self.library.cuda.runtime.CUDARuntimeError(status)} (error {status})"

    def seen(self, leaf: Any, field: str) -> tuple[Any, DType, int]:
        cupy = self.library
        if isinstance(leaf, cupy.ndarray):
            array = leaf
        elif not hasattr(leaf, "__dlpack__"):
            array = cupy.asarray(leaf)  # waits for the stream that the interface names
        else:
            dtype = str(getattr(leaf, "dtype", ""))
            if dtype.rpartition(".")[2].startswith(("bfloat16", "float8")):
                # cupy 13 does not refuse such a capsule, it crashes on it (cupy issue 8801)
                raise TypeError(f"its dtype is {dtype}")
            with cupy.cuda.Device(leaf.__dlpack_device__()[1]):
                array = cupy.from_dlpack(leaf)  # hands the current stream over, which the producer makes wait
        return array, canonical_dtype(array.dtype, field), int(array.device.id)

    def copy_to_host(self, array: DeviceArray, target: Array) -> None:
        if target.nbytes == 0:
            return
        cupy = self.library
        runtime = cupy.cuda.runtime
        with cupy.cuda.Device(array.device):
            # one that is made here may go before the copy ends: its memory is used again on this stream only, in turn
            contiguous = cupy.ascontiguousarray(array.array)
            stream = cupy.cuda.get_current_stream()
            address = target.__array_interface__["data"][0]
            runtime.memcpyAsync(address, contiguous.data.ptr, target.nbytes, runtime.memcpyDeviceToHost, stream.ptr)

    def wait(self, device: int) -> None:
        with self.library.cuda.Device(device):
            self.library.cuda.get_current_stream().synchronize()

    def to_host(self, array: DeviceArray) -> Array:
        with self.library.cuda.Device(array.device):
            host: Array = self.library.asnumpy(array.array)
        return host


_PER_THREAD_STREAM: Final = 2  # `cudaStreamPerThread`: another stream in every thread that names it


class CupyReceiver(Receiver):
    """Its copies go by one stream of its own, which no kernel of the trainer's holds up."""

    def __init__(self, device: str, index: int | None) -> None:
        cupy = import_library("cupy", device)
        runtime = cupy.cuda.runtime
        count, why = 0, "it counts none"
        try:
            count = runtime.getDeviceCount()
        except runtime.CUDARuntimeError as exc:
            why = str(exc)
        if not count:
            raise ConfigError(
                f"device={device!r}: cupy {cupy.__version__} finds no GPU that it can use here ({why}); leave device "
                "out for numpy arrays",
                field="device",
            )
        self.runtime = CupyRuntime(cupy)
        self.device = check_index(device, index, count, runtime.getDevice)
        self.name = f"cupy:{self.device}"
        self.out_of_memory = cupy.cuda.memory.OutOfMemoryError
        with cupy.cuda.Device(self.device):
            self._stream = cupy.cuda.Stream(non_blocking=True)
        self._lock = threading.Lock()
        # A loan may end in any thread, inside any lock: its finaliser only appends here, which is atomic.
        self._returned: deque[tuple[Any, list[Any]]] = deque()
        self._waiting: list[tuple[Any, list[Any]]] = []

    def begin(self, source: Bytes) -> Upload:
        cupy, device, nbytes = self.runtime.library, self.device, source.nbytes
        runtime = cupy.cuda.runtime
        with cupy.cuda.Device(device), self._stream:
            self._release_unread()
            memory = cupy.cuda.alloc(max(1, nbytes))
            if nbytes:
                address = source.__array_interface__["data"][0]
                runtime.memcpyAsync(memory.ptr, address, nbytes, runtime.memcpyHostToDevice, self._stream.ptr)
            event = cupy.cuda.Event(disable_timing=True)
            event.record(self._stream)
        loan = _Loan(memory)
        weakref.finalize(loan, self._returned.append, (memory, loan.streams)).atexit = False

        def ready() -> None:
            with cupy.cuda.Device(device):
                stream = cupy.cuda.get_current_stream()
                stream.wait_event(event)
                if stream not in loan.streams:
                    loan.streams.append(stream)

        def view(offset: int, shape: tuple[int, ...], dtype: DType) -> Any:
            if not has_dtype(cupy, dtype):
                raise ConfigError(
                    f"cupy {cupy.__version__} has no {dtype.name}; receive such payloads with device='cuda:{device}' "
                    "(torch tensors) or device='numpy'",
                    field="device",
                )
            lent = cupy.cuda.UnownedMemory(memory.ptr, max(1, nbytes), loan, device)
            return cupy.ndarray(shape, dtype, cupy.cuda.MemoryPointer(lent, offset))

        return Upload(lambda: bool(event.done), event.synchronize, ready, view)

    def _release_unread(self) -> None:
        """Free the memory whose arrays are gone and which no stream reads any more. The device must be the current."""
        with self._lock:
            for _ in range(len(self._returned)):
                memory, streams = self._returned.popleft()
                self._waiting.append((memory, [self._passed(stream) for stream in streams]))
            self._waiting = [entry for entry in self._waiting if not all(event.done for event in entry[1])]

    def _passed(self, stream: Any) -> Any:
        cuda = self.runtime.library.cuda
        event = cuda.Event(disable_timing=True)
        # nothing can be recorded on another thread's own stream; the default stream's events come after all of those
        event.record(cuda.Stream.null if stream.ptr == _PER_THREAD_STREAM else stream)
        return event


@dataclass(eq=False)
class _Loan:
    """A payload's memory as its arrays hold it: they keep this object, and so the memory, whatever else is gone."""

    memory: Any
    streams: list[Any] = field(default_factory=list)
