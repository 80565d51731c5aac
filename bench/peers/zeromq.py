"""The peer to beat: ZeroMQ over TCP, as one writes it with pyzmq. REQ/REP, zero copy, blocking.

A second reader keeps 16 requests in flight over DEALER/ROUTER, a third reads from many sources at once. Each source
serves with one thread; those of one process share its context, and with it ZeroMQ's thread for input and output.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import zmq

from bench.peers.memory import Slots

if TYPE_CHECKING:
    from bench.core.ends import Held, Offer

__all__ = ["DealerReader", "DealersReader", "ZeromqReader", "ZeromqSource"]

HOST: Final = "tcp://127.0.0.1"
SLOT: Final = struct.Struct("<I")
IN_FLIGHT: Final = 16


class ZeromqSource:
    """Answers each request for a slot with the slot's memory, which is not copied.

    Args:
        pattern: of its socket: `zmq.REP` or `zmq.ROUTER`.
    """

    def __init__(self, pattern: int) -> None:
        self._slots = Slots()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self._socket = self._context.socket(pattern)
        self._port = self._socket.bind_to_random_port(HOST)
        self._thread = threading.Thread(target=self._serve, name="zeromq-server")
        self._thread.start()

    def open(self, *, size_bytes: int, slots: int) -> None:
        self._slots.open(size_bytes=size_bytes, slots=slots)

    def fill(self, *, count: int) -> list[Offer]:
        return self._slots.fill(self._port, count)

    def close(self) -> None:
        self._context.term()  # which every serving thread's next wait raises for; it closes its socket
        self._thread.join()

    def _serve(self) -> None:
        answer = self._reply if self._socket.socket_type == zmq.REP else self._route
        with self._socket, suppress(zmq.ContextTerminated):
            self._socket.linger = 0
            while True:
                answer()

    def _reply(self) -> None:
        (slot,) = SLOT.unpack(self._socket.recv())
        self._socket.send(self._slots.memory[slot], copy=False)

    def _route(self) -> None:
        client, request = self._socket.recv_multipart()
        (slot,) = SLOT.unpack(request)
        self._socket.send_multipart([client, self._slots.memory[slot]], copy=False)


class _Frame:
    __slots__ = ("_frame", "buffer")

    def __init__(self, frame: zmq.Frame) -> None:
        self._frame = frame
        self.buffer = frame.buffer

    def release(self) -> None:
        """ZeroMQ frees a message when nothing refers to it any more."""


class ZeromqReader:
    """REQ: one request after the other."""

    pattern: int = zmq.REQ

    def open(self, *, size_bytes: int, slots: int) -> None:
        del size_bytes, slots
        self._context = zmq.Context()
        self._socket = self._context.socket(self.pattern)
        self._port = 0

    def resolve(self, reference: Sequence[int]) -> bytes:
        port, slot = reference
        if port != self._port:
            self._socket.connect(f"{HOST}:{port}")
            self._port = port
        return SLOT.pack(slot)

    def read(self, reference: bytes) -> _Frame:
        self._socket.send(reference)
        return _Frame(self._socket.recv(copy=False))

    def close(self) -> None:
        self._context.destroy(linger=0)


class DealerReader(ZeromqReader):
    """DEALER: the answers come in the order of the requests."""

    pattern = zmq.DEALER

    def read_batch(self, references: Sequence[bytes]) -> Sequence[Held]:
        stream, came = self._socket, []
        for reference in references[:IN_FLIGHT]:
            stream.send(reference)
        for reference in references[IN_FLIGHT:]:
            came.append(_Frame(stream.recv(copy=False)))
            stream.send(reference)
        came += [_Frame(stream.recv(copy=False)) for _ in references[:IN_FLIGHT]]
        return came


class DealersReader:
    """A DEALER to each source: all requests of a batch are sent before an answer is awaited."""

    def open(self, *, size_bytes: int, slots: int) -> None:
        del size_bytes, slots
        self._context = zmq.Context()
        self._sockets: dict[int, zmq.Socket[bytes]] = {}

    def resolve(self, reference: Sequence[int]) -> tuple[zmq.Socket[bytes], bytes]:
        port, slot = reference
        if port not in self._sockets:
            self._sockets[port] = self._context.socket(zmq.DEALER)
            self._sockets[port].connect(f"{HOST}:{port}")
        return self._sockets[port], SLOT.pack(slot)

    def read(self, reference: tuple[zmq.Socket[bytes], bytes]) -> Held:
        [held] = self.read_batch([reference])
        return held

    def read_batch(self, references: Sequence[tuple[zmq.Socket[bytes], bytes]]) -> Sequence[Held]:
        for source, request in references:
            source.send(request)
        return [_Frame(source.recv(copy=False)) for source, _ in references]  # in order, of one source

    def close(self) -> None:
        self._context.destroy(linger=0)
