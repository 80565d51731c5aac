"""One connection carried out: frames in, the session's actions done on the ring, replies out.

Ownership: a slot's `ReadLease` is held by this task from `Serve` to its end. It is finalised exactly once, and only
    after UCX has released the slot's memory: by the acknowledgement, or, on any other way out, after the endpoint is
    closed and its send has completed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple, Protocol

import anyio

from ucxx_transport.errors import BusyError, PeerLostError, SlotError, StaleSlotError, TransportError
from ucxx_transport.link.base import Endpoint, Pending
from ucxx_transport.logs import get_logger
from ucxx_transport.ring.reading import ReadLease
from ucxx_transport.server.counters import Binding, PortCounters
from ucxx_transport.server.session import Finish, Phase, Reply, Serve, Session, Settle
from ucxx_transport.wire.frames import REQUEST_BYTES, ReadRequest, Status

_log = get_logger(__name__)
_BLANK = bytes(REQUEST_BYTES)
# An enum's attribute costs 0.3 µs in Python 3.11; these are on the hot path.
_CLOSING = Phase.CLOSING
_OK = Status.OK
_COUNTED = {
    Status.STALE: "stale",
    Status.NOT_READY: "not_ready",
    Status.BUSY: "busy",
    Status.BAD_REQUEST: "bad_requests",
    Status.UNAUTHORIZED: "unauthorized",
    Status.INTERNAL: "internal",
}
_TIMEOUT_COUNTERS = {
    Phase.GREETING: "handshake_timeouts",
    Phase.CHALLENGED: "handshake_timeouts",
    Phase.IDLE: "idle_evictions",
    Phase.SERVING: "delivery_timeouts",
}


class ReadableRing(Protocol):
    """What a connection needs of a ring."""

    def acquire_slot(self, slot: int, generation: int, *, reader: int = 0) -> ReadLease: ...

    def reclaim_dead(self) -> int: ...


class StuckSend(NamedTuple):
    """A send that outlived its connection, its slot, and whether the client has acknowledged the payload."""

    send: Pending
    lease: ReadLease
    delivered: bool

    def settle(self) -> bool:
        """End the attempt if UCX has released the slot by now; returns whether it had."""
        if not self.send.completed:
            return False
        if self.delivered:
            self.lease.mark_consumed()
        else:
            self.lease.release_reading()
        return True


class Connection:
    """Serves one endpoint, its own from now on, until it closes, breaks the protocol or exceeds a time limit.

    A send that never completed goes to `keep_stuck`, with its lease, which must live as long as it.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        session: Session,
        ring: ReadableRing,
        counters: PortCounters,
        keep_stuck: Callable[[StuckSend], None],
        *,
        binding: Binding,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._endpoint = endpoint
        self._clock = clock
        self._session = session
        self._ring = ring
        self._counters = counters
        self._binding = binding
        self._keep_stuck = keep_stuck
        self._frame = bytearray(REQUEST_BYTES)
        self._lease: ReadLease | None = None
        self._send: Pending | None = None
        self._reply_pending: Pending | None = None
        self._delivered = False
        self._expired = False

    async def serve(self) -> None:
        """Run the connection to its end; returns with everything released."""
        try:
            await self._exchange_frames()
        except PeerLostError:
            pass  # the ordinary end: the client closed, died, or a limit closed the endpoint under us
        except TransportError as error:
            _log.warning("connection_failed", peer=self._endpoint.peer, reason=str(error))
        finally:
            await self._release()

    def expire(self, now: float) -> bool:
        """Called by the port's sweep: whether this connection's time is up (it is counted, the sweep closes it)."""
        session = self._session
        if self._send is not None and self._send.completed:
            session.sent(now)
        if self._expired or now < session.deadline_s:
            return False
        self._expired = True
        counter = _TIMEOUT_COUNTERS.get(session.phase)
        if counter is not None:
            self._counters.add(counter)
        return True

    async def close(self) -> None:
        """Break the connection; `serve()` then ends by itself."""
        await self._endpoint.close()

    async def _exchange_frames(self) -> None:
        endpoint, session, frame = self._endpoint, self._session, self._frame
        arriving = endpoint.post_receive(frame)
        while True:
            await arriving.wait()
            action = session.receive(frame, self._clock())
            # A short message leaves the rest of the buffer as it was: never let an old frame be read twice.
            frame[:] = _BLANK
            if isinstance(action, Finish):
                self._delivered = action.delivered  # it counts, even if the client is gone by now
                # The client's next frame is on its way already; and a send may have to be waited for.
                arriving = endpoint.post_receive(frame)
                await self._finish()
                continue
            reply = self._reply_pending
            if reply is not None and not reply.completed:
                await reply.wait()  # one at a time, within the session's limit: a peer that reads none piles up none
            self._answer(action)
            arriving = endpoint.post_receive(frame)  # behind the reply: its answer is a round trip away
            if session.phase is _CLOSING:
                await arriving.wait()  # the client closes, or the sweep does
                return

    def _answer(self, action: Serve | Reply | Settle) -> None:
        match action:
            case Serve(request=request):
                self._serve_slot(request)
            case Reply():
                self._reply(action)
            case Settle(request=request):
                self._reply(self._session.settled(self._settle(request)))

    def _serve_slot(self, request: ReadRequest) -> None:
        self._counters.add("requests")
        if self._binding.awaited:
            self._reply(self._session.refused(Status.NOT_READY, "the worker has no epoch yet", self._clock()))
            return
        try:
            lease = self._ring.acquire_slot(request.slot, request.generation, reader=self._session.reader)
        except TransportError as error:
            self._reply(self._session.refused(_status_of(error), error.message, self._clock()))
            return
        nbytes = lease.nbytes
        if nbytes != request.nbytes:
            text = f"the payload has {nbytes} bytes, the reference says {request.nbytes}"
            lease.release_reading()
            self._reply(self._session.refused(Status.BAD_REQUEST, text, self._clock()))
            return
        self._lease = lease
        self._send = self._endpoint.post_send(lease.message)

    async def _finish(self) -> None:
        send = self._send
        assert send is not None
        if not send.completed:
            await send.wait()
        self._finalise()

    def _finalise(self) -> None:
        lease, delivered = self._lease, self._delivered
        self._lease, self._send, self._delivered = None, None, False
        if lease is None:
            return
        if delivered:
            nbytes = lease.nbytes
            lease.mark_consumed()
            self._counters.add("delivered")
            self._counters.add("bytes_sent", nbytes)
        else:
            lease.release_reading()
            self._counters.add("released")

    def _settle(self, request: ReadRequest) -> Status:
        try:
            lease = self._ring.acquire_slot(request.slot, request.generation, reader=self._session.reader)
        except TransportError as error:
            return Status.BUSY if error.retryable else Status.STALE
        consumed = lease.mark_consumed()
        self._counters.add("confirms", int(consumed))
        return _OK if consumed else Status.STALE

    def _reply(self, reply: Reply) -> None:
        counter = _COUNTED.get(reply.status)
        if counter is not None:
            self._counters.add(counter)
        self._reply_pending = self._endpoint.post_send(reply.message)

    async def _release(self) -> None:
        with anyio.CancelScope(shield=True):  # bounded by the link; a stopping port still gives its slots back
            ended = await self._endpoint.close()
        lease, send = self._lease, self._send
        if ended or send is None or lease is None or send.completed:
            self._finalise()
            return
        self._lease = self._send = None
        self._counters.add("stuck_sends")
        self._keep_stuck(StuckSend(send, lease, self._delivered))


def _status_of(error: TransportError) -> Status:
    if isinstance(error, StaleSlotError):
        return Status.STALE
    if isinstance(error, BusyError):
        return Status.BUSY
    if isinstance(error, SlotError):
        return Status.BAD_REQUEST
    return Status.INTERNAL if not error.retryable else Status.BUSY
