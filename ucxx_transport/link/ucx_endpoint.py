"""UCXXEndpoint: one UCX connection, from the hello through tagged messages to loss or close. See `ucx_hello`."""

from __future__ import annotations

import secrets
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from ucxx_transport.errors import ConfigError, TransportError
from ucxx_transport.link.base import EndpointEvents, OnDone, byte_view, lost
from ucxx_transport.link.libraries import (
    IN_PROGRESS,
    PendingSend,
    endpoint_lanes,
    listener_has_answered,
    release_cancelled,
)
from ucxx_transport.link.ucx_api import UcxArray, UcxEndpoint, UcxRequest, raisable
from ucxx_transport.link.ucx_flight import LinkState, Posted, UCXXMessage, UCXXOperation, operation_of
from ucxx_transport.link.ucx_hello import BASE_BITS, CHANNEL_BITS, HELLO_BYTES, decode_hello, encode_hello

CLOSE_TIMEOUT_S: Final = 2.0
"""How long a close waits for operations to end. Measured: under 50 ms; what has not ended by then never does."""

COPIED_BYTES: Final = 4096
"""Immutable bytes up to this size are sent from memory that UCX knows already: making it known takes 1.5 µs."""

MAX_COPIES: Final = 256

GRACE_S: Final = 0.05
"""How long after a loss its operations are waited for. A receive that had only the first parts of a message never ends
(seen over shared-memory lanes): it is given up, and its buffer leaked when the endpoint is closed."""


