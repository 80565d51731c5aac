"""Payloads as the arrays that a trainer works with, on its device.

| device          | gives                                                                                          |
|-----------------|------------------------------------------------------------------------------------------------|
| None, "numpy"   | numpy views of the payload's memory                                                            |
| "cpu"           | torch tensors of the payload's memory; bfloat16 and float8 as torch's own                      |

What lies in host memory lies in a receive buffer or, read in place, in the worker's slot. It comes back when nothing
refers to it any more, a tensor neither. A tensor cannot be read-only: clone one before writing to it, since it may lie
in a slot that others read too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ucxx_transport.errors import ConfigError

if TYPE_CHECKING:
    from ucxx_transport.client import Payload
    from ucxx_transport.schema.tensors import Array
    from ucxx_transport.schema.tree import ArrayTree


class Unpacker(Protocol):
    """Gives a payload's arrays on a device."""

    def __call__(self, payload: Payload) -> ArrayTree:
        """The arrays, in the payload's own nesting; valid for as long as they live, whatever becomes of the payload."""


def unpacker_for(device: object = None) -> Unpacker:
    """How payloads become arrays on `device`.

    Args:
        device: None, or what `str` words as "numpy" or "cpu" (a `torch.device` too).

    Raises:
        ConfigError: another word, or torch is not installed.
    """
    name = "numpy" if device is None else str(device)
    if name == "numpy":
        return _views
    if name == "cpu":
        return _CpuTensors(_torch(name))
    if name.partition(":")[0] == "cuda":
        raise ConfigError(
            f"device={name!r}: {_why_no_gpu(_torch(name))}; use device='cpu' and move the tensors with .to({name!r})",
            field="device",
        )
    raise ConfigError(f"device must be None, 'numpy' or 'cpu', not {name!r}", field="device")


def map_leaves(function: Callable[[Any], Any], tree: Any) -> Any:
    """A tree of the same nesting with `function` of every leaf."""
    if isinstance(tree, dict):
        return {key: map_leaves(function, child) for key, child in tree.items()}
    if isinstance(tree, list):
        return [map_leaves(function, child) for child in tree]
    return function(tree)


def torch_dtype(torch: Any, array: Array) -> Any:
    """Torch's dtype of an array's elements.

    Raises:
        ConfigError: torch has none.
    """
    dtype = getattr(torch, array.dtype.name, None)
    if not isinstance(dtype, torch.dtype):
        raise ConfigError(f"torch has no {array.dtype.name}; unpack such payloads with device='numpy'", field="device")
    return dtype


def _views(payload: Payload) -> ArrayTree:
    return payload.arrays


class _CpuTensors:
    """Torch tensors over the payload's own memory."""

    def __init__(self, torch: Any) -> None:
        self._torch = torch

    def __call__(self, payload: Payload) -> ArrayTree:
        """See `Unpacker`."""
        tree: ArrayTree = map_leaves(self._tensor, payload.arrays)
        return tree

    def _tensor(self, array: Array) -> Any:
        dtype = torch_dtype(self._torch, array)
        plain = array
        if array.dtype.name.startswith(("bfloat16", "float8")):  # what torch does not take from numpy
            plain = array.view(np.int16 if array.dtype.itemsize == 2 else np.uint8)
        tensor = self._torch.from_numpy(plain if plain.flags.writeable else np.asarray(_Writable(plain)))
        return tensor if tensor.dtype == dtype else tensor.view(dtype)


class _Writable:
    """The memory of a read-only array, for torch, which knows no read-only tensors and warns of each."""

    def __init__(self, array: Array) -> None:
        interface = array.__array_interface__
        self.__array_interface__ = {**interface, "data": (interface["data"][0], False)}
        self._array = array  # held: it holds the payload's memory


def _torch(device: str) -> Any:
    try:
        import torch
    except ImportError as exc:
        raise ConfigError(
            f"device={device!r} needs torch: pip install 'ucxx_transport[torch]', or leave device out for numpy arrays",
            field="device",
        ) from exc
    return torch


def _why_no_gpu(torch: Any) -> str:
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no GPU that it can use here"
    return "receiving on a GPU is not built yet"
