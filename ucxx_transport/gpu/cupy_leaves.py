"""Arrays on a GPU to the host by way of cupy: its own, and others that it can see as such."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ucxx_transport.errors import ConfigError
from ucxx_transport.gpu.cupy_runtime import CupyPageLocking, has_dtype, import_cupy
from ucxx_transport.gpu.runtime import DeviceArray
from ucxx_transport.schema.dtypes import canonical_dtype
from ucxx_transport.schema.wire_form import describe

if TYPE_CHECKING:
    from ucxx_transport.gpu.runtime import PageLocking
    from ucxx_transport.schema.dtypes import DType
    from ucxx_transport.schema.tensors import Array


class CupyLeaves:
    """See `LeafRuntime`. cupy's own arrays are ordered by the thread's current stream of cupy on their device."""

    def __init__(self) -> None:
        self._cupy = import_cupy("an array on a GPU")

    def adopt(self, leaf: object, field: str) -> DeviceArray:
        """See `LeafRuntime`."""
        cupy = self._cupy
        try:
            array = leaf if isinstance(leaf, cupy.ndarray) else self._seen_as_array(leaf)
        except (TypeError, ValueError, RuntimeError, BufferError, AttributeError) as exc:
            raise ConfigError(
                f"field {field!r}: cupy cannot take {describe(leaf)} from its GPU ({type(exc).__name__}: {exc}); "
                "copy it to the host first, or install torch",
                field=field,
            ) from exc
        return DeviceArray(
            runtime=self,
            array=array,
            shape=tuple(array.shape),
            dtype=canonical_dtype(array.dtype, field),
            device=int(array.device.id),
        )

    def converted(self, array: DeviceArray, dtype: DType, field: str) -> DeviceArray:
        """See `LeafRuntime`."""
        cupy = self._cupy
        for wanted in (array.dtype, dtype):
            if not has_dtype(cupy, wanted):
                raise ConfigError(
                    f"field {field!r}: cupy {cupy.__version__} does not convert {array.dtype.name} to {dtype.name}; "
                    "convert it with torch first, or copy it to the host first (cupy.asnumpy)",
                    field=field,
                )
        with cupy.cuda.Device(array.device):
            converted = array.array.astype(dtype)
        return DeviceArray(runtime=self, array=converted, shape=array.shape, dtype=dtype, device=array.device)

    def bounds(self, array: DeviceArray) -> tuple[int, int] | None:
        """See `LeafRuntime`."""
        if array.array.size == 0:
            return None
        with self._cupy.cuda.Device(array.device):
            return int(array.array.min()), int(array.array.max())

    def overflowed(self, wide: DeviceArray, narrow: DeviceArray) -> bool:
        """See `LeafRuntime`."""
        cupy = self._cupy
        with cupy.cuda.Device(wide.device):
            # bfloat16 where cupy has it: not every ufunc takes it, and float32 has each of its values
            low = narrow.array.astype(cupy.float32) if narrow.dtype.name == "bfloat16" else narrow.array
            high = wide.array.astype(cupy.float32) if wide.dtype.name == "bfloat16" else wide.array
            return bool((cupy.isfinite(low) != cupy.isfinite(high)).any())

    def copy_to_host(self, array: DeviceArray, target: Array) -> None:
        """See `LeafRuntime`."""
        if target.nbytes == 0:
            return
        cupy = self._cupy
        runtime = cupy.cuda.runtime
        with cupy.cuda.Device(array.device):
            # one that is made here may go before the copy ends: its memory is used again on this stream only, in turn
            contiguous = cupy.ascontiguousarray(array.array)
            stream = cupy.cuda.get_current_stream()
            address = target.__array_interface__["data"][0]
            runtime.memcpyAsync(address, contiguous.data.ptr, target.nbytes, runtime.memcpyDeviceToHost, stream.ptr)

    def wait(self, device: int) -> None:
        """See `LeafRuntime`."""
        with self._cupy.cuda.Device(device):
            self._cupy.cuda.get_current_stream().synchronize()

    def to_host(self, array: DeviceArray) -> Array:
        """See `LeafRuntime`."""
        with self._cupy.cuda.Device(array.device):
            host: Array = self._cupy.asnumpy(array.array)
        return host

    def page_locking(self, device: int) -> PageLocking:
        """See `LeafRuntime`."""
        return CupyPageLocking(self._cupy, device)

    def _seen_as_array(self, leaf: Any) -> Any:
        cupy = self._cupy
        if not hasattr(leaf, "__dlpack__"):
            return cupy.asarray(leaf)  # waits for the stream that the interface names
        dtype = str(getattr(leaf, "dtype", ""))
        if dtype.rpartition(".")[2].startswith(("bfloat16", "float8")):
            # cupy 13 does not refuse such a capsule, it crashes on it (cupy issue 8801)
            raise TypeError(f"its dtype is {dtype}")
        with cupy.cuda.Device(leaf.__dlpack_device__()[1]):
            return cupy.from_dlpack(leaf)  # hands the current stream over, which the producer makes wait
