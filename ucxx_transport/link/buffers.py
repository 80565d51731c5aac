"""What a link accepts as a buffer: one place that says yes or no, the same for every link."""

from __future__ import annotations

from ucxx_transport.errors import ConfigError

__all__ = ["byte_view"]


def byte_view(buffer: object, *, writable: bool) -> memoryview:
    """A view of the buffer that pins it until released: a bytearray cannot be resized, an mmap not closed.

    Args:
        buffer: bytes (to send), bytearray, memoryview, mmap or array; C-contiguous.
        writable: True to receive into it.

    Raises:
        ConfigError: it has no buffer protocol, is not contiguous, or is read-only where it must be written.
    """
    try:
        view = memoryview(buffer)  # type: ignore[arg-type]  # the failure is the check
    except (TypeError, ValueError) as exc:
        # ml_dtypes arrays land here too: numpy exports no buffer for them, but does for `.view(np.uint8)`.
        raise ConfigError(
            "buffer has no usable buffer protocol; pass its bytes, such as array.view(numpy.uint8)",
            type=type(buffer).__name__,
        ) from exc
    if writable and view.readonly:
        raise ConfigError("buffer is read-only; a receive needs a writable one", type=type(buffer).__name__)
    if not view.c_contiguous:
        raise ConfigError("buffer is not C-contiguous; pass a contiguous copy", type=type(buffer).__name__)
    return view
