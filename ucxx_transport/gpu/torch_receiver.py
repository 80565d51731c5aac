"""Payloads as torch tensors on a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ucxx_transport.errors import ConfigError
from ucxx_transport.gpu.choosing import check_index
from ucxx_transport.gpu.torch_memory import host_tensor, import_torch, view_of_bytes
from ucxx_transport.gpu.torch_page_locking import TorchPageLocking

if TYPE_CHECKING:
    from ucxx_transport.gpu.runtime import Bytes, PageLocking, Upload
    from ucxx_transport.schema.dtypes import DType


class TorchReceiver:
    """See `Receiver`. Its copies go by one stream of its own, which no kernel of the trainer's holds up.

    Args:
        device: as the caller has it. index: the number in it, None for torch's current device.

    Raises:
        ConfigError: torch is not installed, or finds no such GPU.
    """

    def __init__(self, device: str, index: int | None) -> None:
        torch = import_torch(device)
        if not torch.cuda.is_available():
            raise ConfigError(
                f"device={device!r}: torch {torch.__version__} finds no GPU that it can use here; use device='cpu' and "
                f"move the tensors with .to({device!r})",
                field="device",
            )
        self._torch = torch
        number = check_index(device, index, torch.cuda.device_count(), torch.cuda.current_device)
        self._device = torch.device("cuda", number)
        self._stream = torch.cuda.Stream(self._device)

    @property
    def name(self) -> str:
        """See `Receiver`."""
        return str(self._device)

    def page_locking(self) -> PageLocking:
        """See `Receiver`."""
        return TorchPageLocking(self._torch, self._device.index)

    def upload(self, source: Bytes) -> Upload:
        """See `Receiver`."""
        torch = self._torch
        # allocated under the stream that writes to it first: reused there it is in turn, whoever had it before
        with torch.cuda.stream(self._stream):
            try:
                memory = torch.empty(source.nbytes, dtype=torch.uint8, device=self._device)
            except torch.cuda.OutOfMemoryError as exc:
                raise ConfigError(
                    f"{self._device} has no memory for a payload of {source.nbytes} bytes: fetch smaller batches, or "
                    "leave the trainer less of it",
                    field="device",
                    nbytes=source.nbytes,
                ) from exc
            if source.nbytes:
                memory.copy_(host_tensor(torch, source), non_blocking=True)
            event = torch.cuda.Event()
            event.record(self._stream)
        return _TorchUpload(torch, memory, event)


class _TorchUpload:
    """See `Upload`."""

    __slots__ = ("_event", "_memory", "_torch")

    def __init__(self, torch: Any, memory: Any, event: Any) -> None:
        self._torch = torch
        self._memory = memory
        self._event = event

    @property
    def done(self) -> bool:
        """See `Upload`."""
        return bool(self._event.query())

    def wait(self) -> None:
        """See `Upload`."""
        self._event.synchronize()

    def ready(self) -> None:
        """See `Upload`."""
        stream = self._torch.cuda.current_stream(self._memory.device)
        stream.wait_event(self._event)
        # without it the caching allocator would hand the memory to the next payload while this stream still reads it
        self._memory.record_stream(stream)

    def view(self, offset: int, shape: tuple[int, ...], dtype: DType) -> Any:
        """See `Upload`."""
        return view_of_bytes(self._torch, self._memory, offset, shape, dtype)
