"""A connection, from its hello through tagged messages to loss or close: over UCX, or what takes its place in tests.

The hello is the first 16 bytes that each end sends, on the connection's own stream, to name the tags it receives by:

| offset | bytes | field                                                            |
|--------|-------|------------------------------------------------------------------|
| 0      | 4     | magic `b"UXTL"`                                                  |
| 4      | 2     | version, little-endian, 2                                        |
| 6      | 2     | zero                                                             |
| 8      | 8     | tag base, little-endian, below 2^48, that the sender receives by |

Channel `n` of an end is the tag `base << 16 | n`. UCX matches tagged messages in the whole worker, not per connection,
so each end draws a random base per connection: no connection can take, or forge, another one's message without guessing
48 bits.
"""

from __future__ import annotations

import secrets
import struct
from abc import abstractmethod
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from copy import copy
from typing import Final, Protocol, TypeAlias, cast

from ucxx_transport.errors import ConfigError, ProtocolError, TransportError
from ucxx_transport.link.base import EndpointEvents, Message, OnDone, Operation, Posted, keep_for_good, lost
from ucxx_transport.link.flight import CANCELLED, CHANNEL_BITS, CLOSE_TIMEOUT_S, TRUNCATED, LinkCore
from ucxx_transport.link.ucx_api import UcxEndpoint, bytes_received, status_error, tcp_sockets

MAGIC: Final = b"UXTL"
VERSION: Final = 2
_HELLO: Final = struct.Struct("<4sHHQ")
HELLO_BYTES: Final = _HELLO.size
BASE_BITS: Final = 48

LARGE_BYTES: Final = 16 * 1024
"""From here on a send releases the interpreter's lock (GIL): taking it again may cost its thread 5 ms."""

LOST: Final = -1  # the status with which an endpoint's loss ends: none of UCX's that matters
GRACE_S: Final = 0.05
"""How long after a loss its operations are waited for. A receive that had only the first parts of a message never ends
(seen over shared-memory lanes): it is given up, and its buffer leaked when the endpoint is closed."""


