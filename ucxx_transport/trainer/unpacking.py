"""Payloads as the arrays that a trainer works with, on its device.

| device                           | gives                                                                             |
|----------------------------------|-----------------------------------------------------------------------------------|
| None, "numpy"                    | numpy views of the payload's memory                                               |
| "cpu"                            | torch tensors of the payload's memory; bfloat16 and float8 as torch's own         |
| "cuda", "cuda:N", a torch.device | torch tensors on that GPU, views of one copy of the payload (`gpu_upload`)        |
| "cupy", "cupy:N"                 | cupy arrays on that GPU, the same; a dtype that this cupy has not is refused      |

What lies in host memory lies in a receive buffer or, read in place, in the worker's slot. It comes back when nothing
refers to it any more, a tensor neither. A tensor cannot be read-only: clone one before writing to it, since it may lie
in a slot that others read too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from ucxx_transport.errors import ConfigError
from ucxx_transport.gpu import Receiver, receiver_for
from ucxx_transport.gpu.torch import host_tensor, import_torch
from ucxx_transport.trainer.gpu_upload import DevicePayload, DeviceUploader

if TYPE_CHECKING:
    from ucxx_transport.client import Payload
    from ucxx_transport.schema.tree import ArrayTree


class Unpacker:
    """Gives a payload's arrays on a device: its own, tensors over its memory, or arrays on a GPU.

    Attributes:
        uploader: what takes payloads to the GPU as they come; None where they stay in the host's memory.
    """

    def __init__(self, *, torch: Any = None, uploader: DeviceUploader | None = None) -> None:
        self._torch = torch
        self.uploader = uploader

    def __call__(self, payload: Payload) -> ArrayTree:
        """The arrays, in the payload's own nesting; valid for as long as they live, whatever becomes of the payload."""
        if self.uploader is not None and not isinstance(payload, DevicePayload):
            with self.uploader.upload(payload) as uploaded:
                return uploaded.arrays
        arrays = payload.arrays
        if self._torch is not None:
            arrays = map_leaves(partial(host_tensor, self._torch), arrays)
        return arrays


def unpacker_for(device: object = None) -> Unpacker:
    """How payloads become arrays on `device`.

    Args:
        device: None, or what `str` words as "numpy", "cpu", "cuda", "cuda:N", "cupy" or "cupy:N" (a `torch.device`
            too); or a `Receiver` of your own.

    Raises:
        ConfigError: another word, a library is not installed, or this machine has no such GPU.
    """
    if isinstance(device, Receiver):
        return Unpacker(uploader=DeviceUploader(device))
    name = "numpy" if device is None else str(device)
    if name == "numpy":
        return Unpacker()
    if name == "cpu":
        return Unpacker(torch=import_torch(name))
    if name.partition(":")[0] in ("cuda", "cupy"):
        return Unpacker(uploader=DeviceUploader(receiver_for(name)))
    raise ConfigError(
        f"device must be None, 'numpy', 'cpu', 'cuda', 'cuda:N', 'cupy' or 'cupy:N', not {name!r}", field="device"
    )


def map_leaves(function: Callable[[Any], Any], tree: Any) -> Any:
    """A tree of the same nesting with `function` of every leaf."""
    if isinstance(tree, dict):
        return {key: map_leaves(function, child) for key, child in tree.items()}
    if isinstance(tree, list):
        return [map_leaves(function, child) for child in tree]
    return function(tree)
