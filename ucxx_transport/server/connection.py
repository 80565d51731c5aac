"""One connection of a port, as callbacks of its reactor: frames in, the session's actions done, answers out.

A read attempt has one owner, its entry in the session, and one end:

| its message                     | its end           | then                                               |
|---------------------------------|-------------------|----------------------------------------------------|
| is on its way                   | is here           | nothing yet: UCX still reads the slot              |
| has left                        | is not here       | the session's limit for the acknowledgement counts |
| has left                        | is here           | it is consumed if delivered, else released         |
| ended with the connection       | is here, or never | likewise; without an end it is released            |
| outlived even the connection    | is here, or never | the port keeps it until the message is over        |
"""

from __future__ import annotations

from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple

from ucxx_transport.errors import BusyError, PeerLostError, SlotError, StaleSlotError, TransportError
from ucxx_transport.logs import get_logger
from ucxx_transport.ring.layout import HOLD_NBYTES
from ucxx_transport.server.counters import REQUESTS
from ucxx_transport.server.takes import NO_EPOCH
from ucxx_transport.wire.actions import End, Reply, Serve, Settle, Take
from ucxx_transport.wire.frames import FRAME_BYTES, MAX_CHANNEL, PACK_BYTES, Status, message_bytes
from ucxx_transport.wire.server_side import Phase

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from ucxx_transport.link.base import Endpoint, Message, Operation
    from ucxx_transport.server.port import Port
    from ucxx_transport.wire.actions import Action, Attempt
    from ucxx_transport.wire.server_side import Limit, ServerSession

_log = get_logger(__name__)

FRAMES_POSTED: Final = 4
"""Receives for frames: a client's next ones arrive while one is handled."""

MAX_COPIED_BYTES: Final = 512 << 10
"""Bytes on their way that are no slot's, of answers and of packed payloads, at which no further frame is handled."""

MAX_PACK_BUFFERS: Final = 16
"""Kept by a port for further packed payloads."""

# An enum's attribute costs 0.3 µs in Python 3.11; these are on the hot path.
_CLOSING: Final = Phase.CLOSING
_OK: Final = Status.OK
_STALE: Final = Status.STALE
_BUSY: Final = Status.BUSY
_NOT_READY: Final = Status.NOT_READY
_BAD_REQUEST: Final = Status.BAD_REQUEST
_COUNTED: Final = {
    Status.STALE: "stale",
    Status.NOT_READY: "not_ready",
    Status.BUSY: "busy",
    Status.BAD_REQUEST: "bad_requests",
    Status.UNAUTHORIZED: "unauthorized",
    Status.INTERNAL: "internal",
}
_LOCKED: Final = "the ring's lock is held by a process that does not get on"


class Refusal(NamedTuple):
    """Why the ring gives a slot not now, or never."""

    status: Status
    text: str


