"""cupy itself: imported when asked for, its page-locking, and which dtypes it has."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from ucxx_transport.errors import ConfigError
from ucxx_transport.gpu.page_lock import SUCCESS

if TYPE_CHECKING:
    from ucxx_transport.schema.dtypes import DType

_PORTABLE: Final = 1
"""`cudaHostRegisterPortable`, <driver_types.h>."""


def import_cupy(why: str) -> Any:
    """The module.

    Raises:
        ConfigError: it is not installed, or cannot be loaded here.
    """
    try:
        import cupy
    except ImportError as exc:
        raise ConfigError(
            f"{why} needs cupy: pip install 'ucxx_transport[cu12]' (or '[cu13]', by the CUDA of the driver): {exc}",
            field="device",
        ) from exc
    return cupy


@lru_cache(maxsize=64)
def has_dtype(cupy: Any, dtype: DType) -> bool:
    """Whether this cupy works with elements of `dtype`: bfloat16 from 14 on, float8 not yet."""
    if dtype.name.startswith("float8"):  # cupy 13 goes by the letter, of which ml_dtypes has one in common with numpy
        return False
    try:
        cupy.array(np.zeros(1, dtype))
    except (TypeError, ValueError, NotImplementedError):
        return False
    return True


class CupyPageLocking:
    """See `PageLocking`.

    Args:
        cupy: the module. device: the GPU whose context is used.
    """

    def __init__(self, cupy: Any, device: int) -> None:
        self._cupy = cupy
        self._device = device

    def host_register(self, address: int, nbytes: int) -> int:
        """See `PageLocking`."""
        return self._status_of("hostRegister", address, nbytes, _PORTABLE)

    def host_unregister(self, address: int) -> int:
        """See `PageLocking`."""
        return self._status_of("hostUnregister", address)

    def error_words(self, status: int) -> str:
        """See `PageLocking`."""
        return f"{self._cupy.cuda.runtime.CUDARuntimeError(status)} (error {status})"

    def _status_of(self, function: str, *arguments: int) -> int:
        runtime = self._cupy.cuda.runtime
        try:
            with self._cupy.cuda.Device(self._device):
                getattr(runtime, function)(*arguments)
        except (
            runtime.CUDARuntimeError
        ) as error:  # cupy has asked CUDA for its last error, so that nobody else finds it
            return int(error.status)
        return SUCCESS
