"""DeviceUploader: payloads from receive buffers to a GPU, each from the moment it has come.

| when                 | the payload's bytes                                        | its receive buffer               |
|----------------------|------------------------------------------------------------|----------------------------------|
| it has been read     | `upload`: one copy of all begins, and the next read goes   | held for the copy                |
|                      | on at the same time                                        |                                  |
| the copy has ended   | on the device                                              | to the pool, at the next read    |
| `arrays` are taken   | the consumer's stream waits for the copy, its thread does  |                                  |
|                      | not; fields are views by the schema's offsets              |                                  |
| it is released,      | freed when the last array is gone, and used again only     | still held until the copy has    |
| whenever that is     | after what its streams had to do with it                   | ended                            |
"""

from __future__ import annotations

import threading
import traceback
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ucxx_transport.client import Payload, UCXXClient
from ucxx_transport.client.results import gather_results
from ucxx_transport.errors import ConfigError, SlotError, TransportError
from ucxx_transport.gpu import Receiver, Upload, page_lock

if TYPE_CHECKING:
    from ucxx_transport.gpu.runtime import Bytes
    from ucxx_transport.schema import SlotRef
    from ucxx_transport.schema.placement import Placement
    from ucxx_transport.schema.tree import ArrayTree

_PAGE_BYTES = 4096


class DevicePayload(Payload):
    """A payload on a device, or on its way there, with `arrays` of its library. Its host memory is given back."""

    __slots__ = ("_placement", "_upload")

    def __init__(self, payload: Payload, upload: Upload, placement: Placement | None) -> None:
        super().__init__(payload.ref, np.empty(0, np.uint8), payload.schema, payload.transport)
        self._upload: Upload | None = upload
        self._placement = placement

    @property
    def buffer(self) -> memoryview:
        """Not here: always a SlotError, the bytes are on the device."""
        raise SlotError("the payload's bytes are on a GPU; take its arrays", slot=self.ref.slot)

    @property
    def arrays(self) -> ArrayTree:
        """The payload's fields as nested dicts and lists of arrays on the device; `{"data": bytes}` for a raw ring.

        The calling thread's current stream waits for the copy; on another stream, order it yourself.

        Raises:
            SlotError: the payload has been released.
            ConfigError: the device's library has not the dtype of a field; the message names it.
        """
        upload = self._upload  # once: another thread may release meanwhile
        if upload is None:
            raise SlotError("the payload has been released; read its arrays before release()", slot=self.ref.slot)
        upload.ready()
        schema, placement = self.schema, self._placement
        if schema is None or placement is None:
            return {"data": upload.view(0, (self.nbytes,), np.dtype(np.uint8))}
        places = zip(placement.offsets, placement.shapes, placement.dtypes, strict=True)
        return schema.nest([upload.view(*place) for place in places])

    def release(self) -> None:
        """Give up this payload's hold on the device's memory; arrays taken from it stay valid. Idempotent."""
        super().release()
        self._upload = None


class DeviceUploader:
    """Copies payloads to one device as they come, and holds their receive buffers meanwhile. Thread-safe.

    Raises:
        ConfigError: memory cannot be page-locked for it.
    """

    def __init__(self, receiver: Receiver) -> None:
        self._receiver = receiver
        self._lock = threading.Lock()
        self._in_flight: deque[tuple[Upload, Bytes]] = deque()
        self._closed = False
        self.page_locker(_a_page())  # that none can be locked here is said now rather than with every read

    def page_locker(self, memory: Bytes) -> object:
        """Page-lock a receive buffer for as long as it lives, or raise a PageLockError; see `BufferPool`."""
        return page_lock(
            memory, self._receiver.page_locking(), what="a receive buffer", remedy="lower client.buffer_pool_bytes"
        )

    def upload(self, payload: Payload) -> DevicePayload:
        """Begin to copy a payload to the device, and take its place. What was given is released in any case.

        Raises:
            ProtocolError: the bytes are not a payload of the schema.
            ConfigError: the device has no memory for it, or the uploader is closed.
        """
        with payload:
            source = np.frombuffer(payload.buffer, np.uint8)
            placement = None if payload.schema is None else payload.schema.placement_in(payload.buffer)
            with self._lock:
                if self._closed:
                    raise ConfigError("the prefetcher is closed; make another")
                self._release_buffers()
                upload = self._receiver.upload(source)
                self._in_flight.append((upload, source))
            return DevicePayload(payload, upload, placement)

    def release_buffers(self) -> None:
        """Release the buffers whose copies have ended."""
        with self._lock:
            self._release_buffers()

    def close(self) -> None:
        """Wait for the copies under way and release their buffers; nothing is uploaded any more. Idempotent."""
        with self._lock:
            self._closed = True
            while self._in_flight:
                self._in_flight[0][0].wait()
                self._in_flight.popleft()

    def _release_buffers(self) -> None:
        while self._in_flight and self._in_flight[0][0].done:  # they end in the order in which they began
            self._in_flight.popleft()


class UploadingReader:
    """Reads a batch as a client does, every payload on its way to the device while the others are still being read."""

    def __init__(self, client: UCXXClient, uploader: DeviceUploader) -> None:
        self._client = client
        self._uploader = uploader

    async def read_many(
        self, refs: Sequence[SlotRef], *, deadline_s: float | None = None
    ) -> list[Payload | TransportError]:
        return await gather_results(lambda ref: self._read(ref, deadline_s), refs)

    async def _read(self, ref: SlotRef, deadline_s: float | None) -> Payload:
        self._uploader.release_buffers()
        payload = await self._client.read(ref, deadline_s=deadline_s)
        try:
            return self._uploader.upload(payload)
        except TransportError as error:
            traceback.clear_frames(error.__traceback__)  # they hold the buffer, and the error may be kept
            raise


def _a_page() -> Any:
    raw = np.empty(2 * _PAGE_BYTES, np.uint8)
    start = -raw.ctypes.data % _PAGE_BYTES
    return raw[start : start + _PAGE_BYTES]
