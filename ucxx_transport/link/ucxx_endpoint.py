"""UCXXEndpoint, one UCX connection from the hello through tagged messages to loss or close; and UCXXListener, one port.

The hello is the first 16 bytes that each end sends, on the connection's own stream, to name the tag it receives by:

| offset | bytes | field                                            |
|--------|-------|--------------------------------------------------|
| 0      | 4     | magic `b"UXTL"`                                  |
| 4      | 2     | version, little-endian, 1                        |
| 6      | 2     | zero                                             |
| 8      | 8     | tag, little-endian, that the sender receives by  |

UCX matches tagged messages in the whole worker, not per connection, so each end draws a random tag per connection for
what it receives: no connection can take, or forge, another one's message without guessing 64 bits.

UCX binds the wildcard address (0.0.0.0) and ucxx's API takes no other: narrow it outside, by a firewall or a network
namespace. UCX also keeps the port bound until the last endpoint accepted on it is closed.
"""

from __future__ import annotations

import asyncio
import secrets
import struct
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from threading import get_ident

from ucxx_transport.errors import ProtocolError, TransportError
from ucxx_transport.link.base import LostReason, OnEndpoint, byte_view, hand_over
from ucxx_transport.link.binding import UcxEndpoint, UcxListener, UcxTag
from ucxx_transport.link.native import endpoint_lanes, endpoint_peer, release_cancelled, request_peer
from ucxx_transport.link.pending import LinkContext, Operation, UCXXPending
from ucxx_transport.link.translate import lost, raisable
from ucxx_transport.logs import get_logger

_log = get_logger(__name__)

MAGIC = b"UXTL"
VERSION = 1
_HELLO = struct.Struct("<4sHHQ")
HELLO_BYTES = _HELLO.size

CLOSE_TIMEOUT_S = 2.0
"""How long `close()` waits for operations to end. Measured: under 50 ms; what has not ended by then never does."""

QUIET_S = 60.0
"""After one event about connections that fail while they are accepted, further ones are only counted for so long."""

GRACE_S = 0.05
"""How long after a loss its operations are waited for. A receive that had only the first parts of a message never ends
(seen over shared-memory lanes): its waiters get an error, and its buffer is leaked when the endpoint is closed."""


