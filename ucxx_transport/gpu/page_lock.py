"""Page-locked memory: registered with CUDA once, for as long as it lives or until it is unlocked.

| `cudaHostRegister` says      | means                                                                          |
|------------------------------|--------------------------------------------------------------------------------|
| 0                            | locked; unregistered by `unlock()`, else right before the memory goes, or at exit|
| 712, already registered      | locked by another owner, which unregisters it                                  |
| anything else                | `PageLockError`: never a slow copy through pageable memory in its place        |

Memory that is unmapped while it is registered would leave CUDA with pages of another owner. So the array that stands
for it is watched: its finaliser runs before the memory under it is given back.
"""

from __future__ import annotations

import os
import resource
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Final

import numpy as np
import numpy.typing as npt

from ucxx_transport.errors import ConfigError
from ucxx_transport.logs import get_logger

Bytes = npt.NDArray[np.uint8]

SUCCESS: Final = 0
CUDART_UNLOADING: Final = 4
ALREADY_REGISTERED: Final = 712
NOT_REGISTERED: Final = 713
"""`cudaError_t`, <driver_types.h>."""

_PORTABLE: Final = 1
"""`cudaHostRegisterPortable`, <driver_types.h>."""

_NOTHING_LEFT_TO_DO: Final = frozenset({SUCCESS, CUDART_UNLOADING, NOT_REGISTERED})

_log = get_logger(__name__)


class PageLocking(ABC):
    """Page-locking for the copies of one device, by CUDA's functions. Statuses are CUDA's numbers, 0 for success."""

    def host_register(self, address: int, nbytes: int) -> int:
        """`cudaHostRegister`, portable: for all devices of the process."""
        return self.call("HostRegister", address, nbytes, _PORTABLE)

    def host_unregister(self, address: int) -> int:
        """`cudaHostUnregister` of what begins at `address`."""
        return self.call("HostUnregister", address)

    @abstractmethod
    def call(self, function: str, *arguments: int) -> int:
        """A function of CUDA's, in the context of that device alone: any other would be given one by the call."""

    @abstractmethod
    def error_words(self, status: int) -> str:
        """CUDA's words for a status."""


class PageLockError(ConfigError):
    """Memory could not be page-locked for CUDA; the message says why and what to do."""


def page_lock(memory: Bytes, locking: PageLocking, *, what: str, remedy: str) -> Callable[[], object]:
    """Lock the pages of `memory` for as long as this very array lives.

    Args:
        memory: contiguous; not a view that is dropped before the memory is.
        locking: CUDA's functions.
        what: what the memory is, for the error.
        remedy: what makes it smaller, for the error.

    Returns:
        What unlocks it before: unregisters the memory, if this call registered it and it still is. Idempotent.

    Raises:
        PageLockError: CUDA refuses.
    """
    address: int = memory.__array_interface__["data"][0]
    status = locking.host_register(address, memory.nbytes)
    if status == ALREADY_REGISTERED:
        return lambda: None
    if status != SUCCESS:
        raise PageLockError(
            f"{what} of {memory.nbytes} bytes cannot be page-locked for CUDA: {locking.error_words(status)}. Allow the "
            f"process more locked memory ({_limit()}; docker: --ulimit memlock=-1) and the container more memory, "
            f"or {remedy}",
            field="device",
            status=status,
            needed_bytes=memory.nbytes,
        )
    return weakref.finalize(memory, _unregister, locking, address, os.getpid())


def _unregister(locking: PageLocking, address: int, pid: int) -> None:
    if os.getpid() != pid:
        return  # a forked child's copy: the registration is its parent's
    status = locking.host_unregister(address)
    if status not in _NOTHING_LEFT_TO_DO:
        _log.warning("page_unlock_failed", status=status, reason=locking.error_words(status))


def _limit() -> str:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return "ulimit -l is unlimited" if soft == resource.RLIM_INFINITY else f"ulimit -l is {soft >> 10} KiB"
