"""torch: arrays on a GPU to the host, payloads as tensors on a GPU, page-locking; and tensors over plain memory.

Nothing here imports torch before it is asked for; the functions need no GPU.
"""

from __future__ import annotations

from contextlib import suppress
from functools import cache, lru_cache, partial
from math import prod
from typing import Any, Final

import numpy as np

from ucxx_transport.errors import ConfigError
from ucxx_transport.gpu.runtime import Bytes, DeviceArray, Receiver, Runtime, Upload, check_index, import_library
from ucxx_transport.schema.fields import DType, canonical_dtype
from ucxx_transport.schema.tensors import Array, as_array


@cache
def torch_dtype(torch: Any, dtype: DType) -> Any:
    """Torch's dtype for elements of a payload; a ConfigError where it has none."""
    found = getattr(torch, dtype.name, None)
    if not isinstance(found, torch.dtype):
        raise ConfigError(f"torch has no {dtype.name}; unpack such payloads with device='numpy'", field="device")
    return found


@lru_cache(maxsize=1024)
def dtype_of(dtype: Any, field: str = "") -> DType:
    """A dtype of torch as a payload has it; errors as `canonical_dtype`."""
    return canonical_dtype(str(dtype).removeprefix("torch."), field)


@cache
def _bits_for(dtype: DType) -> DType | None:
    """What stands for a dtype that torch does not take from numpy."""
    return np.dtype(f"i{dtype.itemsize}") if dtype.name.startswith(("bfloat16", "float8")) else None


def host_tensor(torch: Any, array: Array) -> Any:
    """A torch tensor over an array's memory, without a copy; errors as `torch_dtype`."""
    dtype, bits = torch_dtype(torch, array.dtype), _bits_for(array.dtype)
    plain = array if bits is None else array.view(bits)
    tensor = torch.from_numpy(plain if plain.flags.writeable else np.asarray(_Writable(plain)))
    return tensor if bits is None else tensor.view(dtype)


def flat_bytes(torch: Any, tensor: Any) -> Any:
    """A tensor's elements in their order, as one row of bytes on its own device; no copy of a contiguous tensor."""
    bits = tensor.resolve_conj().resolve_neg()  # what is conjugated or negated in name only has no bytes of its own
    if bits.dtype.itemsize == 1 and bits.dtype != torch.uint8:
        bits = bits.view(torch.uint8)  # of float8 not every kernel is there
    # with a stride of 1, since a row of one element counts as contiguous whatever its stride
    return bits.contiguous().as_strided((bits.numel(),), (1,)).view(torch.uint8)


def view_of_bytes(torch: Any, memory: Any, offset: int, shape: tuple[int, ...], dtype: DType) -> Any:
    """A tensor over a row of bytes, a contiguous tensor of uint8; errors as `torch_dtype`."""
    return memory[offset : offset + prod(shape) * dtype.itemsize].view(torch_dtype(torch, dtype)).view(shape)


class _Writable:
    """The memory of a read-only array, for torch, which knows no read-only tensors and warns of each."""

    def __init__(self, array: Array) -> None:
        interface = array.__array_interface__
        self.__array_interface__ = {**interface, "data": (interface["data"][0], False)}
        self._array = array  # held: it holds the payload's memory


_LEGACY_STREAM: Final = 1  # the default stream, in CUDA's array interface


class TorchRuntime(Runtime):
    """torch orders a tensor's use by the thread's current stream of its device, and so does this."""

    def call(self, device: int, function: str, *arguments: int) -> int:
        torch = self.library
        with torch.cuda.device(device):
            status = int(getattr(torch.cuda.cudart(), f"cuda{function}")(*arguments))
            if status:
                # CUDA keeps a failed call's error until it is asked for, and the next kernel of the thread would ask.
                # torch has no cudaGetLastError; but every kernel of its own asks, and raises what it finds, once.
                with suppress(RuntimeError):
                    torch.zeros(1, device=f"cuda:{device}")
        return status

    def error_words(self, status: int) -> str:
        cudart = self.library.cuda.cudart()
        return f"{cudart.cudaGetErrorString(cudart.cudaError(status))} (error {status})"

    def seen(self, leaf: Any, field: str) -> tuple[Any, DType, int]:
        torch = self.library
        tensor = leaf
        if not isinstance(leaf, torch.Tensor):
            if hasattr(leaf, "__dlpack__"):
                tensor = torch.from_dlpack(leaf)  # hands the current stream over, which the producer makes wait
            else:
                stream = leaf.__cuda_array_interface__.get("stream")
                # torch leaves waiting to the caller; waiting here costs nothing, since the write does
                if stream == _LEGACY_STREAM:
                    torch.cuda.default_stream().synchronize()
                elif stream is not None:
                    torch.cuda.ExternalStream(stream).synchronize()
                tensor = torch.as_tensor(leaf, device="cuda")
        tensor = tensor.detach().resolve_conj().resolve_neg()
        tensor.data_ptr()  # which what is no plain memory refuses: a sparse tensor
        return tensor, dtype_of(tensor.dtype, field), tensor.get_device()

    def copy_to_host(self, array: DeviceArray, target: Array) -> None:
        if target.nbytes:
            # bytes to bytes, both in one piece: torch then makes one cudaMemcpyAsync of it, and stages nothing
            place = self.library.from_numpy(target.reshape(-1).view(np.uint8))
            place.copy_(flat_bytes(self.library, array.array), non_blocking=True)

    def wait(self, device: int) -> None:
        self.library.cuda.current_stream(device).synchronize()

    def to_host(self, array: DeviceArray) -> Array:
        return as_array(array.array.cpu(), "")


class TorchReceiver(Receiver):
    """Its copies go by one stream of its own, which no kernel of the trainer's holds up."""

    def __init__(self, device: str, index: int | None) -> None:
        torch = import_library("torch", device)
        if not torch.cuda.is_available():
            raise ConfigError(
                f"device={device!r}: torch {torch.__version__} finds no GPU that it can use here; use device='cpu' and "
                f"move the tensors with .to({device!r})",
                field="device",
            )
        self.runtime = TorchRuntime(torch)
        self.device = check_index(device, index, torch.cuda.device_count(), torch.cuda.current_device)
        self.name = f"cuda:{self.device}"
        self.out_of_memory = torch.cuda.OutOfMemoryError
        self._stream = torch.cuda.Stream(self.device)

    def begin(self, source: Bytes) -> Upload:
        torch = self.runtime.library
        # allocated under the stream that writes to it first: reused there it is in turn, whatever had it before
        with torch.cuda.stream(self._stream):
            memory = torch.empty(source.nbytes, dtype=torch.uint8, device=self.name)
            if source.nbytes:
                memory.copy_(host_tensor(torch, source), non_blocking=True)
            event = torch.cuda.Event()
            event.record(self._stream)

        def ready() -> None:
            stream = torch.cuda.current_stream(memory.device)
            stream.wait_event(event)
            # without it the caching allocator would hand the memory to the next payload while this stream reads it
            memory.record_stream(stream)

        return Upload(event.query, event.synchronize, ready, partial(view_of_bytes, torch, memory))