class Endpoint(Posted):
    """One connection.

    Both ways to post raise PeerLostError once it is closed or lost, and for a buffer a ConfigError if it is not
    contiguous, or read-only where it must be written, a TypeError or ValueError if it is none.

    Args:
        ucx: the connection, which may not be up yet; None where UCX did not even begin, for the reason `error`.
        accepted_by: UCX's listeners, kept for as long as the connection: UCX points into them.

    Attributes:
        peer: `host:port` of the other end where it is known, for messages and logs.
        alive: neither lost nor closed; may still be connecting. usable: UCX, too, has it alive.
        deferred: what waits for the peer's hello, or for its end.
        handle: UCX's, once the peer's hello has come; 0 before.
        channels: receives are posted on this many, 65536 unless the owner says so: messages of others are discarded,
            which would pile up otherwise.
    """

    def __init__(
        self,
        link: LinkCore,
        ucx: UcxEndpoint | None,
        peer: str,
        *,
        events: EndpointEvents | None = None,
        address: tuple[str, int] | None = None,
        accepted_by: object = None,
        error: TransportError | None = None,
    ) -> None:
        super().__init__()
        self.peer = peer
        self.events = events
        self.alive = True
        self.channels = 1 << CHANNEL_BITS
        self.usable = ucx is not None
        self.base = secrets.randbits(BASE_BITS)
        self._link = link
        self._ucx = ucx
        self._address = address
        self._accepted_by = accepted_by
        self._receive_base = self.base << CHANNEL_BITS
        self._flight = link.flight
        self._send_base, self.handle = -1, 0  # not known before the hello
        self.deferred: deque[Operation] = deque()
        self._error = error
        self._closed = False
        self._clean: bool | None = None
        self._on_closed: list[Callable[[bool], None]] = []
        self._loss = loss = Operation.of(self, b"", 0)
        loss.status = LOST
        link.endpoints[self.base] = self  # once it is whole: the link may be used, and closed, after an interrupt here
        if ucx is None:
            link.broken[self] = None
            return
        # It ends as an operation does, without Python code inside UCX's callback: an interrupt in such would be lost,
        # and the loss with it.
        ucx.set_close_callback(link.flight.ended.append, (loss,))
        flight, handle, hello = link.flight, ucx.handle, _HELLO.pack(MAGIC, VERSION, 0, self.base)
        flight.post(Operation.of(self, hello, HELLO_BYTES), flight.stream_send, handle, hello, 0)
        self._hello = bytearray(HELLO_BYTES)
        place = link.message(self._hello)
        greeting = Operation.of(self, place, HELLO_BYTES, self._greeted)
        flight.post(greeting, flight.stream_receive, handle, place.address, 0)

    def post_receive(self, buffer: object, on_done: OnDone, *, channel: int = 0) -> Operation:
        """Receive the next message of a channel (0 to 65535) into all of the buffer, or of a writable `Message`."""
        operation, flight = Operation(), self._flight  # as `Operation.of`
        operation.owner, operation.on_done = self, on_done
        if type(buffer) is memoryview and buffer.c_contiguous and not buffer.readonly:
            operation.buffer, operation.nbytes = array, _ = self._link.make_array(buffer), buffer.nbytes
            address = array.ptr
        else:
            message = buffer if type(buffer) is Message else self._link.message(buffer)
            if not message.writable:
                raise ConfigError("buffer is read-only; a receive needs a writable one")
            operation.buffer, operation.nbytes, address = message, message.nbytes, message.address
        if not self.usable:
            self._defer(operation)
            return operation
        begin = flight.receive_large if self._link.rdma and operation.nbytes >= LARGE_BYTES else flight.receive
        flight.post(operation, begin, 0, address, self._receive_base | channel)
        return operation

    def post_send(self, buffer: object, *, channel: int = 0) -> Operation:
        """Send the buffer, or a `Message`, straight from its memory, which must not change before completion.

        Small sends often are `completed` already when this returns; of others `on_done` may be set. Until the peer's
        hello is here, sends wait for it, in order.
        """
        operation = Operation()  # as `Operation.of`
        operation.owner = self
        address: int | bytes
        if type(buffer) is bytes:
            operation.buffer, operation.nbytes = address, _ = buffer, len(buffer)
        else:
            message = buffer if type(buffer) is Message else self._link.message(buffer)
            operation.buffer, operation.nbytes, address = message, message.nbytes, message.address
        base, flight = self._send_base, self._flight
        if not self.usable or base < 0:
            operation.channel = channel
            self._defer(operation)
            return operation
        begin = flight.send if operation.nbytes < LARGE_BYTES else flight.send_large
        flight.post(operation, begin, self.handle, address, base | channel)
        return operation

    def close(self, on_closed: Callable[[bool], None] | None = None) -> None:
        """Close the connection and end what is in flight on it. Idempotent; each caller's `on_closed` is called.

        That is when no operation of this endpoint will touch any buffer again (True), each of them having had its
        `on_done`; or, within a bound, when one has never ended (False): its buffer stays with the link for good.
        It takes 20 to 80 us, some milliseconds while connecting.
        """
        if on_closed is not None:
            self._on_closed.append(on_closed)
        if self._clean is not None:
            self._link.ready.append(self.call_closed)
        elif not self._closed:
            self._closed = True
            self.alive = self.usable = False
            self._break()
            self._link.ending[self] = self._link.in_turn_after(CLOSE_TIMEOUT_S, self.end_close)

    def listener_has_answered(self) -> bool:
        """Of one that is not connected yet: whether the peer's listener has said anything. Some 100 us.

        UCX's connections are set up over the listener's port, and then by one to a data port of each end. This shows if
        the first step is done; a stopped peer accepts, too, but says nothing.
        """
        for each in tcp_sockets() if self._send_base < 0 else ():
            with suppress(OSError):  # not connected
                if each.getpeername()[:2] == self._address and bytes_received(each):
                    return True
        return False

    def lose(self) -> None:
        """Say to the owner that the peer is lost. Until the owner is called, an interrupt has all of it done again."""
        error = self._error = self._why_lost()
        self._break()
        self._link.in_turn_after(GRACE_S, self.give_up)
        self.alive = False
        if self.events is not None:
            self.events.lost(error)

    def end_close(self) -> None:
        """Release UCX's endpoint; buffers of what has not ended are leaked."""
        link = self._link
        if self not in link.ending:
            return
        link.ready.append(self.end_close)  # should a callback raise
        if link.broken.get(self, 0) is None:  # this thread was stopped, or busy, all the time: nothing is cancelled yet
            link.broken[self] = link.flight.cancel([self])
            link.flight.turn(0)
        self.give_up()
        link.ending.pop(self).cancel()
        self._clean = not self.posted
        link.leaked_buffers += len(self.posted)
        if self.posted:
            keep_for_good(self._ucx, *self.posted)
        self._ucx = self._accepted_by = None
        del link.endpoints[self.base]
        link.discard_unexpected()
        self.call_closed()

    def call_closed(self) -> None:
        """Say to those who closed it that it is over."""
        if self._on_closed:
            self._link.ready.append(self.call_closed)  # for the next one, and if this one raises
            self._on_closed.pop(0)(self._clean is True)

    def _greeted(self, greeting: Operation) -> None:
        """The peer's hello has come, or never will."""
        if self._closed:
            return
        error = greeting.error
        if error is None and self._ucx is not None:
            try:
                self._send_base = decode_hello(self._hello, peer=self.peer) << CHANNEL_BITS
            except ProtocolError as exc:
                error = exc.with_traceback(None)
            else:
                self.handle = self._ucx.handle
                while self.deferred:
                    operation = self.deferred.popleft()
                    buffer, tag = operation.buffer, self._send_base | operation.channel
                    address = buffer.address if isinstance(buffer, Message) else cast("bytes", buffer)
                    self._flight.post(operation, self._flight.send_large, self.handle, address, tag)
                return
        self._error = self._error or error
        self._note_loss()

    def _note_loss(self) -> None:
        if self.usable:
            self._link.broken[self] = None
            self.usable = False
            self._end_deferred()

    def _defer(self, operation: Operation) -> None:
        """A send waits for the hello; what is posted before the owner knows of a loss, or a close, for its end."""
        if not (self.usable or self.alive or self._link.closing):
            raise self._why_lost()
        self.deferred.append(operation)
        if not self.usable:  # in the next turn: who posts again whenever one ends would hold this one for ever
            self._link.ready.append(self._end_deferred)

    def _end_deferred(self) -> None:
        """What waits for a hello that never comes ends as if UCX had had it."""
        while self.deferred:
            operation = self.deferred[0]
            operation.status = CANCELLED
            self._flight.ended.append(operation)
            self.deferred.popleft()

    def note_failure(self, operation: Operation) -> None:
        status = operation.status
        if operation is self._loss:
            self._note_loss()
        elif status == TRUNCATED:
            operation.error = lost("truncated", peer=self.peer)
        elif self.usable:
            operation.error = status_error(status, peer=self.peer, connected=self._send_base >= 0)
        else:
            operation.error = self._why_lost()  # the error of a cut-off operation says why its endpoint went

    def _break(self) -> None:
        """Break the connection and cancel what is in flight, which ends in a later turn at the latest."""
        ucx = self._ucx
        if ucx is not None and ucx.alive:
            # Not `close()`: it loses its FORCE flag on the way to UCX, so it waits for a peer that may be stopped, and
            # it never ends a receive that nothing has matched.
            with suppress(self._link.root):
                ucx.close_blocking()
        self._link.broken[self] = None
        self._end_deferred()

    def give_up(self) -> None:
        """Call back what has not ended in time; UCX still holds its buffer."""
        while self._flight.has_ends():
            self._flight.turn(0)
        for operation in list(self.posted):
            on_done, operation.on_done = operation.on_done, None
            if on_done is not None:
                operation.error = self._why_lost()
                on_done(operation)

    def _why_lost(self) -> TransportError:
        self._link.check_usable()
        if self._error is not None:
            return copy(self._error)  # raised, it gets a traceback that leads back here: a cycle, which keeps the port
        if self._closed:
            return lost("closed", peer=self.peer)
        if self._ucx is not None:
            try:
                self._ucx.raise_on_error()
            except self._link.root as exc:
                return self._link.why_failed(exc, self.peer, self._address, connected=self._send_base >= 0)
        return lost("reset", peer=self.peer)


