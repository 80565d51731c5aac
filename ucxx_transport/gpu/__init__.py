"""CUDA for both ends: page-locked memory, copies that do not wait, and the order between streams.

| given to a rollout worker                  | goes through | which is imported                                     |
|--------------------------------------------|--------------|-------------------------------------------------------|
| a torch tensor                             | torch        | where the tensor was made                             |
| a cupy array                               | cupy         | where the array was made                              |
| `__dlpack__` on a CUDA device (jax)        | torch, cupy  | what the process has, else what is installed, in turn |
| `__cuda_array_interface__` alone (numba)   | cupy, torch  | the same                                              |

| `device` of a trainer                      | gives                                                                |
|--------------------------------------------|----------------------------------------------------------------------|
| "cuda", "cuda:N", a `torch.device`         | torch tensors there; bfloat16 and float8 as torch's own              |
| "cupy", "cupy:N"                           | cupy arrays there; dtypes that this cupy has                         |

| way          | copies                                 | ordered after             | waited for                   |
|--------------|----------------------------------------|---------------------------|------------------------------|
| into a slot  | one a leaf, on the writing thread's    | the producer's work: that | by the host, once a device,  |
|              | current stream, to the page-locked ring| stream, or one it names   | before the slot is committed |
| from a       | one a payload, on a stream of the      | the read that filled it   | by the consumer's stream,    |
| receive      | receiver's own; the buffer is          |                           | when it takes the arrays     |
| buffer       | page-locked                            |                           |                              |

Nothing here imports torch or cupy before an array or a `device` asks for it. `runtime` says what an end needs of CUDA,
as Protocols; `page_lock` decides what a refusal to lock means, `choosing` which library does it.
"""

from ucxx_transport.gpu.choosing import RuntimeFinder, on_host, receiver_for, runtime_of
from ucxx_transport.gpu.page_lock import PageLock, PageLockError, page_lock
from ucxx_transport.gpu.runtime import DeviceArray, LeafRuntime, PageLocking, Receiver, Upload

__all__ = [
    "DeviceArray",
    "LeafRuntime",
    "PageLock",
    "PageLockError",
    "PageLocking",
    "Receiver",
    "RuntimeFinder",
    "Upload",
    "on_host",
    "page_lock",
    "receiver_for",
    "runtime_of",
]
