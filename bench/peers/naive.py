"""The baseline: UCXX as it is usually written, on the stock asyncio endpoints with their default settings.

One endpoint; `send([slot])`, `recv(status)`, `recv(payload)`, each under its own `asyncio.wait_for`; the server answers
with the status and then the payload, straight from the slot. It is given every advantage that leaves the protocol as it
is: no ring to lock, one server loop that serves nothing else, receive buffers that are allocated once and warm.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from bench.core.ends import IO_TIMEOUT_S
from bench.peers.memory import ReceiveBuffers, Received, Slots

if TYPE_CHECKING:
    from bench.core.ends import Offer

__all__ = ["NaiveReader", "NaiveSource"]

HOST: Final = "127.0.0.1"
STATUS_OK: Final = 0


class NaiveSource:
    """Serves slots of its own memory on one port, from an event loop in a thread."""

    def __init__(self) -> None:
        import ucxx

        self._ucxx = ucxx
        self._slots = Slots()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="naive-server")
        self._thread.start()
        self._listener = asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result()

    def open(self, *, size_bytes: int, slots: int) -> None:
        self._slots.open(size_bytes=size_bytes, slots=slots)

    def fill(self, *, count: int) -> list[Offer]:
        return self._slots.fill(self._listener.port, count)

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    async def _listen(self) -> Any:  # ucxx has no types
        return self._ucxx.create_listener(self._serve)

    async def _close(self) -> None:
        self._listener.close()

    async def _serve(self, endpoint: Any) -> None:
        request = np.empty(1, dtype=np.uint64)
        try:
            while True:
                await asyncio.wait_for(endpoint.recv(request), IO_TIMEOUT_S)
                payload = self._slots.memory[int(request[0])]
                status = np.array([STATUS_OK, payload.nbytes], dtype=np.uint64)
                await asyncio.wait_for(endpoint.send(status), IO_TIMEOUT_S)
                await asyncio.wait_for(endpoint.send(payload), IO_TIMEOUT_S)
        except (self._ucxx.exceptions.UCXError, TimeoutError):
            endpoint.abort()  # the client closed its endpoint at the end of its turn, or has gone quiet


class NaiveReader:
    """One connection, opened by the first read."""

    async def open(self, *, size_bytes: int, slots: int) -> None:
        self._buffers = ReceiveBuffers(size_bytes, slots)
        self._request = np.empty(1, dtype=np.uint64)
        self._status = np.empty(2, dtype=np.uint64)
        self._endpoint: Any = None

    def resolve(self, reference: Sequence[int]) -> tuple[int, int]:
        port, slot = reference
        return port, slot

    async def read(self, reference: tuple[int, int]) -> Received:
        port, self._request[0] = reference
        if self._endpoint is None:
            import ucxx

            self._endpoint = await asyncio.wait_for(ucxx.create_endpoint(HOST, port), IO_TIMEOUT_S)
        endpoint, received = self._endpoint, self._buffers.received[self._buffers.next()]
        await asyncio.wait_for(endpoint.send(self._request), IO_TIMEOUT_S)
        await asyncio.wait_for(endpoint.recv(self._status), IO_TIMEOUT_S)
        code, nbytes = (int(word) for word in self._status)
        if code != STATUS_OK or nbytes != len(received.buffer):
            raise ValueError(f"status {code}, {nbytes} bytes")
        await asyncio.wait_for(endpoint.recv(np.frombuffer(received.buffer, np.uint8)), IO_TIMEOUT_S)
        return received

    async def close(self) -> None:
        if self._endpoint is not None:
            await self._endpoint.close()