class Connection:
    """Serves one endpoint until it closes, breaks the protocol or exceeds a time limit; it hears the endpoint's events.

    Args:
        port: whose connection it is.
        session: its half of the protocol.
        endpoint: its own from now on.
        is_admitted: False above the limit of connections: it only waits for its BUSY.

    Attributes:
        is_closing: nothing is served any more.
        is_deferred: the port comes to its next frame.
    """

    __slots__ = (
        *("_copied_bytes", "_endpoint", "_is_full", "_on_frame_done", "_receives", "_turn"),
        *("is_admitted", "is_closing", "is_deferred", "port", "session"),
    )

    def __init__(self, port: Port, session: ServerSession, endpoint: Endpoint, *, is_admitted: bool) -> None:
        self.port = port
        self.session = session
        self.is_admitted = is_admitted
        self.is_closing = self.is_deferred = False
        self._endpoint = endpoint
        self._receives: deque[tuple[Operation, Message, bytearray]] = deque()
        self._on_frame_done = self._on_frame
        self._turn = -1
        self._copied_bytes = 0
        self._is_full = False

    def open(self) -> None:
        """Begin to take frames."""
        try:
            for _ in range(FRAMES_POSTED):
                frame = bytearray(FRAME_BYTES)
                message = self.port.reactor.link.message(frame)
                self._receives.append((self._endpoint.post_receive(message, self._on_frame_done), message, frame))
        except TransportError as error:
            self.fail(error)

    @property
    def is_serving(self) -> bool:
        """Whether the client may still be answered."""
        return not self.is_closing and self.session.phase is not _CLOSING

    def connected(self) -> None:
        """The endpoint's hello has come: nothing to do, the client speaks first."""

    def lost(self, error: TransportError) -> None:
        """The client has closed, or died."""
        del error
        self.close()

    # --- Frames ---

    def _on_frame(self, operation: Operation) -> None:
        if operation.error is not None:
            self.close()  # a message longer than any frame, or the end of the connection
        elif self.is_closing:
            self._hear_out()
        elif not self.is_deferred:
            turn = self.port.reactor.turns
            if turn == self._turn:
                self._defer()
            else:
                self._turn = turn
                self.serve_next()

    def serve_next(self) -> None:
        """Handle the next frame, if it has arrived; one that waits behind it comes after those of others."""
        receives = self._receives
        if self._is_full or self.is_closing or not receives:
            return
        operation, message, frame = receives[0]
        if not operation.completed or operation.error is not None:
            return
        del receives[0]
        session, finish = self.session, self.port.finish
        try:
            for action in session.receive(frame, self.port.now()):
                if isinstance(action, End):
                    if action.attempt.sent_s is not None:
                        finish(action.attempt)
                elif isinstance(action, Serve) and not action.shared:
                    self.serve(action.attempts)
                else:
                    self._answer(action)
            if session.phase is _CLOSING:
                return  # the client closes, or the sweep does
            receives.append((self._endpoint.post_receive(message, self._on_frame_done), message, frame))
        except Exception as error:  # noqa: BLE001 - the edge of a callback: one connection's bug leaves the port up
            self.fail(error)
        if receives and receives[0][0].completed:
            self._defer()

    def _defer(self) -> None:
        if not self.is_deferred:
            self.is_deferred = True
            self.port.defer(self)

    # --- Attempts ---

    def serve(self, attempts: Iterable[Attempt]) -> None:
        """Send each slot, in a message of its own. Those of a TAKE have their lease already."""
        port, session, post_send = self.port, self.session, self._endpoint.post_send
        answers = port.answers
        for attempt in attempts:
            if attempt.lease is None:
                refusal = self._acquire(attempt)
                if refusal is not None:
                    self.reply(session.refused(attempt, *refusal))
                    continue
            message, _ = answers.get((attempt.slot, attempt.nbytes)) or port.prepare(attempt)
            send = attempt.send = post_send(message, channel=attempt.number & MAX_CHANNEL)
            if not send.completed:
                send.on_done = partial(self._on_sent, attempt)
            elif send.error is None:
                session.sent(attempt, port.now())
            else:
                self.close()

    def _serve_packed(self, serve: Serve) -> None:
        """Copy the slots into one message, and send that."""
        port, acquired, offset = self.port, [], 0
        buffer = port.pack_buffers.pop() if port.pack_buffers else bytearray(PACK_BYTES)
        room = memoryview(buffer)
        for attempt in serve.attempts:
            end = offset + message_bytes(attempt.nbytes)
            refusal = self._acquire(attempt)
            if refusal is None:
                _, room[offset:end] = port.answers.get((attempt.slot, attempt.nbytes)) or port.prepare(attempt)
                acquired.append(attempt)
            else:
                self._count(refusal.status)
                room[offset:end] = self.session.refused_part(attempt, *refusal)
            offset = end
        port.counters.add("packed", len(acquired))
        send = self._endpoint.post_send(room[:offset], channel=serve.shared)
        for attempt in acquired:
            attempt.send = send
        on_sent = partial(self._on_packed_sent, acquired, buffer)
        self._copied_bytes += offset
        if send.completed:
            on_sent(send)
        else:
            send.on_done = on_sent
            self._is_full = self._copied_bytes >= MAX_COPIED_BYTES

    def _acquire(self, attempt: Attempt) -> Refusal | None:
        """Enter the attempt at its slot; why not, if so."""
        port = self.port
        port.words[REQUESTS] += 1
        if port.awaited[0]:
            return Refusal(_NOT_READY, NO_EPOCH)
        if port.locked_turn == port.reactor.turns:
            return Refusal(_BUSY, _LOCKED)
        try:
            lease = attempt.lease = port.ring.acquire_slot(attempt.slot, attempt.generation, reader=self.session.reader)
        except TransportError as error:
            port.note_lock(error)
            return Refusal(_status_of(error), error.message)
        nbytes = lease.words[HOLD_NBYTES]
        if nbytes != attempt.nbytes:
            port.finish(attempt)
            return Refusal(_BAD_REQUEST, f"the payload has {nbytes} bytes, the reference says {attempt.nbytes}")
        return None

    def _on_sent(self, attempt: Attempt, operation: Operation) -> None:
        if operation.error is not None:
            self.close()
            if not operation.completed:
                return  # UCX has not released the slot, although the connection ends
        if self.session.sent(attempt, self.port.now()):
            self.port.finish(attempt)

    def _on_packed_sent(self, attempts: Sequence[Attempt], buffer: bytearray, operation: Operation) -> None:
        port = self.port
        if operation.error is not None:
            self.close()
        if operation.completed:
            if len(port.pack_buffers) < MAX_PACK_BUFFERS:
                port.pack_buffers.append(buffer)
            for attempt in self.session.sent_shared(attempts, port.now()):
                port.finish(attempt)
        self._copy_left(operation)

    # --- What is no FETCH ---

    def _answer(self, action: Action) -> None:
        if isinstance(action, Reply):
            self.reply(action)
        elif isinstance(action, Serve):
            self._serve_packed(action)
        elif isinstance(action, Take):
            self.port.takes.begin(self, action)
        elif isinstance(action, Settle):
            self.reply(self.session.settled(action, self._settle(action.names)))

    def _settle(self, names: Iterable[tuple[int, int]]) -> list[Status]:
        """Consume what the client has had of these, as far as it is still there."""
        port, statuses = self.port, []
        for slot, generation in names:
            status = _BUSY
            if port.locked_turn != port.reactor.turns:
                try:
                    consumed = port.ring.acquire_slot(slot, generation, reader=self.session.reader).mark_consumed()
                    port.counters.add("confirms", int(consumed))
                    status = _OK if consumed else _STALE
                except TransportError as error:
                    port.note_lock(error)
                    status = _BUSY if error.retryable else _STALE
            statuses.append(status)
        return statuses

    def reply(self, reply: Reply) -> None:
        """Send an answer that is no payload."""
        self._count(reply.status)
        send = self._endpoint.post_send(reply.message, channel=reply.channel)
        self._copied_bytes += send.nbytes
        if send.completed:
            self._on_replied(send)
        else:
            send.on_done = self._on_replied
            self._is_full = self._copied_bytes >= MAX_COPIED_BYTES

    def _on_replied(self, operation: Operation) -> None:
        self.session.replied()
        if operation.error is not None:
            self.close()
        self._copy_left(operation)

    def _count(self, status: Status) -> None:
        counter = _COUNTED.get(status)
        if counter is not None:
            self.port.counters.add(counter)

    def _copy_left(self, operation: Operation) -> None:
        self._copied_bytes -= operation.nbytes
        if self._is_full and self._copied_bytes < MAX_COPIED_BYTES:
            self._is_full = False
            self._defer()

    # --- The end ---

    def limit(self) -> Limit:
        """When its time is up, as things are."""
        return self.session.limit()

    def close(self) -> None:
        """Break the connection; what it holds is given back once nothing is on its way any more. Idempotent."""
        if not self.is_closing:
            self.is_closing = True
            self._hear_out()
            self._endpoint.close(self._on_closed)

    def fail(self, error: Exception) -> None:
        """Close it, with a log line unless the client is just gone."""
        if not isinstance(error, TransportError):
            _log.exception("connection_crashed", peer=self._endpoint.peer)
        elif not isinstance(error, PeerLostError):
            _log.warning("connection_failed", peer=self._endpoint.peer, reason=str(error))
        self.close()

    def _hear_out(self) -> None:
        """What the client said before it left counts: its ends and its confirmations."""
        receives, session = self._receives, self.session
        try:
            while receives and receives[0][0].completed and session.phase is not _CLOSING:
                operation, _, frame = receives.popleft()
                if operation.error is not None:
                    return
                for action in session.receive(frame, self.port.now()):
                    if isinstance(action, End) and action.attempt.sent_s is not None:
                        self.port.finish(action.attempt)
                    elif isinstance(action, Settle):
                        self._settle(action.names)
        except Exception as error:  # noqa: BLE001 - the edge of a callback
            self.fail(error)

    def _on_closed(self, clean: bool) -> None:  # noqa: FBT001 - the link's callback
        del clean  # what has not ended is looked at one by one
        session = self.session
        for attempt in (*session.in_flight.values(), *session.leaving.values()):
            send = attempt.send
            if send is not None and not send.completed:
                self.port.keep_stuck(attempt)
            else:
                self.port.finish(attempt)
        self.port.forget(self)


def _status_of(error: TransportError) -> Status:
    if isinstance(error, StaleSlotError):
        return _STALE
    if isinstance(error, BusyError):
        return _BUSY
    if isinstance(error, SlotError):
        return _BAD_REQUEST
    return _BUSY if error.retryable else Status.INTERNAL
