"""One connection of a port, as callbacks of its reactor: frames in, the session's actions done, answers out.

A read attempt has one owner, its entry in the session, and one end:

| its message                     | its end           | then                                               |
|---------------------------------|-------------------|----------------------------------------------------|
| is on its way                   | is here           | UCX still reads the slot; a delivery is recorded   |
| has left                        | is not here       | the session's limit for the acknowledgement counts |
| has left                        | is here           | it is consumed if delivered, else released         |
| ended with the connection       | is here, or never | likewise; without an end it is released            |
| outlived even the connection    | is here, or never | the port keeps it until the message is over        |
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Final

from ucxx_transport.errors import ConfigError, PeerLostError, ProtocolError, TransportError
from ucxx_transport.link.base import Message, Operation
from ucxx_transport.link.endpoint import Endpoint
from ucxx_transport.logs import get_logger
from ucxx_transport.ring import layout
from ucxx_transport.ring.leases import ReadLease
from ucxx_transport.server.slots import NO_EPOCH, Slots
from ucxx_transport.wire.actions import Action, Attempt, Reply, Serve, Settle, Take
from ucxx_transport.wire.codec import status_of
from ucxx_transport.wire.frames import FRAME_BYTES, MAX_CHANNEL, PACK_BYTES, OfferedPayload, Status, message_bytes
from ucxx_transport.wire.server_side import Phase, ServerSession

_log = get_logger(__name__)

FRAMES_POSTED: Final = 4  # receives for frames: a client's next ones arrive while one is handled
# Frames that have arrived and are not handled: more than an end and a name for each attempt of both windows. Those
# behind the last answer never are: a client's whole window may be on its way, no flood.
MAX_FRAMES: Final = 256
MAX_COPIED_BYTES: Final = 512 << 10  # on their way that are no slot's, at which no further frame is handled
# An enum's attribute costs 0.3 µs in Python 3.11; these are on the hot path.
_CLOSING: Final = Phase.CLOSING
_COUNTERS: Final = {
    Status.STALE: "stale",
    Status.NOT_READY: "not_ready",
    Status.BUSY: "busy",
    Status.BAD_REQUEST: "bad_requests",
    Status.UNAUTHORIZED: "unauthorized",
    Status.INTERNAL: "internal",
}


class Connection:
    """Serves one endpoint, which is its own, until it closes, breaks the protocol or exceeds a time limit."""

    def __init__(
        self,
        slots: Slots,
        session: ServerSession,
        endpoint: Endpoint,
        wait: Callable[[Connection, Take], None],
        forget: Callable[[Connection], None],
    ) -> None:
        self._slots, self._reactor = slots, slots.reactor
        self.session = session
        self._wait = wait  # has `answer_take` called again and again until that has answered
        self._forget = forget  # is called once it is closed, and holds nothing any more
        self.is_closing = self._is_deferred = False
        self._endpoint = endpoint
        endpoint.channels = 1
        self._receives: deque[tuple[Operation, Message, bytearray]] = deque()
        self._turn = -1
        self._arrived = self._copied_bytes = 0  # the first: frames that are not handled yet

    def lost(self, _error: TransportError) -> None:
        self.close()

    def take_in(self) -> None:
        """Post receives, ahead of the client: what goes beyond all that were posted UCX would keep, without bound."""
        receives = self._receives
        try:
            while len(receives) < FRAMES_POSTED or receives[-1][0].completed:
                if len(receives) >= MAX_FRAMES:
                    raise ProtocolError("the client sends on and on without its answers", frames=len(receives))
                frame = bytearray(FRAME_BYTES)
                message = self._reactor.link.message(frame)
                receives.append((self._endpoint.post_receive(message, self._on_frame), message, frame))
        except TransportError as error:
            self.fail(error)

    def _on_frame(self, operation: Operation) -> None:
        if operation.error is not None:
            self.close()  # a message longer than any frame, or the end of the connection
            self._receives.clear()
            self._arrived = 0
            return
        self._arrived += 1
        if self._arrived == len(self._receives) and not self.is_closing:
            self.take_in()
        if self.is_closing:
            self._hear_out()
        elif not self._is_deferred:
            if self._turn == self._reactor.turns:
                self._defer()
            else:
                self._serve_next()

    def _serve_next(self) -> None:
        """Handle the next frame; unless it brings ends alone, the one behind it has a later turn."""
        receives, session = self._receives, self.session
        if self._copied_bytes >= MAX_COPIED_BYTES or session.phase is _CLOSING:
            return
        _, message, frame = receives.popleft()
        self._arrived -= 1
        now = self._reactor.now()
        try:
            actions = session.receive(frame, now)
            if actions:
                self._perform(actions, now)
            else:
                self._turn = self._reactor.turns
            if len(receives) < FRAMES_POSTED and not self.is_closing:
                receives.append((self._endpoint.post_receive(message, self._on_frame), message, frame))
        except Exception as error:  # noqa: BLE001 - the edge of a callback: one connection's bug leaves the port up
            self.fail(error)
        if self._arrived:
            self._defer()

    def _perform(self, actions: Iterable[Action], now: float) -> None:
        """Do what is to be done; once the connection is closing, only the ends that its client has sent."""
        slots, session = self._slots, self.session
        for action in actions:
            if isinstance(action, Attempt):
                if action.sent_s is None:
                    slots.record(action, session.reader)
                else:
                    slots.finish(action)
                continue
            self._turn = self._reactor.turns
            if isinstance(action, Settle):
                statuses = slots.consume(action.names, session.reader)
                if not self.is_closing:
                    self.reply(session.settled(action, statuses))
            elif self.is_closing:
                return
            elif isinstance(action, Serve):
                self.serve(action, now)
            elif isinstance(action, Reply):
                self.reply(action)
            elif not self.answer_take(action):
                self._wait(self, action)

    def _defer(self) -> None:
        if not self._is_deferred:
            self._is_deferred = True
            self._reactor.call_at(self._reactor.now(), self._serve_deferred)

    def _serve_deferred(self) -> None:
        self._is_deferred = False
        if self._arrived and not self.is_closing:
            self._serve_next()

    def serve(self, serve: Serve, now: float) -> None:
        """Send each slot, in a message of its own unless they share one. Those of a TAKE have their lease already."""
        slots, session, post_send = self._slots, self.session, self._endpoint.post_send
        if serve.shared:
            self._serve_packed(serve)
            return
        for attempt in serve.attempts:
            try:
                answer = slots.acquire(attempt, session.reader) if attempt.lease is None else slots.answer_of(attempt)
            except TransportError as error:
                self.reply(session.refused(attempt, status_of(error), error.message))
                continue
            send = post_send(answer, channel=attempt.number & MAX_CHANNEL)
            if send.completed and send.error is None:
                attempt.sent_s = session.moved_s = now
            elif send.completed:
                self.close()
            else:
                attempt.send = send
                send.on_done = partial(self._on_sent, (attempt,))

    def _serve_packed(self, serve: Serve) -> None:
        """Copy the slots into one message, and send that."""
        slots, acquired, offset = self._slots, [], 0
        room = memoryview(bytearray(PACK_BYTES))
        for attempt in serve.attempts:
            end = offset + message_bytes(attempt.nbytes)
            try:
                room[offset:end] = slots.acquire(attempt, self.session.reader).view
                acquired.append(attempt)
            except TransportError as error:
                self._count(status_of(error))
                room[offset:end] = self.session.refused_part(attempt, status_of(error), error.message)
            offset = end
        slots.counters.add("packed", len(acquired))
        self._send_copied(room[:offset], serve.shared, acquired)

    def _on_sent(self, attempts: Sequence[Attempt], operation: Operation) -> None:
        if operation.error is not None:
            self.close()
        if operation.completed:  # else UCX has not released the memory, although the connection ends
            for attempt in attempts:
                if self.session.sent(attempt, self._reactor.now()):
                    self._slots.finish(attempt)

    def answer_take(self, take: Take) -> bool:
        """By payloads, or by nothing once its time has come. False: there is none, and it has time."""
        slots, session, now = self._slots, self.session, self._reactor.now()
        if self.is_closing or session.phase is _CLOSING:
            return True
        if slots.awaited[0]:
            self.reply(session.nothing(take, NO_EPOCH, Status.NOT_READY))
            return True
        max_payloads, max_bytes = session.take_room(take)
        leases: list[ReadLease] = []
        try:
            leases = slots.take(max_payloads, max_bytes=max_bytes, newest=take.newest, reader=session.reader)
        except ConfigError as error:  # the next one is larger than that
            if max_bytes == take.max_bytes:
                self.reply(session.nothing(take, error.message))
                return True
        if leases:
            reply, attempts = session.taken(take, [_offered(lease) for lease in leases], now)
            for attempt, lease in zip(attempts, leases, strict=True):
                attempt.lease = lease
            self.reply(reply)
            self.serve(Serve(attempts, 0), now)
        elif now < take.until_s:
            return False
        else:
            self.reply(session.nothing(take))
        return True

    def reply(self, reply: Reply) -> None:
        """Send an answer that is no payload."""
        self._count(reply.status)
        self._send_copied(reply.message, reply.channel)

    def _send_copied(self, message: object, channel: int, attempts: Sequence[Attempt] = ()) -> None:
        """Send what is no slot's: a reply, or what of these attempts has been copied."""
        send = self._endpoint.post_send(message, channel=channel)
        self._copied_bytes += send.nbytes
        for attempt in attempts:
            attempt.send = send
        if send.completed:
            self._on_copied_sent(attempts, send)
        else:
            send.on_done = partial(self._on_copied_sent, attempts)

    def _on_copied_sent(self, attempts: Sequence[Attempt], operation: Operation) -> None:
        self._copied_bytes -= operation.nbytes
        if operation.completed:
            self.session.replied()
        self._on_sent(attempts, operation)
        if operation.error is None and self._arrived:
            self._defer()

    def _count(self, status: Status) -> None:
        if status in _COUNTERS:
            self._slots.counters.add(_COUNTERS[status])

    def close(self) -> None:
        """Break it; what it holds is given back once nothing is on its way any more. Idempotent."""
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
        try:
            while self._arrived and self.session.phase is not _CLOSING:
                self._arrived -= 1
                now = self._reactor.now()
                self._perform(self.session.receive(self._receives.popleft()[2], now), now)
        except Exception as error:  # noqa: BLE001 - the edge of a callback
            self.fail(error)

    def _on_closed(self, _clean: bool) -> None:  # noqa: FBT001 - the link's callback
        self._slots.abandon([*self.session.in_flight.values(), *self.session.leaving.values()])
        self._forget(self)


def _offered(lease: ReadLease) -> OfferedPayload:
    words = lease.words
    checksum = words[layout.HOLD_CHECKSUM] if words[layout.HOLD_HAS_CHECKSUM] else None
    slot, generation, nbytes = words[layout.HOLD_SLOT], words[layout.HOLD_GENERATION], words[layout.HOLD_NBYTES]
    envelope = lease.envelope if words[layout.HOLD_ENVELOPE_BYTES] else b""
    return OfferedPayload(slot, generation, nbytes, checksum, words[layout.HOLD_COMMIT_TIME], envelope)