class UCXXEndpoint:
    """See `base.Endpoint`. Made by `UCXXLink.connect` and its listeners.

    Args:
        link: that owns it.
        ucx: the connection, which may not be up yet.
        peer: `host:port`, for messages.
        on_closed: called when it is closed, and kept for as long as the connection. A listener's own method keeps the
            listener, into which UCX points.
    """

    def __init__(
        self, link: LinkContext, ucx: UcxEndpoint, peer: str, on_closed: Callable[[], None] | None = None
    ) -> None:
        self.link = link
        self.driver = link.driver
        self.counters = link.counters
        self.ucx_error = link.translator.root
        self.peer = peer
        self.closed = False
        self._ucx: UcxEndpoint | None = ucx
        self._on_closed = on_closed
        self._make_array = link.binding.make_array
        self._lost = False
        self._usable_now = True
        self.thread = get_ident()
        self.in_flight: set[Operation] = set()
        self._deferred: deque[UCXXPending] = deque()
        self._receive_tag: UcxTag = link.binding.lib.UCXXTag(secrets.randbits(64))
        self._send_tag: UcxTag | None = None
        self._closing: asyncio.Task[bool] | None = None
        here = weakref.ref(self)
        ucx.set_close_callback(lambda: _note_loss(here))
        out = memoryview(encode_hello(self._receive_tag.value))
        Operation(self, out).start(ucx.stream_send(self._make_array(out)))
        self._hello = _HelloReceive(self)
        self._hello.start(ucx.stream_recv(self._make_array(self._hello.buffer)))

    @property
    def alive(self) -> bool:
        return not (self.closed or self._lost)

    def post_receive(self, buffer: object) -> UCXXPending:
        ucx = self._usable()
        view = byte_view(buffer, writable=True)
        pending = UCXXPending(self, view, sending=False)
        self.counters.receives += 1
        pending.start(ucx.tag_recv(self._make_array(view), self._receive_tag))
        return pending

    def post_send(self, buffer: object) -> UCXXPending:
        """See `base.Endpoint.post_send`. Until the peer's hello is here, sends wait for it, in order."""
        ucx = self._usable()
        view = byte_view(buffer, writable=False)
        pending = UCXXPending(self, view, sending=True)
        self.counters.sends += 1
        tag = self._send_tag
        if tag is None:
            self.in_flight.add(pending)
            self._deferred.append(pending)
        else:
            pending.start(ucx.tag_send(self._make_array(view), tag))
        return pending

    async def close(self) -> bool:
        self.link.check_thread()
        if self._closing is None:
            self.begin_close()
            self._closing = self.driver.loop.create_task(self._finish_close())
            self.link.keep(self._closing)
        return await asyncio.shield(self._closing)

    async def connected(self) -> None:
        """Return once the peer has said hello.

        Raises:
            PeerLostError: it never will.
            ProtocolError: what answers is not of this package.
        """
        if not self._hello.poll():
            await self._hello.waiter()  # no polling here: it keeps UCX's own thread from making the connection
        if self._hello.error is not None:
            raise raisable(self._hello.error)

    def lanes(self) -> tuple[tuple[str, str], ...]:
        """(transport, device) of each lane; empty where it is unknown, or before the connection is up."""
        ucx = self._ucx
        if ucx is None or not self.alive or self._send_tag is None:
            return ()
        return endpoint_lanes(ucx.handle)

    def begin_close(self) -> None:
        """Break the connection and cancel what is in flight, which ends in a later turn at the latest."""
        if self.closed:
            return
        self.closed = True
        self._usable_now = False
        self._fail_deferred(self._why_lost())
        ucx = self._ucx
        if ucx is None or not ucx.alive:
            self.driver.cancel_soon()  # UCX has closed it by itself
        else:
            # Not `close()`: it loses its FORCE flag on the way to UCX, so it waits for a peer that may be stopped, and
            # it never ends a receive that nothing has matched. This one takes 20-80 us, some ms while connecting.
            try:
                ucx.close_blocking()
            except self.ucx_error:
                self.counters.suppressed_errors += 1
        self.driver.kick()

    def end_close(self) -> bool:
        """Release UCX's endpoint; buffers of what has not ended are leaked. Returns whether none was."""
        clean = not self.in_flight
        for operation in tuple(self.in_flight):
            operation.give_up(self._why_lost())  # its waiters must not wait for ever
            self.link.leak(operation, self._ucx)
        if self._ucx is not None and clean:
            release_cancelled(self._ucx.ucxx_ptr)
        self._ucx = None
        if self._on_closed is not None:
            self._on_closed()
            self._on_closed = None
        self.link.forget(self)
        return clean

    @property
    def receive_tag(self) -> int:
        """What the peer's messages to this endpoint are marked with."""
        return self._receive_tag.value

    def note_loss(self) -> None:
        """UCX found the peer gone. Called inside progress: takes note, no more."""
        if not self._lost and not self.closed:
            self._lost = True
            self._usable_now = False
            self.counters.peers_lost += 1
            self.driver.cancel_soon()
            self.driver.later(GRACE_S, self._give_up)

    def _give_up(self) -> None:
        for operation in tuple(self.in_flight):
            operation.give_up(self._why_lost())

    def explain(self, exc: Exception) -> TransportError:
        """See `pending.OperationOwner`: the error of a cut-off operation says why its endpoint went."""
        if self.closed or self._lost:
            return self._why_lost()
        return self.link.translator.error(exc, peer=self.peer, connected=self._send_tag is not None)

    def hello_ended(self, hello: _HelloReceive) -> None:
        """The peer's hello has come, or never will."""
        if hello.error is None:
            try:
                tag = decode_hello(hello.buffer, peer=self.peer)
            except TransportError as exc:
                hello.error = exc
            else:
                self._send_tag = self.link.binding.lib.UCXXTag(tag)
                self._send_deferred(self._send_tag)
        if hello.error is not None:
            self._usable_now = False
            self._fail_deferred(hello.error)
            self.driver.soon(self.begin_close)  # what its owner has posted ends with the same error

    def _usable(self) -> UcxEndpoint:
        ucx = self._ucx
        if ucx is None or not self._usable_now or get_ident() != self.thread or self.driver.loop.is_closed():
            self.link.check_owner()
            raise self._why_lost()
        return ucx

    def _why_lost(self) -> TransportError:
        reason: LostReason = "closed" if self.closed else "reset"
        if isinstance(self._hello.error, ProtocolError):
            return raisable(self._hello.error)
        if self._lost and self._ucx is not None:
            try:
                self._ucx.raise_on_error()
            except self.ucx_error as exc:
                error = self.link.translator.error(exc, peer=self.peer, connected=self._send_tag is not None)
                error.__cause__ = exc.with_traceback(None)
                return error
        return lost(reason, peer=self.peer)

    def _send_deferred(self, tag: UcxTag) -> None:
        while self._deferred and self._ucx is not None:
            pending = self._deferred.popleft()
            if pending.view is not None:
                pending.start(self._ucx.tag_send(self._make_array(pending.view), tag))

    def _fail_deferred(self, error: TransportError) -> None:
        while self._deferred:
            self._deferred.popleft().fail(error)

    async def _finish_close(self) -> bool:
        end = self.driver.loop.time() + CLOSE_TIMEOUT_S
        while self.in_flight and (left := end - self.driver.loop.time()) > 0:
            await asyncio.wait([operation.waiter() for operation in self.in_flight], timeout=left)
        return self.end_close()


