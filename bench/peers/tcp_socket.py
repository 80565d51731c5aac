"""What the kernel gives: a plain blocking TCP socket over loopback between two processes."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from bench.core.ends import IO_TIMEOUT_S
from bench.peers.memory import ReceiveBuffers, Received, Slots

if TYPE_CHECKING:
    from bench.core.ends import Offer

__all__ = ["SocketReader", "SocketSource"]

HOST: Final = "127.0.0.1"
REQUEST: Final = struct.Struct("<Q")
REPLY: Final = struct.Struct("<QQ")


class SocketSource:
    """Serves one client after the other, in a thread: a turn has one connection."""

    def __init__(self) -> None:
        self._slots = Slots()
        self._listener = socket.create_server((HOST, 0))
        threading.Thread(target=self._serve, name="socket-server", daemon=True).start()

    def open(self, *, size_bytes: int, slots: int) -> None:
        self._slots.open(size_bytes=size_bytes, slots=slots)

    def fill(self, *, count: int) -> list[Offer]:
        return self._slots.fill(self._listener.getsockname()[1], count)

    def close(self) -> None:
        self._listener.close()

    def _serve(self) -> None:
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
            payload = self._slots.memory[slot].data
            header = REPLY.pack(slot, payload.nbytes)
            sent = client.sendmsg([header, payload]) - len(header)
            client.sendall(payload[sent:])


class SocketReader:
    """One connection, opened by the first read."""

    def open(self, *, size_bytes: int, slots: int) -> None:
        self._header = bytearray(REPLY.size)
        self._buffers = ReceiveBuffers(size_bytes, slots)
        self._socket: socket.socket | None = None

    def resolve(self, reference: Sequence[int]) -> tuple[int, int]:
        port, slot = reference
        return port, slot

    def read(self, reference: tuple[int, int]) -> Received:
        port, slot = reference
        if self._socket is None:
            self._socket = socket.create_connection((HOST, port), timeout=IO_TIMEOUT_S)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._socket.settimeout(None)  # a timeout would make every call a poll and a call
        stream, received = self._socket, self._buffers.received[self._buffers.next()]
        view = received.buffer
        stream.sendall(REQUEST.pack(slot))
        stream.recv_into(self._header, REPLY.size, socket.MSG_WAITALL)
        answered, nbytes = REPLY.unpack(self._header)
        if (answered, nbytes) != (slot, len(view)):
            raise ValueError(f"asked for slot {slot}, got {answered} with {nbytes} bytes")
        filled = 0
        while filled < nbytes:
            got = stream.recv_into(view[filled:])
            if not got:
                raise ConnectionResetError("the server closed the connection")
            filled += got
        return received

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
