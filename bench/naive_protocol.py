"""The baseline: UCXX as it is usually written, on the stock asyncio endpoints with their default settings.

One pooled endpoint; `send([slot])`, `recv(status)`, `recv(payload)`, each under its own `asyncio.wait_for`; the server
answers with the status and then the payload, straight from the slot. It is given every advantage that leaves the
protocol as it is: no ring to lock, one server loop that serves nothing else, a receive buffer that is allocated once
and warm.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import ucxx

from bench.core.control import serve_orders_async
from bench.core.payloads import PayloadPattern
from bench.core.reader import AsyncReading, ReaderSettings, run_async_reader

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from numpy.typing import NDArray

__all__ = ["run_naive_reader", "run_naive_source"]

IO_TIMEOUT_S: Final = 60.0
HOST: Final = "127.0.0.1"
STATUS_OK: Final = 0


def run_naive_source(connection: Connection) -> None:
    """Be the server until the pipe closes."""

    async def serve() -> None:
        server = _NaiveServer()
        server.listen()
        try:
            await serve_orders_async(connection, {"open": server.open, "fill": server.fill})
        finally:
            server.close()

    asyncio.run(serve())


def run_naive_reader(connection: Connection) -> None:
    """Be the client until the pipe closes."""
    run_async_reader(connection, _open)


class _NaiveServer:
    """Serves slots of its own memory on one port."""

    def __init__(self) -> None:
        self._slots: list[NDArray[np.uint8]] = []
        self._written = 0
        self._listener: Any = None  # ucxx has no types

    def listen(self) -> None:
        self._listener = ucxx.create_listener(self._serve)

    def close(self) -> None:
        self._listener.close()

    async def open(self, *, size_bytes: int, slots: int) -> None:
        self._pattern = PayloadPattern(size_bytes)
        self._slots = [np.zeros(size_bytes, dtype=np.uint8) for _ in range(slots)]

    async def fill(self) -> list[tuple[int, dict[str, Any]]]:
        offers = []
        for slot, memory in enumerate(self._slots):
            np.copyto(memory, self._pattern.payload(self._written))
            offers.append((self._written, {"port": self._listener.port, "slot": slot}))
            self._written += 1
        return offers

    async def _serve(self, endpoint: Any) -> None:
        request = np.empty(1, dtype=np.uint64)
        try:
            while True:
                await asyncio.wait_for(endpoint.recv(request), IO_TIMEOUT_S)
                payload = self._slots[int(request[0])]
                status = np.array([STATUS_OK, payload.nbytes], dtype=np.uint64)
                await asyncio.wait_for(endpoint.send(status), IO_TIMEOUT_S)
                await asyncio.wait_for(endpoint.send(payload), IO_TIMEOUT_S)
        except (ucxx.exceptions.UCXError, TimeoutError):
            endpoint.abort()  # the client closed its endpoint at the end of its turn, or has gone quiet


class _Received:
    transport = "ucxx, stock endpoints"

    def __init__(self, pool: list[_NaiveConnection], connection: _NaiveConnection) -> None:
        self._pool = pool
        self._connection = connection
        self.buffer = connection.payload.data

    def release(self) -> None:
        self._pool.append(self._connection)


class _NaiveConnection:
    """A pooled endpoint with its buffers."""

    def __init__(self, endpoint: Any, size_bytes: int) -> None:
        self.endpoint = endpoint
        self.request = np.empty(1, dtype=np.uint64)
        self.status = np.empty(2, dtype=np.uint64)
        self.payload = np.empty(size_bytes, dtype=np.uint8)


class _NaiveClient:
    def __init__(self, size_bytes: int) -> None:
        self._size_bytes = size_bytes
        self._pool: list[_NaiveConnection] = []

    def resolve(self, reference: Mapping[str, Any]) -> tuple[int, int]:
        return reference["port"], reference["slot"]

    async def read(self, reference: tuple[int, int]) -> _Received:
        port, slot = reference
        if self._pool:
            connection = self._pool.pop()
        else:
            endpoint = await asyncio.wait_for(ucxx.create_endpoint(HOST, port), IO_TIMEOUT_S)
            connection = _NaiveConnection(endpoint, self._size_bytes)
        endpoint = connection.endpoint
        connection.request[0] = slot
        await asyncio.wait_for(endpoint.send(connection.request), IO_TIMEOUT_S)
        await asyncio.wait_for(endpoint.recv(connection.status), IO_TIMEOUT_S)
        code, nbytes = (int(word) for word in connection.status)
        if code != STATUS_OK or nbytes != self._size_bytes:
            raise ValueError(f"status {code}, {nbytes} bytes")
        await asyncio.wait_for(endpoint.recv(connection.payload), IO_TIMEOUT_S)
        return _Received(self._pool, connection)

    async def close(self) -> None:
        for connection in self._pool:
            await connection.endpoint.close()


@asynccontextmanager
async def _open(settings: ReaderSettings) -> AsyncIterator[AsyncReading]:
    client = _NaiveClient(settings.size_bytes)
    try:
        yield AsyncReading(resolve=client.resolve, read=client.read)
    finally:
        await client.close()
