"""A UCX server without manners: it answers a client's frames with whatever it is given, on a real port."""

from __future__ import annotations

import hashlib
import math
import struct
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from tests.support.payloads import answer_with
from ucxx_transport import SlotRef, TransportError
from ucxx_transport.link.base import Operation
from ucxx_transport.link.endpoint import Endpoint
from ucxx_transport.link.reactor import Reactor
from ucxx_transport.link.ucx import UCXXLink
from ucxx_transport.wire.codec import decode_frame, encode_reply
from ucxx_transport.wire.frames import FRAME_BYTES, MAX_CHANNEL, Frame, ReplyHeader, Status

__all__ = ["Behaviour", "RawServer", "answer_to", "payload_of", "raw_server", "welcome"]

Behaviour = Callable[["RawServer"], Generator[None, Frame, None]]
"""What is done about one connection. Each `yield` is the client's next frame; after its end nothing is done."""


class RawServer:
    """One accepted connection, seen from the server's side.

    Attributes:
        endpoint: the connection.
        ref: what its client will ask for.
    """

    def __init__(self, endpoint: Endpoint, ref: SlotRef, behave: Behaviour) -> None:
        self.endpoint = endpoint
        self.ref = ref
        self._frame = bytearray(FRAME_BYTES)
        self._behaviour = behave(self)
        self._has_ended = False
        self._go_on(None)

    def say(self, message: bytes, attempt: int) -> None:
        """Send one message of any kind on the channel of an attempt."""
        self.endpoint.post_send(message, channel=attempt & MAX_CHANNEL)

    def greet(self) -> Generator[None, Frame, None]:
        """Shake hands properly, without a token."""
        hello = yield
        self.say(welcome(), hello.attempt)

    def be_asked(self) -> Generator[None, Frame, int]:
        """Shake hands properly and hear the FETCH; returns the attempt of its first name."""
        yield from self.greet()
        frame = yield
        return frame.names[0][3]

    def lost(self, error: TransportError) -> None:
        """The link's. A client that has had enough hangs up."""
        del error
        self._has_ended = True
        self.endpoint.close()

    def _go_on(self, frame: Frame | None) -> None:
        try:
            if frame is None:
                next(self._behaviour)
            else:
                self._behaviour.send(frame)
        except StopIteration:
            self._has_ended = True
        if not self._has_ended and self.endpoint.alive:
            self.endpoint.post_receive(self._frame, self._on_frame)

    def _on_frame(self, operation: Operation) -> None:
        if operation.error is None and not self._has_ended:
            self._go_on(decode_frame(self._frame))


def payload_of(ref: SlotRef) -> bytes:
    """A payload of the right length."""
    return hashlib.shake_128(repr(ref.name).encode()).digest(ref.nbytes)


def welcome(*, attempts: int = 64, nbytes: int = 1 << 30, token_required: bool = False) -> bytes:
    """A proper answer to HELLO."""
    body = bytes(32) + struct.pack("<IIQ", attempts, 0, nbytes)
    return encode_reply(ReplyHeader(Status.OK, len(body), token_required=token_required), body)


def answer_to(ref: SlotRef, **changes: Any) -> bytes:
    """A whole and proper answer with a payload, but for the `changes` in its header; the body is as long."""
    nbytes = changes.get("nbytes", ref.nbytes)
    return answer_with(ref, payload_of(replace(ref, nbytes=nbytes)), **changes)


class Port:
    """Where a raw server listens, and how many connections came."""

    def __init__(self) -> None:
        self.number = 0
        self.connections = 0


@contextmanager
def raw_server(behave: Behaviour, ref: SlotRef) -> Iterator[Port]:
    """Listen on a free port, and treat every connection by `behave`; it then stays open until the client closes it."""
    port, is_up, stopping = Port(), threading.Event(), threading.Event()
    reactor = Reactor(UCXXLink)

    def accept(endpoint: Endpoint) -> RawServer:
        port.connections += 1
        return RawServer(endpoint, ref, behave)

    def run() -> None:
        try:
            port.number = reactor.link.listen(0, accept).port
            is_up.set()
            while not stopping.is_set():
                reactor.run_once(math.inf)
        finally:
            is_up.set()
            reactor.close()

    thread = threading.Thread(target=run, name="raw-server")
    thread.start()
    try:
        is_up.wait()
        assert port.number, "it does not listen"
        yield port
    finally:
        stopping.set()
        reactor.submit(lambda: None)
        thread.join()
