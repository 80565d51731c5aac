"""Arrays on a GPU to the host by way of torch: its own tensors, and others that it can see as such."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

import ml_dtypes
import numpy as np

from ucxx_transport.errors import ConfigError
from ucxx_transport.gpu.runtime import DeviceArray
from ucxx_transport.gpu.torch_memory import flat_bytes, host_tensor, import_torch, name_of, torch_dtype
from ucxx_transport.gpu.torch_page_locking import TorchPageLocking
from ucxx_transport.schema.dtypes import canonical_dtype
from ucxx_transport.schema.tensors import as_array
from ucxx_transport.schema.wire_form import describe

if TYPE_CHECKING:
    from ucxx_transport.gpu.runtime import PageLocking
    from ucxx_transport.schema.dtypes import DType
    from ucxx_transport.schema.tensors import Array

_NO_SIGN: Final = "float8_e8m0fnu"

_LEGACY_STREAM: Final = 1
"""How CUDA's array interface names the default stream."""


class TorchLeaves:
    """See `LeafRuntime`. torch orders a tensor's use by the thread's current stream of its device, and so does this."""

    def __init__(self) -> None:
        self._torch = import_torch("cuda")

    def adopt(self, leaf: object, field: str) -> DeviceArray:
        """See `LeafRuntime`."""
        torch = self._torch
        try:
            given = leaf if isinstance(leaf, torch.Tensor) else self._seen_as_tensor(leaf)
            tensor = given.detach().resolve_conj().resolve_neg()
            tensor.data_ptr()  # which what is no plain memory refuses: a sparse tensor
        except (TypeError, ValueError, RuntimeError, BufferError, AttributeError) as exc:
            raise ConfigError(
                f"field {field!r}: torch cannot take {describe(leaf)} from its GPU ({type(exc).__name__}: {exc}); "
                "copy it to the host first",
                field=field,
            ) from exc
        return DeviceArray(
            runtime=self,
            array=tensor,
            shape=tuple(tensor.shape),
            dtype=canonical_dtype(name_of(tensor.dtype), field),
            device=int(tensor.device.index),
        )

    def converted(self, array: DeviceArray, dtype: DType, field: str) -> DeviceArray:
        """See `LeafRuntime`."""
        if dtype.name == _NO_SIGN:
            raise ConfigError(
                f"field {field!r}: torch converts to {dtype.name} whatever the sign; convert it first "
                f"(tensor.to(torch.{dtype.name})), knowing that",
                field=field,
            )
        tensor = array.array.to(torch_dtype(self._torch, dtype))
        return DeviceArray(runtime=self, array=tensor, shape=array.shape, dtype=dtype, device=array.device)

    def bounds(self, array: DeviceArray) -> tuple[int, int] | None:
        """See `LeafRuntime`."""
        tensor = array.array
        if tensor.numel() == 0:
            return None
        # of the wider unsigned integers torch has little more than the conversion
        wide = tensor.to(self._torch.int64)
        least, largest = int(wide.min()), int(wide.max())
        if array.dtype == np.uint64 and least < 0:
            return 0, int(np.iinfo(np.uint64).max)
        return least, largest

    def overflowed(self, wide: DeviceArray, narrow: DeviceArray) -> bool:
        """See `LeafRuntime`."""
        torch = self._torch
        # float8 has no arithmetic of its own; every value of it is one of float32's
        low = narrow.array.to(torch.float32) if narrow.dtype.itemsize == 1 else narrow.array
        high = wide.array.to(torch.float32) if wide.dtype.itemsize == 1 else wide.array
        finite = torch.isfinite(high)
        wrong = torch.isfinite(low) != finite
        if narrow.dtype.itemsize == 1:  # torch may give the largest value instead of an infinite one, by its version
            wrong |= finite & (high.abs() > _largest_that_rounds_into(narrow.dtype))
        return bool(wrong.any())

    def copy_to_host(self, array: DeviceArray, target: Array) -> None:
        """See `LeafRuntime`."""
        if target.nbytes:
            # bytes to bytes, both in one piece: torch then makes one cudaMemcpyAsync of it, and stages nothing
            place = host_tensor(self._torch, target.reshape(-1).view(np.uint8))
            place.copy_(flat_bytes(self._torch, array.array), non_blocking=True)

    def wait(self, device: int) -> None:
        """See `LeafRuntime`."""
        self._torch.cuda.current_stream(device).synchronize()

    def to_host(self, array: DeviceArray) -> Array:
        """See `LeafRuntime`."""
        return as_array(array.array.cpu(), "")

    def page_locking(self, device: int) -> PageLocking:
        """See `LeafRuntime`."""
        return TorchPageLocking(self._torch, device)

    def _seen_as_tensor(self, leaf: Any) -> Any:
        torch = self._torch
        if hasattr(leaf, "__dlpack__"):
            return torch.from_dlpack(leaf)  # hands the current stream over, which the producer makes wait
        stream = leaf.__cuda_array_interface__.get("stream")
        if stream == _LEGACY_STREAM:
            torch.cuda.default_stream().synchronize()
        elif stream is not None:  # torch leaves it to the caller; waiting here costs nothing, since the write does
            torch.cuda.ExternalStream(stream).synchronize()
        return torch.as_tensor(leaf, device="cuda")


def _largest_that_rounds_into(dtype: DType) -> float:
    """Half a step above the largest value of a float: what lies above that has no nearest value there."""
    facts = ml_dtypes.finfo(dtype)
    largest = float(facts.max)
    return largest + math.ldexp(0.5, math.frexp(largest)[1] - 1 - int(facts.nmant))
