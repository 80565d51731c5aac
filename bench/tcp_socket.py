"""The ceiling of what the kernel gives: a plain blocking TCP socket over loopback between two processes."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from bench.core.control import serve_orders
from bench.core.payloads import PayloadPattern
from bench.core.reader import ReaderSettings, Reading, run_reader

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from numpy.typing import NDArray

__all__ = ["run_socket_reader", "run_socket_source"]

HOST: Final = "127.0.0.1"
IO_TIMEOUT_S: Final = 60.0
REQUEST: Final = struct.Struct("<Q")
REPLY: Final = struct.Struct("<QQ")


def run_socket_source(connection: Connection) -> None:
    """Be the server until the pipe closes."""
    with socket.create_server((HOST, 0)) as listener:
        server = _SocketServer(listener)
        thread = threading.Thread(target=server.serve, name="socket-server", daemon=True)
        thread.start()
        serve_orders(connection, {"open": server.open, "fill": server.fill})


def run_socket_reader(connection: Connection) -> None:
    """Be the client until the pipe closes."""
    run_reader(connection, _open)


class _SocketServer:
    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._slots: list[NDArray[np.uint8]] = []
        self._written = 0

    def open(self, *, size_bytes: int, slots: int) -> None:
        self._pattern = PayloadPattern(size_bytes)
        self._slots = [np.zeros(size_bytes, dtype=np.uint8) for _ in range(slots)]

    def fill(self) -> list[tuple[int, dict[str, Any]]]:
        port = self._listener.getsockname()[1]
        offers = []
        for slot, memory in enumerate(self._slots):
            np.copyto(memory, self._pattern.payload(self._written))
            offers.append((self._written, {"port": port, "slot": slot}))
            self._written += 1
        return offers

    def serve(self) -> None:
        """One client after the other: a turn has one connection."""
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return  # the listener was closed: the process ends
            with client:
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._serve_client(client)

    def _serve_client(self, client: socket.socket) -> None:
        request = bytearray(REQUEST.size)
        while client.recv_into(request, REQUEST.size, socket.MSG_WAITALL) == REQUEST.size:
            (slot,) = REQUEST.unpack(request)
            payload = memoryview(self._slots[slot])
            header = REPLY.pack(slot, payload.nbytes)
            sent = client.sendmsg([header, payload]) - len(header)
            client.sendall(payload[sent:])


class _Received:
    transport = "socket"

    def __init__(self, payload: memoryview) -> None:
        self.buffer = payload

    def release(self) -> None:
        """The buffer is used again for the next read."""


class _SocketClient:
    def __init__(self, size_bytes: int) -> None:
        self._size_bytes = size_bytes
        self._header = bytearray(REPLY.size)
        self._received = _Received(np.zeros(size_bytes, dtype=np.uint8).data)
        self._socket: socket.socket | None = None

    def resolve(self, reference: Mapping[str, Any]) -> tuple[int, int]:
        return reference["port"], reference["slot"]

    def read(self, reference: tuple[int, int]) -> _Received:
        port, slot = reference
        if self._socket is None:
            self._socket = socket.create_connection((HOST, port), timeout=IO_TIMEOUT_S)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._socket.settimeout(None)  # a timeout would make every call a poll and a call
        stream, view = self._socket, self._received.buffer
        stream.sendall(REQUEST.pack(slot))
        stream.recv_into(self._header, REPLY.size, socket.MSG_WAITALL)
        answered, nbytes = REPLY.unpack(self._header)
        if (answered, nbytes) != (slot, self._size_bytes):
            raise ValueError(f"asked for slot {slot}, got {answered} with {nbytes} bytes")
        filled = 0
        while filled < nbytes:
            got = stream.recv_into(view[filled:])
            if not got:
                raise ConnectionResetError("the server closed the connection")
            filled += got
        return self._received

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()


@contextmanager
def _open(settings: ReaderSettings) -> Iterator[Reading]:
    client = _SocketClient(settings.size_bytes)
    try:
        yield Reading(resolve=client.resolve, read=client.read)
    finally:
        client.close()
