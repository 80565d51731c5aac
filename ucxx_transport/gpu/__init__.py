"""CUDA for both ends: page-locked memory, copies that do not wait, and the order between streams.

| given to a rollout worker                  | goes through | which is imported                                     |
|--------------------------------------------|--------------|-------------------------------------------------------|
| a torch tensor                             | torch        | where the tensor was made                             |
| a cupy array                               | cupy         | where the array was made                              |
| `__dlpack__` on a CUDA device (jax)        | torch, cupy  | what the process has, else what is installed, in turn |
| `__cuda_array_interface__` alone (numba)   | cupy, torch  | the same                                              |

Nothing here imports torch or cupy before an array or a `device` asks for it.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any, Final, TypeAlias

from ucxx_transport.errors import ConfigError
from ucxx_transport.gpu.runtime import Receiver, Runtime
from ucxx_transport.schema.tensors import Array, as_array, is_on_device
from ucxx_transport.schema.wire_form import describe

RuntimeFinder: TypeAlias = Callable[[object, str], Runtime]
"""Gives what can work with a leaf on a GPU, of the field named."""

_BY_DLPACK: Final = ("torch", "cupy")
"""torch first: cupy up to 13 has no bfloat16, and crashed on one that came by DLPack (cupy issue 8801)."""

_BY_INTERFACE: Final = ("cupy", "torch")
"""cupy first: it waits for the stream that the interface names by itself."""


def runtime_of(leaf: object, field: str) -> Runtime:
    """The library that works with a leaf on a GPU, as in the table; a ConfigError: neither is installed."""
    torch: Any = sys.modules.get("torch")
    if torch is not None and isinstance(leaf, torch.Tensor):  # a subclass too, wherever that is from
        own = "torch"
    else:
        own = type(leaf).__module__.partition(".")[0]
        if own not in _BY_DLPACK:
            own = _library_for(leaf, field)
    return _runtime(own)


@cache
def _runtime(library: str) -> Runtime:
    module = importlib.import_module(library)  # which has made the leaf, or could be imported
    if library == "torch":
        from ucxx_transport.gpu.torch import TorchRuntime

        return TorchRuntime(module)
    from ucxx_transport.gpu.cupy import CupyRuntime

    return CupyRuntime(module)


def _library_for(leaf: object, field: str) -> str:
    wanted = _BY_DLPACK if hasattr(leaf, "__dlpack__") else _BY_INTERFACE
    for name in sorted(wanted, key=lambda name: sys.modules.get(name) is None):
        with suppress(ImportError):
            importlib.import_module(name)
            return name
    raise ConfigError(
        f"field {field!r}: {describe(leaf)} on a GPU needs torch or cupy to come to the host: "
        "pip install 'ucxx_transport[torch]' or '[cu12]', or copy it to the host first",
        field=field,
    )


def on_host(leaf: object, field: str, runtimes: RuntimeFinder = runtime_of) -> Array:
    """Values in host memory, wherever they are; `as_array`, with its errors, for what is there already."""
    if not is_on_device(leaf):
        return as_array(leaf, field)
    runtime = runtimes(leaf, field)
    return runtime.to_host(runtime.adopt(leaf, field))


def receiver_for(device: str) -> Receiver:
    """What receives on "cuda[:N]" or "cupy[:N]", N the current one; a ConfigError: no such library or GPU here."""
    library, _, number = device.partition(":")
    index = int(number) if number else None
    if library == "cuda":
        from ucxx_transport.gpu.torch import TorchReceiver

        return TorchReceiver(device, index)
    from ucxx_transport.gpu.cupy import CupyReceiver

    return CupyReceiver(device, index)
