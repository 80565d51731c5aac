"""One connection of a client: opened, greeted, filled with requests as far as its windows allow, closed.

There is one for each (address, port) that is read from; see `connections`. Everything here runs in the thread that runs
the reactor.

| a connection is | because                                         | what waits in its queue                    |
|-----------------|-------------------------------------------------|--------------------------------------------|
| waiting         | there are no descriptors for another one        | stays                                      |
| connecting      | it was asked for; at most `connect_timeout_s`   | stays, as long as each attempt may take    |
| open            | the handshake is over                           | is posted as the windows have room         |
| slow            | open, but an attempt has exceeded its time      | goes to the source's other ports, or stays |
| closed          | it was lost, broke the protocol, was not needed | is moved, or fails                         |

A connection belongs to the pool, not to the read that asked for it: when that read gives up, it is completed and kept.
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final, Protocol

from ucxx_transport.client.ports import PortKey
from ucxx_transport.errors import PeerLostError, ProtocolError, StaleSlotError, TransportError
from ucxx_transport.link.base import DATA_PORT_SILENT
from ucxx_transport.schema import Schema
from ucxx_transport.wire.client_side import (
    BYE_RECEIVE_BYTES,
    CONFIRM_RECEIVE_BYTES,
    DESCRIBE_RECEIVE_BYTES,
    HANDSHAKE_RECEIVE_BYTES,
    ClientSession,
)
from ucxx_transport.wire.codec import clear_ends
from ucxx_transport.wire.frames import (
    ERROR_TEXT_BYTES,
    HEADER_BYTES,
    MAX_CHANNEL,
    MAX_NAMES,
    NONCE_BYTES,
    PACK_BYTES,
    TRAILER_BYTES,
    Status,
    offer_receive_bytes,
)

if TYPE_CHECKING:
    from ucxx_transport.client.buffer_pool import Bytes
    from ucxx_transport.client.connections import Connections
    from ucxx_transport.client.reads import Read
    from ucxx_transport.client.takes import Take
    from ucxx_transport.link.base import Endpoint, Operation
    from ucxx_transport.link.reactor import Timer
    from ucxx_transport.wire.actions import Asked, Offered
    from ucxx_transport.wire.answers import Named

OWN_WINDOW_BYTES: Final = 2 << 20
"""In flight on one connection, unless two payloads are more: large ones would only hinder each other."""

SMALL_BYTES: Final = PACK_BYTES // 2
"""Answers up to this size share a message."""

_FRAMING: Final = HEADER_BYTES + TRAILER_BYTES
_SHORTEST: Final = HEADER_BYTES + ERROR_TEXT_BYTES


class Errand(Protocol):
    """Something else than reads by name that a connection is needed for."""

    def start(self, connection: Connection) -> None:
        """The connection is open."""

    def lost(self, error: TransportError) -> None:
        """It failed, or was never open."""


class Attempt:
    """One payload asked for over one connection.

    Attributes:
        read: who waits for it; None: the answer is not wanted any more, and ended as not delivered.
        ref: the payload.
        number: the session's.
        message: the buffer, or part of one, that its answer lies in.
        due_s: when it has taken too long.
        late: it has.
    """

    __slots__ = ("connection", "due_s", "late", "message", "number", "read", "ref")

    def __init__(
        self, connection: Connection, read: Read | None, ref: Named, number: int, message: Bytes, due_s: float
    ) -> None:
        self.connection = connection
        self.read = read
        self.ref = ref
        self.number = number
        self.message = message
        self.due_s = due_s
        self.late = False

    def arrived(self, operation: Operation) -> None:
        """Its receive is over."""
        connection = self.connection
        if operation.error is None:
            connection.proved = True
            connection.take(self)
            connection.after_answers()
        else:
            connection.receive_failed(operation.error)


class SharedMessage:
    """One message that brings the answers to several attempts."""

    __slots__ = ("attempts",)

    def __init__(self, attempts: list[Attempt]) -> None:
        self.attempts = attempts

    def arrived(self, operation: Operation) -> None:
        """The receive is over."""
        connection = self.attempts[0].connection
        if operation.error is not None:
            connection.receive_failed(operation.error)
            return
        connection.proved = True
        for attempt in self.attempts:
            if connection.closed:
                return  # the answer before was not as the protocol has it
            connection.take(attempt)
        connection.after_answers()


class Connection:
    """One endpoint and the client's half of its protocol. It is the endpoint's `EndpointEvents`.

    Attributes:
        key: where it leads to.
        queue: reads that wait to be posted.
        attempts: asked for and not answered, by number.
        late: how many of them have exceeded their time.
        is_open: whether the handshake is over.
        closed: whether it is.
        used: whether it has lain idle since it was opened.
        proved: whether anything was answered since it lay idle.
        used_s: when it was last given a read.
    """

    def __init__(self, pool: Connections, key: PortKey) -> None:
        self._pool = pool
        self._reads = pool.reads
        self.key = key
        self.queue: deque[Read] = deque()
        self.attempts: dict[int, Attempt] = {}
        self.late = 0
        self.is_open = False
        self.closed = False
        self.used = False
        self.proved = False
        self.used_s = 0.0
        self._in_flight_bytes = 0
        self._undescribed: dict[int, list[Attempt] | TransportError] = {}
        self._errands: list[Errand] = []
        self._running: list[Errand] = []
        self._endpoint: Endpoint | None = None
        self._timer: Timer | None = None
        self._session = ClientSession(
            reader=pool.reads.reader, nonce=secrets.token_bytes(NONCE_BYTES), token=pool.config.token_bytes
        )

    # --- Opening ---

    def start(self) -> None:
        """Connect; `waiting` is over."""
        reactor = self._pool.reactor
        self._timer = reactor.call_at(reactor.now() + self._pool.config.connect_timeout_s, self._too_slow_to_open)
        reactor.resolve(self.key[0], self._resolved)

    @property
    def idle(self) -> bool:
        """Whether it is open and nothing uses it."""
        return self.is_open and not (self.attempts or self.queue or self._errands or self._running)

    def connected(self) -> None:
        """See `EndpointEvents`: the handshake's frames are under way already."""

    def lost(self, error: TransportError) -> None:
        """See `EndpointEvents`."""
        self.fail(error)

    def _resolved(self, address: str | PeerLostError) -> None:
        if self.closed:
            return
        if isinstance(address, PeerLostError):
            self.fail(address)
            return
        try:
            self._endpoint = self._pool.reactor.link.connect(address, self.key[1], self)
        except TransportError as error:
            self.fail(error)
            return
        self._ask(self._session.hello(), HANDSHAKE_RECEIVE_BYTES, self._welcomed)

    def _too_slow_to_open(self) -> None:
        endpoint = self._endpoint
        silent = endpoint is not None and endpoint.listener_has_answered()
        unknown = "no answer to the handshake within connect_timeout_s; is a ucxx_transport server there?"
        host, port = self.key
        self.fail(PeerLostError(DATA_PORT_SILENT if silent else unknown, host=host, port=port, reason="unreachable"))

    def _welcomed(self, asked: Asked, answer: bytearray) -> None:
        del asked
        challenge = self._session.on_welcome(answer)
        if challenge is None:
            self._opened()
        else:
            self._ask(challenge, HANDSHAKE_RECEIVE_BYTES, self._authenticated)

    def _authenticated(self, asked: Asked, answer: bytearray) -> None:
        del asked
        self._session.on_authenticated(answer)
        self._opened()

    def _opened(self) -> None:
        assert self._timer is not None
        self._timer.cancel()
        self._timer = None
        self.is_open = True
        self._pool.counters.add("connections")
        for read in self.queue:
            read.due_s = read.limit_s
        errands, self._errands = self._errands, []
        for errand in errands:
            errand.start(self)
        self.pump()
        if self._pool.waiting:
            self._pool.rested(self)

    # --- Reading ---

    def pump(self) -> None:
        """Ask for what waits, as far as both windows have room; ends that wait go along."""
        queue = self.queue
        while queue and self.is_open and not self.late and not self.closed:
            if len(self.attempts) > 1 and self._in_flight_bytes > OWN_WINDOW_BYTES // 2:
                return  # many names a frame, rather than one for each answer
            if not self._post_some():
                return

    def _post_some(self) -> bool:
        """Post one frame; whether there was room for it."""
        queue, session, pool = self.queue, self._session, self._pool
        reads: list[Read] = []
        refs: list[Named] = []
        ring_id = b""
        total = shared_bytes = 0
        while queue and len(reads) < MAX_NAMES:
            read = queue[0]
            if read.job is None:
                queue.popleft()
                continue
            ref = read.ref
            nbytes = ref.nbytes
            whole = _FRAMING + ((nbytes + 7) & ~7)
            count = len(reads)
            if count:
                if ref.ring_id != ring_id or (whole > SMALL_BYTES) is bool(shared_bytes):
                    break
                if shared_bytes and shared_bytes + whole > PACK_BYTES:
                    break
            asked = len(self.attempts) + count
            if asked > 1 and self._in_flight_bytes + total + nbytes > OWN_WINDOW_BYTES:
                break
            if not session.room(total + nbytes, count + 1):
                break
            if not count:
                ring_id = ref.ring_id
            if whole <= SMALL_BYTES:
                shared_bytes += whole
            total += nbytes
            queue.popleft()
            reads.append(read)
            refs.append(ref)
        if not reads:
            return False
        if pool.unsettled and ring_id in pool.unsettled:
            self.settle(ring_id)
        fingerprint = refs[0].fingerprint
        if fingerprint and fingerprint not in pool.schemas and fingerprint not in self._undescribed:
            self._describe(ring_id, fingerprint)
        if not self.closed:
            self._post(reads, refs, total, shared_bytes if len(reads) > 1 else 0)
        else:
            queue.extendleft(reversed(reads))
            self._reads.requeue(self)
        return True

    def _post(self, reads: list[Read], refs: list[Named], total: int, shared_bytes: int) -> None:
        lend, attempts, fail = self._pool.lend, self.attempts, self._reads.no_memory
        messages: list[Bytes] = []
        whole: Bytes | None = None
        if shared_bytes:
            try:
                whole = lend(shared_bytes)
            except TransportError as error:
                for read in reads:
                    fail(read, error)
                return
            whole.fill(0)  # nothing of an earlier answer may pass for one of these; 2 µs
            start = 0
            for ref in refs:
                end = start + _FRAMING + ((ref.nbytes + 7) & ~7)
                messages.append(whole[start:end])
                start = end
        else:
            for index in range(len(reads) - 1, -1, -1):
                nbytes = refs[index].nbytes
                try:
                    message = lend(max(_FRAMING + ((nbytes + 7) & ~7), _SHORTEST))
                except TransportError as error:
                    fail(reads.pop(index), error)
                    total -= refs.pop(index).nbytes
                    continue
                clear_ends(message.data, nbytes)
                messages.append(message)
            messages.reverse()
            if not reads:
                return
        frame, numbers, shared = self._session.fetch(refs, packed=bool(shared_bytes))
        self._in_flight_bytes += total
        due_of = self._reads.attempt_due_s
        posted = []
        for read, ref, number, message in zip(reads, refs, numbers, messages, strict=True):
            attempt = Attempt(self, read, ref, number, message, due_of(read))
            attempts[number] = attempt
            read.attempt = attempt
            posted.append(attempt)
        endpoint = self._endpoint
        assert endpoint is not None
        try:
            if whole is not None:
                endpoint.post_receive(whole.data, SharedMessage(posted).arrived, channel=shared & MAX_CHANNEL)
            else:
                for attempt in posted:
                    endpoint.post_receive(attempt.message.data, attempt.arrived, channel=attempt.number & MAX_CHANNEL)
            endpoint.post_send(frame)
        except TransportError as error:
            self.fail(error)

    def ask_one(self, read: Read, due_s: float) -> None:
        """Ask for a read while nothing else is in flight here, so that the windows have room; as `_post`."""
        ref = read.ref
        nbytes = ref.nbytes
        whole = _FRAMING + ((nbytes + 7) & ~7)
        try:
            message = self._pool.lend(whole if whole > _SHORTEST else _SHORTEST)  # noqa: FURB136 - `max` takes longer
        except TransportError as error:
            self._reads.no_memory(read, error)
            return
        data = message.data
        clear_ends(data, nbytes)
        frame, numbers, _ = self._session.fetch((ref,))
        number = numbers[0]
        attempt = read.attempt = self.attempts[number] = Attempt(self, read, ref, number, message, due_s)
        self._in_flight_bytes += nbytes
        endpoint = self._endpoint
        assert endpoint is not None
        try:
            endpoint.post_receive(data, attempt.arrived, channel=number & MAX_CHANNEL)
            endpoint.post_send(frame)
        except TransportError as error:
            self.fail(error)

    def take(self, attempt: Attempt) -> None:
        """An attempt's answer has come."""
        ref, session = attempt.ref, self._session
        try:
            session.verify(attempt.number, attempt.message.data)
        except TransportError as error:
            error.__traceback__ = None  # its frames hold the message
            self._answered(attempt)
            self._reads.refused(attempt, error)
            if session.broken:
                self.fail(PeerLostError("closed after an answer that broke the protocol", reason="aborted"))
            return
        if ref.fingerprint and ref.fingerprint not in self._pool.schemas and attempt.read is not None:
            waiting = self._undescribed[ref.fingerprint]  # it was asked for with the payload
            if isinstance(waiting, TransportError):
                self._answered(attempt)
                self._reads.refused(attempt, waiting)
                session.end(attempt.number, delivered=False)
            else:
                waiting.append(attempt)
            return
        del self.attempts[attempt.number]  # as `_answered`
        self._in_flight_bytes -= ref.nbytes
        if attempt.late:
            self.late -= 1
        delivered = self._reads.arrived(attempt)
        if delivered is not None:
            session.end(attempt.number, delivered=delivered)

    def end_held(self, attempt: Attempt, *, delivered: bool) -> None:
        """End an attempt that was kept in suspense; where the connection is lost meanwhile, by the next one."""
        if not self.closed:
            self._session.end(attempt.number, delivered=delivered)
            self.send_ends()
        elif delivered:
            self._pool.owe((attempt.ref,))

    def _answered(self, attempt: Attempt) -> None:
        """An attempt is in flight no more."""
        del self.attempts[attempt.number]
        self._in_flight_bytes -= attempt.ref.nbytes
        if attempt.late:
            self.late -= 1

    def after_answers(self) -> None:
        """What has come is taken: ask for more, and see that the ends leave."""
        if self.closed:
            self._reads.settle()
            return
        if self.queue:
            self.pump()
        if self._session.ends_waiting:
            if self.attempts and not self._reads.finished:
                self._pool.delay_ends(self)
            else:
                self.send_ends()
        if not self.attempts and not self.queue:
            self.used = True
            self.proved = False
            if self._pool.waiting:
                self._pool.rested(self)
        self._reads.settle()

    def send_ends(self) -> None:
        """Send the ends that wait, in a frame of their own."""
        session = self._session
        endpoint = self._endpoint
        if not session.ends_waiting or endpoint is None or self.closed:
            return
        try:
            endpoint.post_send(session.ends_frame())
        except TransportError as error:
            self.fail(error)

    def receive_failed(self, error: TransportError) -> None:
        """A receive did not end well: whatever was sent, this connection is of no use any more."""
        self.fail(error)

    # --- Schemas, confirmations, the end ---

    def _describe(self, ring_id: bytes, fingerprint: int) -> None:
        """Ask for a ring's schema; payloads that come before it wait for it, or fail as it does."""
        waiting: list[Attempt] = []
        self._undescribed[fingerprint] = waiting

        def described(asked: Asked, answer: bytearray) -> None:
            error: TransportError | None = None
            try:
                schema = Schema.from_bytes(self._session.described(asked.attempt, answer))
                if schema.fingerprint != fingerprint:
                    raise ProtocolError(
                        "the server's schema is not the one the reference names",
                        expected=f"{fingerprint:#018x}",
                        found=f"{schema.fingerprint:#018x}",
                    )
                self._pool.schemas[fingerprint] = schema
                del self._undescribed[fingerprint]
            except TransportError as caught:
                error = self._undescribed[fingerprint] = caught
            for attempt in waiting:
                self._answered(attempt)
                delivered: bool | None = False
                if error is None:
                    delivered = self._reads.arrived(attempt)
                else:
                    self._reads.refused(attempt, error)
                if delivered is not None:
                    self._session.end(attempt.number, delivered=delivered)
            self.after_answers()

        self._ask(self._session.describe(ring_id), DESCRIBE_RECEIVE_BYTES, described)

    def settle(self, ring_id: bytes) -> None:
        """Say again what the server may not know; its answer is not waited for: frames are handled in order."""
        for names in self._pool.take_unsettled(ring_id):
            self.confirm(names, self._pool.confirmed)

    def confirm(self, names: list[Named], on_confirmed: Callable[[list[Named], list[Status]], None]) -> None:
        """Say of up to 64 payloads of one ring that they were delivered."""

        def confirmed(asked: Asked, answer: bytearray) -> None:
            try:
                statuses = self._session.confirmed(asked.attempt, answer)
            except StaleSlotError:
                statuses = [Status.STALE] * len(names)
            except TransportError as error:
                statuses = [Status.BUSY if error.retryable else Status.STALE] * len(names)
            on_confirmed(names, statuses)
            self.after_answers()

        self._ask(self._session.confirm(names), CONFIRM_RECEIVE_BYTES, confirmed)

    def run(self, errand: Errand) -> None:
        """Start an errand as soon as the connection is open; `ran` ends it."""
        if self.is_open:
            errand.start(self)
        else:
            self._errands.append(errand)

    def take_some(self, take: Take, max_payloads: int, max_bytes: int, *, newest: bool, wait_s: float) -> None:
        """Ask for what the ring has ready; the server waits for a first one so long."""
        self._running.append(take)
        session = self._session

        def answered(asked: Asked, answer: bytearray) -> None:
            self._running.remove(take)
            try:
                offer = session.on_offer(asked.attempt, answer)
            except TransportError as error:
                if session.broken:
                    raise
                take.lost(error)
            else:
                wanted = take.offered(self, offer)
                if offer.payloads:
                    self._reads.adopt(self, offer.payloads, take if wanted else None)
            self.after_answers()

        asked = session.take(max_payloads, max_bytes, newest=newest, wait_ms=int(wait_s * 1000))
        self._ask(asked, offer_receive_bytes(max_payloads), answered)

    def receive_taken(self, offered: Sequence[Offered], reads: Sequence[Read | None]) -> None:
        """Receive what the server has picked, each for its read, or, without one, to give it back."""
        endpoint = self._endpoint
        assert endpoint is not None
        due_s = self._pool.reactor.now() + self._pool.config.deadline_s
        fingerprint = offered[0].fingerprint
        if fingerprint and fingerprint not in self._pool.schemas and fingerprint not in self._undescribed:
            self._describe(offered[0].ring_id, fingerprint)
        for named, read in zip(offered, reads, strict=True):
            message = self._pool.lend(max(_FRAMING + ((named.nbytes + 7) & ~7), _SHORTEST))
            clear_ends(message.data, named.nbytes)
            if read is not None:
                due_s = self._reads.attempt_due_s(read)
            ref = named if read is None else read.ref
            attempt = self.attempts[named.attempt] = Attempt(self, read, ref, named.attempt, message, due_s)
            self._in_flight_bytes += named.nbytes
            if read is None:
                self._reads.orphans.add(attempt)
            else:
                read.attempt = attempt
                read.connection = self
            endpoint.post_receive(message.data, attempt.arrived, channel=named.attempt & MAX_CHANNEL)

    def say_goodbye(self, on_said: Callable[[], None]) -> None:
        """Take leave; called back once the server has handled everything, unless the connection is lost before."""

        def said(asked: Asked, answer: bytearray) -> None:
            self._session.farewell(asked.attempt, answer)
            on_said()

        self._ask(self._session.bye(), BYE_RECEIVE_BYTES, said)

    def _ask(self, asked: Asked, receive_bytes: int, on_answer: Callable[[Asked, bytearray], None]) -> None:
        """Send a frame whose answer is small, and of which nothing is reused."""
        answer = bytearray(receive_bytes)

        def arrived(operation: Operation) -> None:
            if self.closed:
                return
            if operation.error is not None:
                self.receive_failed(operation.error)
                return
            self.proved = True
            try:
                on_answer(asked, answer)
            except TransportError as error:
                self.fail(error)

        endpoint = self._endpoint
        assert endpoint is not None
        try:
            endpoint.post_receive(answer, arrived, channel=asked.attempt & MAX_CHANNEL)
            endpoint.post_send(asked.frame)
        except TransportError as error:
            self.fail(error)

    def drop_late(self) -> None:
        """Close it if all that is in flight is late: there is nothing to wait for."""
        if self.late and self.late == len(self.attempts):
            host, port = self.key
            self.fail(PeerLostError("the port has not answered in time", host=host, port=port, reason="aborted"))

    def fail(self, error: TransportError) -> None:
        """The connection is of no use any more; its reads go on elsewhere, or fail with `error`."""
        if self.closed:
            return
        stale = self.used and not self.proved
        asked = [
            attempt.read
            for attempt in self.attempts.values()
            if attempt.read is not None and attempt.read.attempt is attempt
        ]
        queued = list(self.queue)
        errands = [*self._errands, *self._running]
        self.close()
        for errand in errands:
            errand.lost(error)
        self._reads.connection_lost(self, asked, queued, error, stale=stale)

    def close(self) -> None:
        """Close it; what it owes is known from now on. A buffer still in flight stays out of the pool until it ends."""
        if self.closed:
            return
        self.closed = True
        if self._timer is not None:
            self._timer.cancel()
        for attempt in self.attempts.values():
            attempt.read = None
            self._reads.orphans.discard(attempt)
        self.attempts.clear()
        self.queue.clear()
        self._errands.clear()
        self._running.clear()
        self._session.close()
        self._pool.owe(self._session.owed())
        self._pool.removed(self)
        if self._endpoint is not None:
            self._endpoint.close(self._pool.descriptors_free)
        else:
            self._pool.descriptors_free(True)  # noqa: FBT003 - as a link calls it
