"""Page-locking by way of torch's `cudart`."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, Final

from ucxx_transport.gpu.page_lock import ALREADY_REGISTERED, SUCCESS

_PORTABLE: Final = 1
"""`cudaHostRegisterPortable`, <driver_types.h>."""


class TorchPageLocking:
    """See `PageLocking`.

    Args:
        torch: the module. device: the GPU whose context is used: any other would be given one by the call.
    """

    def __init__(self, torch: Any, device: int) -> None:
        self._torch = torch
        self._device = device

    def host_register(self, address: int, nbytes: int) -> int:
        """See `PageLocking`."""
        with self._torch.cuda.device(self._device):
            status = int(self._torch.cuda.cudart().cudaHostRegister(address, nbytes, _PORTABLE))
            if status != SUCCESS:
                self._clear_error()
        return status

    def host_unregister(self, address: int) -> int:
        """See `PageLocking`."""
        with self._torch.cuda.device(self._device):
            status = int(self._torch.cuda.cudart().cudaHostUnregister(address))
            if status != SUCCESS:
                self._clear_error()
        return status

    def error_words(self, status: int) -> str:
        """See `PageLocking`."""
        if status == ALREADY_REGISTERED:
            return "the memory is registered already"
        cudart = self._torch.cuda.cudart()
        return f"{cudart.cudaGetErrorString(cudart.cudaError(status))} (error {status})"

    def _clear_error(self) -> None:
        """CUDA keeps a failed call's error until somebody asks for it, and the next kernel of the thread would.

        torch has no `cudaGetLastError`; but every kernel of its own asks for it, and raises what it finds, once.
        """
        with suppress(RuntimeError):
            self._torch.zeros(1, device=f"cuda:{self._device}")
