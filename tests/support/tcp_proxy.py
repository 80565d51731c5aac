"""A TCP proxy on the loopback whose connections a test can cut, refuse, or relieve of their answers."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, Self, TypeVar

__all__ = ["TcpProxy"]

HOST = "127.0.0.1"
_CHUNK = 4096

ResultT = TypeVar("ResultT")


class TcpProxy:
    """Forwards its port to another one, from a thread of its own.

    Attributes:
        port: where it listens; 0 until it is entered.
        mute: whether answers are swallowed, and the connection is cut instead.
        cut_after: of each connection, the bytes of answer that pass before it is cut; None: all.
        connections: how many have been made.
    """

    def __init__(self, target: int) -> None:
        self.port = 0
        self.mute = False
        self.cut_after: int | None = None
        self.connections = 0
        self._target = target
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="tcp-proxy")
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.Task[None]] = set()

    def cut(self) -> None:
        """Cut all connections."""
        self._do(self._cut())

    def refuse(self) -> None:
        """Cut all connections and take no more."""
        self._do(self._stop())

    def listen(self) -> None:
        """Take connections, at the same port as before."""
        self._do(self._listen())

    def __enter__(self) -> Self:
        self._thread.start()
        self.listen()
        return self

    def __exit__(self, *_error: object) -> None:
        self.refuse()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _do(self, work: Coroutine[Any, Any, ResultT]) -> ResultT:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout=30)

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._serve, HOST, self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _stop(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        await self._cut()

    async def _cut(self) -> None:
        tasks = list(self._open)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.current_task()
        assert task is not None
        self._open.add(task)
        try:
            with suppress(OSError, asyncio.CancelledError):
                await self._forward(reader, writer)
        finally:
            self._open.discard(task)
            writer.transport.abort()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(HOST, self._target)
        try:
            there = asyncio.ensure_future(_pump(reader, far_writer))
            back = asyncio.ensure_future(self._pump_back(far_reader, writer))
            try:
                await asyncio.wait({there, back}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                there.cancel()
                back.cancel()
                await asyncio.gather(there, back, return_exceptions=True)
        finally:
            far_writer.transport.abort()

    async def _pump_back(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        passed = 0
        while data := await reader.read(_CHUNK):
            if self.mute:
                return
            if self.cut_after is not None and passed + len(data) > self.cut_after:
                writer.write(data[: self.cut_after - passed])
                await writer.drain()
                return
            passed += len(data)
            writer.write(data)
            await writer.drain()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(_CHUNK):
        writer.write(data)
        await writer.drain()