class UCXXEndpoint(Posted):
    """See `base.Endpoint`. Made by `UCXXLink.connect` and its listeners.

    Args:
        ucx: the connection, which may not be up yet; None where UCX did not even begin, for the reason `error`.
        peer: `host:port`, for messages.
        events: of its owner; a listener sets it later.
        address: of the listener that it connects to.
        accepted_by: UCX's listeners, kept for as long as the connection: UCX points into them.
    """

    def __init__(
        self,
        link: LinkState,
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
        self._usable = ucx is not None
        self.base = secrets.randbits(BASE_BITS)
        self._link = link
        self._make_tag = link.make_tag
        self._order = link.order
        self._ucx = ucx
        self._address = address
        self._accepted_by = accepted_by
        self._receive_base = self.base << CHANNEL_BITS
        self._receive_tag = self._make_tag(self._receive_base)  # of channel 0
        self._tagged = link.sends
        self._send_base, self._handle = -1, 0  # not known before the hello
        self._deferred: deque[UCXXOperation] = deque()
        self._error = error
        self._closed = False
        self._clean: bool | None = None
        self._on_closed: list[Callable[[bool], None]] = []
        if ucx is None:
            link.note_lost(self)
            return
        here = weakref.ref(self)
        ucx.set_close_callback(lambda: _note_loss(here))
        out, into = link.make_array(encode_hello(self.base)), bytearray(HELLO_BYTES)
        array = link.make_array(into)
        self.sends.append(operation_of(out, HELLO_BYTES, None, ucx.stream_send(out)))
        self.receives.append(
            operation_of(array, HELLO_BYTES, lambda hello: self._greeted(hello.error, into), ucx.stream_recv(array))
        )

    def post_receive(self, buffer: object, on_done: OnDone, *, channel: int = 0) -> UCXXOperation:
        if type(buffer) is UCXXMessage:
            if not buffer.writable:
                raise ConfigError("buffer is read-only; a receive needs a writable one")
            array, nbytes = buffer.array, buffer.nbytes
        else:
            if type(buffer) is not memoryview or buffer.readonly or not buffer.c_contiguous:
                buffer = byte_view(buffer, writable=True)
            array, nbytes = self._link.make_array(buffer), buffer.nbytes
        ucx = self._ucx
        if not self._usable or ucx is None:
            return self._refused(array, nbytes, on_done)
        request = ucx.tag_recv(array, self._make_tag(self._receive_base | channel) if channel else self._receive_tag)
        operation = UCXXOperation()  # as `operation_of`
        operation.array, operation.nbytes, operation.on_done = array, nbytes, on_done
        operation.request, operation.channel = request, channel
        newest, before = self.newest, self.newest.get(channel)
        if before is not None:
            before.follower = operation
        elif request.status == IN_PROGRESS:
            self.receives.append(operation)
        else:  # the message was there already
            self._ended_at_once(operation, request)
            return operation
        newest[channel] = operation
        order = self._order
        order.pop(self, None)
        order[self] = None
        return operation

    def post_send(self, buffer: object, on_done: OnDone | None = None, *, channel: int = 0) -> UCXXOperation:
        """See `base.Endpoint.post_send`. Until the peer's hello is here, sends wait for it, in order."""
        base, ucx, link = self._send_base, self._ucx, self._link
        if type(buffer) is UCXXMessage:
            message = buffer
        elif type(buffer) is bytes and base >= 0 and 0 < len(buffer) <= COPIED_BYTES:
            copy, message = link.copies.get(len(buffer)) or self._memory(len(buffer))
            copy[:] = buffer
        else:
            message = link.message(buffer)
        if not self._usable or ucx is None:
            return self._refused(message.array, message.nbytes, on_done)
        if base < 0:
            operation = operation_of(message.array, message.nbytes, on_done, None, channel)
            self._deferred.append(operation)
            return operation
        sends = self._tagged
        begun = sends.begin(self._handle, message.address, message.nbytes, base | channel, sends.options)
        if begun is None:
            if on_done is not None:
                link.ready.append((on_done, message.sent))
            return message.sent
        if message is not buffer:
            link.copies.pop(message.nbytes, None)  # UCX has not taken it
        request = PendingSend(sends, begun)
        operation = operation_of(message.array, message.nbytes, on_done, request)
        if request.status == IN_PROGRESS:
            self.sends.append(operation)
            self._order.pop(self, None)
            self._order[self] = None
        else:
            self._ended_at_once(operation, request)
        return operation

    def close(self, on_closed: Callable[[bool], None] | None = None) -> None:
        """See `base.Endpoint.close`. Takes 20 to 80 us, some milliseconds while connecting."""
        if on_closed is not None:
            self._on_closed.append(on_closed)
        if self._clean is not None:
            self._link.ready.append((UCXXEndpoint.call_closed, self))
        elif not self._closed:
            self._closed = True
            self.alive = self._usable = False
            self._break()
            self._link.ending[self] = self._link.in_turn_after(CLOSE_TIMEOUT_S, UCXXEndpoint.end_close, self)

    @property
    def greeted(self) -> bool:
        """Whether the peer's hello has come."""
        return self._send_base >= 0

    def listener_has_answered(self) -> bool:
        return self._address is not None and self._send_base < 0 and listener_has_answered(*self._address)

    def lanes(self) -> tuple[tuple[str, str], ...]:
        """(transport, device) of each lane; empty where it is unknown, or before the connection is up."""
        if self._ucx is None or not self._usable or self._send_base < 0:
            return ()
        return endpoint_lanes(self._ucx.handle)

    def note_loss(self) -> None:
        """UCX found the peer gone. Called inside its progress: takes note, no more."""
        if self._usable:
            self._usable = False
            self._link.note_lost(self)

    def lose(self) -> None:
        """Say to the owner that the peer is lost. What had arrived has been called back."""
        if self._closed:
            return
        self.alive = False
        if self._send_base >= 0:
            self._link.counters.peers_lost += 1
        error = self._error = self._why_lost()
        self._break()
        self._link.in_turn_after(GRACE_S, UCXXEndpoint.give_up, self)
        if self.events is not None:
            self.events.lost(error)

    def disown(self) -> None:
        """This process is a fork of the one whose endpoint it is."""
        self.alive = self._usable = False

    def ended(self) -> bool:
        """Whether nothing is in flight any more."""
        return not (self.receives or self.sends or self._deferred)

    def end_close(self) -> None:
        """Release UCX's endpoint; buffers of what has not ended are leaked."""
        timer = self._link.ending.pop(self, None)
        if timer is None:
            return
        timer.cancel()
        self.give_up()
        left = self.in_flight()
        self._clean = not left
        for operation in left:
            self._link.leak(operation, self._ucx)
        for flight in (*self.flights, self.newest):
            flight.clear()
        if self._ucx is not None and self._clean:
            release_cancelled(self._ucx.ucxx_ptr)
        self._ucx = None
        self._link.forget_endpoint(self)
        self._accepted_by = None
        self.call_closed()

    def call_closed(self) -> None:
        """Say to those who closed it that it is over."""
        while self._on_closed:
            self._on_closed.pop(0)(self._clean is True)

    def _greeted(self, error: TransportError | None, hello: bytearray) -> None:
        """The peer's hello has come, or never will."""
        if self._closed:
            return
        if error is None and self._ucx is not None:
            try:
                base = decode_hello(hello, peer=self.peer)
            except TransportError as exc:
                error = exc.with_traceback(None)
            else:
                self._send_base = base << CHANNEL_BITS
                self._handle = self._ucx.handle
                self._send_deferred()
                if self.events is not None:
                    self.events.connected()
                return
        if self._error is None:
            self._error = error
        self.note_loss()

    def _memory(self, nbytes: int) -> tuple[bytearray, UCXXMessage]:
        """What messages of a length are sent from, one after another."""
        copies = self._link.copies
        if len(copies) >= MAX_COPIES:
            copies.clear()
        memory = bytearray(nbytes)
        copies[nbytes] = memory, self._link.message(memory)
        return copies[nbytes]

    def _refused(self, array: UcxArray, nbytes: int, on_done: OnDone | None) -> UCXXOperation:
        """What is posted before the owner can know of a loss, or of the link's close, ends in a turn."""
        if not (self.alive or self._link.closing):
            raise self._why_lost()
        operation = operation_of(array, nbytes, on_done, None)
        self._deferred.append(operation)
        self._link.ready.append((UCXXEndpoint.fail_deferred, self))
        return operation

    def _end(self, operation: UCXXOperation, request: UcxRequest) -> None:
        operation.request = operation.array = None
        operation.completed = True
        if request.status:
            self.note_failure(operation, request)

    def _ended_at_once(self, operation: UCXXOperation, request: UcxRequest) -> None:
        """What was posted is over: its owner hears so in a turn."""
        self._end(operation, request)
        if operation.on_done is not None:
            self._link.ready.append((operation.on_done, operation))

    def note_failure(self, operation: UCXXOperation, request: UcxRequest) -> None:
        if isinstance(request, PendingSend):
            operation.error = self._why_lost()
            return
        binding = self._link.binding
        try:
            request.check_error()
        except binding.root as exc:
            truncated = operation.channel >= 0 and isinstance(exc, binding.lib.UCXMessageTruncatedError)
            if truncated or self._usable:
                operation.error = binding.error(exc, peer=self.peer, connected=self._send_base >= 0)
            else:
                operation.error = self._why_lost()  # the error of a cut-off operation says why its endpoint went

    def _break(self) -> None:
        """Break the connection and cancel what is in flight, which ends in a later turn at the latest."""
        ucx = self._ucx
        if ucx is not None and ucx.alive:
            # Not `close()`: it loses its FORCE flag on the way to UCX, so it waits for a peer that may be stopped, and
            # it never ends a receive that nothing has matched.
            with suppress(self._link.binding.root):
                ucx.close_blocking()
        self._link.cancel_due = True
        if self._deferred:
            self._link.ready.append((UCXXEndpoint.fail_deferred, self))

    def fail_deferred(self) -> None:
        """End what waits for a hello that never comes."""
        while self._deferred:
            operation = self._deferred.popleft()
            operation.completed, operation.array, operation.error = True, None, self._why_lost()
            if operation.on_done is not None:
                operation.on_done(operation)

    def give_up(self) -> None:
        """Call back what has not ended in time; UCX still holds its buffer."""
        self._link.search(self, everywhere=True)
        for operation in self.in_flight():
            request = operation.request
            if request is not None and request.status != IN_PROGRESS:  # behind one that never ends
                self._end(operation, request)
            else:
                operation.error = self._why_lost()
            on_done, operation.on_done = operation.on_done, None
            if on_done is not None:
                on_done(operation)

    def _why_lost(self) -> TransportError:
        self._link.check_usable()
        if self._error is not None:
            return raisable(self._error)
        if self._closed:
            return lost("closed", peer=self.peer)
        if self._ucx is not None:
            binding = self._link.binding
            try:
                self._ucx.raise_on_error()
            except binding.root as exc:
                error = binding.error(exc, peer=self.peer, connected=self._send_base >= 0)
                return self._link.explain_unreachable(error, self._address)
        return lost("reset", peer=self.peer)

    def _send_deferred(self) -> None:
        while self._deferred and self._ucx is not None:
            operation = self._deferred.popleft()
            assert operation.array is not None  # not over
            channel, operation.channel = operation.channel, -1
            sends, tag = self._tagged, self._send_base | channel
            begun = sends.begin(self._handle, operation.array.ptr, operation.nbytes, tag, sends.options)
            operation.request = request = PendingSend(sends, begun)
            if request.status == IN_PROGRESS:
                self.sends.append(operation)
                self._order[self] = None
            else:
                self._ended_at_once(operation, request)


def _note_loss(endpoint: weakref.ref[UCXXEndpoint]) -> None:
    alive = endpoint()
    if alive is not None:
        alive.note_loss()
