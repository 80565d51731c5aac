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
from typing import TYPE_CHECKING, Final

from ucxx_transport.errors import ConfigError
from ucxx_transport.logs import get_logger

if TYPE_CHECKING:
    from ucxx_transport.gpu.runtime import Bytes, PageLocking

SUCCESS: Final = 0
CUDART_UNLOADING: Final = 4
ALREADY_REGISTERED: Final = 712
NOT_REGISTERED: Final = 713
"""`cudaError_t`, <driver_types.h>."""

_NOTHING_LEFT_TO_DO: Final = frozenset({SUCCESS, CUDART_UNLOADING, NOT_REGISTERED})

_log = get_logger(__name__)


class PageLockError(ConfigError):
    """Memory could not be page-locked for CUDA; the message says why and what to do."""


class PageLock:
    """Memory that CUDA copies from and to without staging."""

    __slots__ = ("_unregister",)

    def __init__(self, unregister: weakref.finalize[..., Bytes] | None) -> None:
        """Wrap a finaliser; use `page_lock`."""
        self._unregister = unregister

    def unlock(self) -> None:
        """Unregister the memory, if this lock registered it and it still is. Idempotent."""
        if self._unregister is not None:
            self._unregister()


def page_lock(memory: Bytes, locking: PageLocking, *, what: str, remedy: str) -> PageLock:
    """Lock the pages of `memory` for as long as this very array lives.

    Args:
        memory: contiguous; not a view that is dropped before the memory is.
        locking: CUDA's functions.
        what: what the memory is, for the error.
        remedy: what makes it smaller, for the error.

    Raises:
        PageLockError: CUDA refuses.
    """
    address: int = memory.__array_interface__["data"][0]
    status = locking.host_register(address, memory.nbytes)
    if status == ALREADY_REGISTERED:
        return PageLock(None)
    if status != SUCCESS:
        raise PageLockError(
            f"{what} of {memory.nbytes} bytes cannot be page-locked for CUDA: {locking.error_words(status)}. Allow the "
            f"process more locked memory ({_limit()}; docker: --ulimit memlock=-1) and the container more memory, "
            f"or {remedy}",
            field="device",
            status=status,
            needed_bytes=memory.nbytes,
        )
    return PageLock(weakref.finalize(memory, _unregister, locking, address, os.getpid()))


def _unregister(locking: PageLocking, address: int, pid: int) -> None:
    if os.getpid() != pid:
        return  # a forked child's copy: the registration is its parent's
    status = locking.host_unregister(address)
    if status not in _NOTHING_LEFT_TO_DO:
        _log.warning("page_unlock_failed", status=status, reason=locking.error_words(status))


def _limit() -> str:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return "ulimit -l is unlimited" if soft == resource.RLIM_INFINITY else f"ulimit -l is {soft >> 10} KiB"
