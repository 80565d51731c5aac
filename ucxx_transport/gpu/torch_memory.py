"""torch and plain memory: which dtype is whose, tensors over arrays and over rows of bytes. None of it needs a GPU."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from ucxx_transport.errors import ConfigError

if TYPE_CHECKING:
    from ucxx_transport.schema.dtypes import DType
    from ucxx_transport.schema.tensors import Array

_BITS: Final = {1: np.uint8, 2: np.int16}
"""What stands for a dtype that torch does not take from numpy, by its size."""


def import_torch(device: str) -> Any:
    """The module.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import torch
    except ImportError as exc:
        raise ConfigError(
            f"device={device!r} needs torch: pip install 'ucxx_transport[torch]', or leave device out for numpy arrays",
            field="device",
        ) from exc
    return torch


def torch_dtype(torch: Any, dtype: DType) -> Any:
    """Torch's dtype for elements of a payload.

    Raises:
        ConfigError: torch has none.
    """
    found = getattr(torch, dtype.name, None)
    if not isinstance(found, torch.dtype):
        raise ConfigError(f"torch has no {dtype.name}; unpack such payloads with device='numpy'", field="device")
    return found


def name_of(dtype: Any) -> str:
    """The name of a dtype of torch, as numpy and ml_dtypes have it too."""
    return str(dtype).removeprefix("torch.")


def host_tensor(torch: Any, array: Array) -> Any:
    """A torch tensor over an array's memory, without a copy.

    Raises:
        ConfigError: torch has no such dtype.
    """
    dtype = torch_dtype(torch, array.dtype)
    plain = array
    if array.dtype.name.startswith(("bfloat16", "float8")):  # what torch does not take from numpy
        plain = array.view(_BITS[array.dtype.itemsize])
    tensor = torch.from_numpy(plain if plain.flags.writeable else np.asarray(_Writable(plain)))
    return tensor if tensor.dtype == dtype else tensor.view(dtype)


def flat_bytes(torch: Any, tensor: Any) -> Any:
    """A tensor's elements in their order, as one row of bytes on its own device; no copy of a contiguous tensor."""
    bits = tensor
    if tensor.dtype.itemsize == 1 and tensor.dtype != torch.uint8:
        bits = tensor.view(torch.uint8)  # of float8 not every kernel is there
    return bits.contiguous().reshape(-1).view(torch.uint8)


def view_of_bytes(torch: Any, memory: Any, offset: int, shape: tuple[int, ...], dtype: DType) -> Any:
    """A tensor over a row of bytes.

    Args:
        torch: the module.
        memory: a contiguous tensor of uint8.
        offset: the first byte; a multiple of the element's size.
        shape: of the tensor.
        dtype: of its elements.

    Raises:
        ConfigError: torch has no such dtype.
    """
    found = torch_dtype(torch, dtype)
    return memory[offset : offset + prod(shape) * dtype.itemsize].view(found).view(shape)


class _Writable:
    """The memory of a read-only array, for torch, which knows no read-only tensors and warns of each."""

    def __init__(self, array: Array) -> None:
        interface = array.__array_interface__
        self.__array_interface__ = {**interface, "data": (interface["data"][0], False)}
        self._array = array  # held: it holds the payload's memory