class Listener(Protocol):
    """One port that takes connections; `port` is the one really bound."""

    port: int

    def close(self) -> None:
        """Take no further connection. Idempotent. Endpoints handed over before live on."""


OnEndpoint: TypeAlias = Callable[[Endpoint], EndpointEvents | None]
"""Called for each accepted connection, before its hello has come; None: it is refused, and the link closes it."""


class Link(LinkCore):
    """Everything of one worker: its listeners and endpoints."""

    @abstractmethod
    def connect(self, host: str, port: int, events: EndpointEvents) -> Endpoint:
        """Open a connection to a numeric address; see `Reactor.resolve` for names.

        Returns at once; then it gets its `handle`, or `events.lost` is called. With UCX, where nothing listens, neither
        may happen: the caller bounds it in time, and closes the endpoint. A ConfigError: the link is closed or of
        another process. The port is one, from 1 to 65535: what a peer names was checked where it was read.
        """

    @abstractmethod
    def listen(self, port: int, on_endpoint: OnEndpoint) -> Listener:
        """Take connections on a port, 0 for any free one; a ConfigError where it is in use or forbidden."""

    @abstractmethod
    def transports(self) -> tuple[str, ...]:
        """The transports that open endpoints really use, such as `("tcp",)`; `("unknown",)` where it is unknown."""

    def hand_over(self, ucx: UcxEndpoint, peer: str, on_endpoint: OnEndpoint, accepted_by: object = None) -> bool:
        """Give a connection that came to a listener to its owner; False: it has gone meanwhile."""
        if not ucx.alive:
            return False
        endpoint = Endpoint(self, ucx, peer, accepted_by=accepted_by)
        try:
            endpoint.events = on_endpoint(endpoint)
        finally:
            if endpoint.events is None:
                endpoint.close()
        return True


def decode_hello(hello: bytes | bytearray, *, peer: str) -> int:
    """The peer's tag base; a ProtocolError where that is not a hello of this version."""
    magic, version, zero, base = _HELLO.unpack(hello)
    if magic != MAGIC or zero != 0 or base >> BASE_BITS:
        raise ProtocolError("the peer speaks UCX but is not of this package", peer=peer, found=bytes(hello).hex())
    if version != VERSION:
        words = "the peer speaks another version of the link; upgrade both sides"
        raise ProtocolError(words, peer=peer, version=version, expected=VERSION)
    return int(base)