class _HelloReceive(Operation):
    """The receive of the peer's hello."""

    __slots__ = ("buffer",)

    _owner: UCXXEndpoint

    def __init__(self, endpoint: UCXXEndpoint) -> None:
        self.buffer = bytearray(HELLO_BYTES)
        super().__init__(endpoint, memoryview(self.buffer))

    def ended(self) -> None:
        """Hand over what came."""
        self._owner.hello_ended(self)


def _note_loss(endpoint: weakref.ref[UCXXEndpoint]) -> None:
    alive = endpoint()
    if alive is not None:
        alive.note_loss()


def encode_hello(tag: int) -> bytes:
    """The hello of an end that receives by `tag` (u64)."""
    return _HELLO.pack(MAGIC, VERSION, 0, tag)


def decode_hello(hello: bytes | bytearray, *, peer: str) -> int:
    """The peer's tag.

    Raises:
        ProtocolError: not a hello of this version.
    """
    magic, version, zero, tag = _HELLO.unpack(hello)
    if magic != MAGIC or zero != 0:
        raise ProtocolError("the peer speaks UCX but is not of this package", peer=peer, found=bytes(hello).hex())
    if version != VERSION:
        raise ProtocolError("the peer speaks another version of the link", peer=peer, found=version, expected=VERSION)
    return int(tag)


class UCXXListener:
    """See `base.Listener`. After `close()` the port stays bound until the endpoints accepted on it are closed too.

    Args:
        link: that owns it.
        port: 0 for any free one.
        on_endpoint: gets each connection, in the loop, outside of UCX's callbacks.
    """

    def __init__(self, link: LinkContext, port: int, on_endpoint: OnEndpoint) -> None:
        self._link = link
        self._on_endpoint = on_endpoint
        self._arrived: deque[UcxEndpoint] = deque()
        here = weakref.ref(self)
        self._ucx: UcxListener | None = link.binding.lib.UCXListener.create(
            link.worker, port, lambda request: _note_request(here, request)
        )
        self._closed = False
        self._failed: tuple[str | None, str] | None = None
        self._quiet_until_s = 0.0
        self._open_endpoints = 0
        self.port: int = self._ucx.port

    async def close(self) -> None:
        self.close_now()

    def close_now(self) -> None:
        """The same, for clean-up without a loop."""
        if not self._closed:
            self._closed = True
            self.hand_over()
            self._link.forget_listener(self)
            self._release_if_unused()

    def _endpoint_closed(self) -> None:
        """One of the endpoints accepted here is closed."""
        self._open_endpoints -= 1
        self._release_if_unused()

    def _release_if_unused(self) -> None:
        if self._closed and not self._open_endpoints:
            self._ucx = None

    def note_request(self, request: int) -> None:
        """Somebody connects. Called inside progress: takes note, no more.

        Args:
            request: the `ucp_conn_request_h`, which the endpoint takes over.
        """
        assert self._ucx is not None
        peer = request_peer(request)
        try:
            self._arrived.append(self._ucx.create_endpoint_from_conn_request(request, True))  # noqa: FBT003
        except self._link.translator.root as exc:  # it has gone already, or its address cannot be reached
            self._link.counters.accepts_failed += 1
            self._failed = (peer, f"{type(exc).__name__}: {exc}")
        self._link.driver.soon(self.hand_over)

    def _log_failed(self) -> None:
        now = self._link.driver.loop.time()
        if self._failed is not None and now >= self._quiet_until_s:
            self._quiet_until_s = now + QUIET_S
            peer, reason = self._failed
            failed = self._link.counters.accepts_failed
            _log.warning("accept_failed", port=self.port, peer=peer, reason=reason, failed=failed)
        self._failed = None

    def hand_over(self) -> None:
        """Give the connections that came to their owner."""
        self._log_failed()
        while self._arrived:
            ucx = self._arrived.popleft()
            if not ucx.alive:
                continue
            if self._closed:
                with suppress(self._link.translator.root):
                    ucx.close_blocking()
                continue
            peer = endpoint_peer(ucx.handle) or f"a client of port {self.port}"
            endpoint = UCXXEndpoint(self._link, ucx, peer, self._endpoint_closed)
            self._open_endpoints += 1
            self._link.adopt(endpoint)
            self._link.counters.endpoints_accepted += 1
            failed = hand_over(endpoint, self._on_endpoint, self._link.driver.loop)
            if failed is not None:
                self._link.keep(failed)


def _note_request(listener: weakref.ref[UCXXListener], request: int) -> None:
    alive = listener()
    if alive is not None:
        alive.note_request(request)
