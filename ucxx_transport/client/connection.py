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
from typing import TYPE_CHECKING, Protocol

from ucxx_transport.client.attempts import Attempt, SharedMessage
from ucxx_transport.client.ports import PortKey
from ucxx_transport.client.requests import FRAMING_BYTES, OWN_WINDOW_BYTES, SHORTEST_BYTES, next_request
from ucxx_transport.errors import BusyError, PeerLostError, ProtocolError, TransportError
from ucxx_transport.link.base import DATA_PORT_SILENT
from ucxx_transport.schema import Schema
from ucxx_transport.wire.client_side import DESCRIBE_RECEIVE_BYTES, HANDSHAKE_RECEIVE_BYTES, ClientSession
from ucxx_transport.wire.codec import clear_ends
from ucxx_transport.wire.frames import MAX_CHANNEL, NONCE_BYTES

if TYPE_CHECKING:
    from ucxx_transport.client.buffer_pool import Bytes
    from ucxx_transport.client.connections import Connections
    from ucxx_transport.client.jobs import Read
    from ucxx_transport.link.base import Endpoint, OnDone, Operation
    from ucxx_transport.link.reactor import Timer
    from ucxx_transport.wire.actions import Asked, Offered


class Errand(Protocol):
    """Something else than reads by name that a connection is needed for."""

    def start(self, connection: Connection) -> None:
        """The connection is open."""

    def lost(self, error: TransportError) -> None:
        """It failed, or was never open."""


class Connection:
    """One endpoint and the client's half of its protocol. It is the endpoint's `EndpointEvents`.

    Attributes:
        key: where it leads to.
        queue: reads that wait to be posted.
        session: what to send, and what answers mean.
        running: errands that wait for an answer here.
        attempts: asked for and not answered, by number.
        late: how many of them have exceeded their time.
        is_open: whether the handshake is over.
        closed: whether it is.
        used: whether it has lain idle since it was opened.
        proved: whether anything was answered since it lay idle.
        used_s: when it was last given a read.
        shortage: why it waits, where there were no descriptors for it.
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
        self.shortage: TransportError | None = None
        self._asked_bytes = 0
        self._undescribed: dict[int, list[Attempt] | TransportError] = {}
        self._errands: list[Errand] = []
        self.running: list[Errand] = []
        self._endpoint: Endpoint | None = None
        self._timer: Timer | None = None
        self.session = ClientSession(
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
        return self.is_open and not (self.attempts or self.queue or self._errands or self.running)

    def connected(self) -> None:
        """See `EndpointEvents`: the handshake's frames are under way already."""

    def lost(self, error: TransportError) -> None:
        """See `EndpointEvents`."""
        self.fail(error)

    def hand_over(self, other: Connection) -> None:
        """Another one to the same port takes its place."""
        for read in self.queue:
            read.connection = other
        other.queue, self.queue = self.queue, deque()
        other._errands, self._errands = self._errands, []

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
        self.ask(self.session.hello(), HANDSHAKE_RECEIVE_BYTES, self._welcomed)

    def _too_slow_to_open(self) -> None:
        endpoint = self._endpoint
        silent = endpoint is not None and endpoint.listener_has_answered()
        unknown = "no answer to the handshake within connect_timeout_s; is a ucxx_transport server there?"
        host, port = self.key
        self.fail(PeerLostError(DATA_PORT_SILENT if silent else unknown, host=host, port=port, reason="unreachable"))

    def _welcomed(self, asked: Asked, answer: bytearray) -> None:
        del asked
        challenge = self.session.on_welcome(answer)
        if challenge is None:
            self._opened()
        else:
            self.ask(challenge, HANDSHAKE_RECEIVE_BYTES, self._authenticated)

    def _authenticated(self, asked: Asked, answer: bytearray) -> None:
        del asked
        self.session.on_authenticated(answer)
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
            if len(self.attempts) > 1 and self._asked_bytes > OWN_WINDOW_BYTES // 2:
                return  # many names a frame, rather than one for each answer
            if not self._ask_next():
                return

    def _ask_next(self) -> bool:
        """Send one frame; whether there was room for it."""
        request = next_request(self.queue, len(self.attempts), self._asked_bytes, self.session.room)
        reads, pool = request.reads, self._pool
        if not reads:
            return False
        ref = reads[0].ref
        if pool.unsettled and ref.ring_id in pool.unsettled:
            pool.settle(self, ref.ring_id)
        self.describe(ref.ring_id, ref.fingerprint)
        if self.closed:  # by what was just sent
            self._reads.dispatch.reassign(reads)
        elif request.shared_bytes:
            self._ask_shared(reads, request.shared_bytes)
        else:
            self._ask_each(reads)
        return True

    def _ask_shared(self, reads: list[Read], nbytes: int) -> None:
        """Ask for payloads whose answers share a message."""
        try:
            whole = self._pool.lend(nbytes)
        except TransportError as error:
            for read in reads:
                self._reads.no_memory(read, error)
            return
        whole.fill(0)  # nothing of an earlier answer may pass for one of these; 2 µs
        messages = []
        start = 0
        for read in reads:
            end = start + FRAMING_BYTES + ((read.ref.nbytes + 7) & ~7)
            messages.append(whole[start:end])
            start = end
        frame, numbers, shared = self.session.fetch([read.ref for read in reads], packed=True)
        attempts = self._attempts_of(reads, numbers, messages)
        self._send(frame, [(whole.data, SharedMessage(attempts).arrived, shared & MAX_CHANNEL)])

    def _ask_each(self, reads: list[Read]) -> None:
        """Ask for payloads each of which comes in a message of its own."""
        asked: list[Read] = []
        messages: list[Bytes] = []
        for read in reads:
            nbytes = read.ref.nbytes
            try:
                message = self._pool.lend(max(FRAMING_BYTES + ((nbytes + 7) & ~7), SHORTEST_BYTES))
            except TransportError as error:
                self._reads.no_memory(read, error)
                continue
            clear_ends(message.data, nbytes)
            asked.append(read)
            messages.append(message)
        if asked:
            frame, numbers, _ = self.session.fetch([read.ref for read in asked])
            attempts = self._attempts_of(asked, numbers, messages)
            self._send(frame, [(each.message.data, each.arrived, each.number & MAX_CHANNEL) for each in attempts])

    def _attempts_of(self, reads: list[Read], numbers: list[int], messages: list[Bytes]) -> list[Attempt]:
        attempts = []
        due_of = self._reads.failures.attempt_due_s
        for read, number, message in zip(reads, numbers, messages, strict=True):
            attempt = Attempt(self, read, read.ref, number, message, due_of(read))
            read.attempt = self.attempts[number] = attempt
            self._asked_bytes += read.ref.nbytes
            attempts.append(attempt)
        return attempts

    def _send(self, frame: bytes, receives: list[tuple[memoryview, OnDone, int]]) -> None:
        """Post what the answers to a frame arrive in, and send it."""
        endpoint = self._endpoint
        assert endpoint is not None
        try:
            for buffer, on_done, channel in receives:
                endpoint.post_receive(buffer, on_done, channel=channel)
            endpoint.post_send(frame)
        except TransportError as error:
            self.fail(error)

    def ask_one(self, read: Read, due_s: float) -> None:
        """Ask for a read while nothing else is in flight here, so that the windows have room; as `_post`."""
        ref = read.ref
        nbytes = ref.nbytes
        whole = FRAMING_BYTES + ((nbytes + 7) & ~7)
        try:
            message = self._pool.lend(whole if whole > SHORTEST_BYTES else SHORTEST_BYTES)  # noqa: FURB136 - `max` takes longer
        except TransportError as error:
            self._reads.no_memory(read, error)
            return
        data = message.data
        clear_ends(data, nbytes)
        frame, number = self.session.fetch_one(ref)
        attempt = read.attempt = self.attempts[number] = Attempt(self, read, ref, number, message, due_s)
        self._asked_bytes += nbytes
        endpoint = self._endpoint
        assert endpoint is not None
        try:
            endpoint.post_receive(data, attempt.arrived, channel=number & MAX_CHANNEL)
            endpoint.post_send(frame)
        except TransportError as error:
            self.fail(error)

    def take(self, attempt: Attempt) -> bool:
        """An attempt's answer has come; whether nothing is left to do after it (else: `after_answers`)."""
        ref, session = attempt.ref, self.session
        try:
            session.verify(attempt.number, attempt.message.data)
        except TransportError as error:
            error.__traceback__ = None  # its frames hold the message
            self._refused(attempt, error)
            if session.broken:
                self.fail(PeerLostError("closed after an answer that broke the protocol", reason="aborted"))
            return False
        if ref.fingerprint and ref.fingerprint not in self._pool.schemas and attempt.read is not None:
            waiting = self._undescribed[ref.fingerprint]  # it was asked for with the payload
            if isinstance(waiting, list):
                waiting.append(attempt)
            else:
                self._refused(attempt, waiting)
                session.end(attempt.number, delivered=False)
            return False
        del self.attempts[attempt.number]  # as `_answered`
        self._asked_bytes -= ref.nbytes
        if attempt.late:
            self.late -= 1
        reads, endpoint = self._reads, self._endpoint
        delivered = reads.arrived(attempt)
        if delivered is None:
            return False
        if self.attempts or self.queue or self._pool.waiting or endpoint is None or self.closed:
            session.end(attempt.number, delivered=delivered)
            return False
        # As `after_answers`, of a read that was alone here.
        try:
            endpoint.post_send(session.end_at_once(attempt.number, delivered=delivered))
        except TransportError as error:
            self.fail(error)
            return False
        self.used, self.proved = True, False
        reads.settle()
        return True

    def receive(self, offered: Sequence[Offered], reads: Sequence[Read | None]) -> None:
        """Receive what the server has picked, each payload for its read, or, without one, to give it back."""
        self.describe(offered[0].ring_id, offered[0].fingerprint)
        lend, due_of = self._pool.lend, self._reads.failures.attempt_due_s
        late_s = self._pool.reactor.now() + self._pool.config.deadline_s
        attempts: list[Attempt] = []
        try:
            for named, read in zip(offered, reads, strict=True):
                message = lend(max(FRAMING_BYTES + ((named.nbytes + 7) & ~7), SHORTEST_BYTES))
                clear_ends(message.data, named.nbytes)
                due_s = late_s if read is None else due_of(read)
                attempt = Attempt(self, read, named if read is None else read.ref, named.attempt, message, due_s)
                attempts.append(attempt)
        except TransportError as error:  # they are on their way all the same
            self.fail(error)
            return
        for attempt, read in zip(attempts, reads, strict=True):
            self.attempts[attempt.number] = attempt
            self._asked_bytes += attempt.ref.nbytes
            if read is None:
                self._reads.orphans.add(attempt)
            else:
                read.attempt, read.connection = attempt, self
        endpoint = self._endpoint
        assert endpoint is not None
        try:
            for attempt in attempts:
                endpoint.post_receive(attempt.message.data, attempt.arrived, channel=attempt.number & MAX_CHANNEL)
        except TransportError as error:
            self.fail(error)

    def end_held(self, attempt: Attempt, *, delivered: bool) -> None:
        """End an attempt that was kept in suspense; where the connection is lost meanwhile, by the next one."""
        if not self.closed:
            self.session.end(attempt.number, delivered=delivered)
            self.send_ends()
        elif delivered:
            self._pool.owe((attempt.ref,))

    def _refused(self, attempt: Attempt, error: TransportError) -> None:
        self._answered(attempt)
        self._reads.refused(attempt, error)

    def _answered(self, attempt: Attempt) -> None:
        """An attempt is in flight no more."""
        del self.attempts[attempt.number]
        self._asked_bytes -= attempt.ref.nbytes
        if attempt.late:
            self.late -= 1

    def after_answers(self) -> None:
        """What has come is taken: ask for more, and see that the ends leave."""
        if self.closed:
            self._reads.settle()
            return
        if self.queue:
            self.pump()
        if self.session.ends_waiting:
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
        session = self.session
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

    def describe(self, ring_id: bytes, fingerprint: int) -> None:
        """Ask for a ring's schema, if need be; payloads that come before it wait for it, or fail as it does."""
        if not fingerprint or fingerprint in self._pool.schemas or fingerprint in self._undescribed:
            return
        waiting: list[Attempt] = []
        self._undescribed[fingerprint] = waiting

        def described(asked: Asked, answer: bytearray) -> None:
            error: TransportError | None = None
            try:
                schema = Schema.from_bytes(self.session.described(asked.attempt, answer))
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
                    self.session.end(attempt.number, delivered=delivered)
            self.after_answers()

        self.ask(self.session.describe(ring_id), DESCRIBE_RECEIVE_BYTES, described)

    def run(self, errand: Errand) -> None:
        """Start an errand as soon as the connection is open; `ran` ends it."""
        if self.is_open:
            errand.start(self)
        else:
            self._errands.append(errand)

    def ask(self, asked: Asked, receive_bytes: int, on_answer: Callable[[Asked, bytearray], None]) -> None:
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
        if (
            isinstance(error, BusyError)
            and not self.is_open
            and "limit" in error.facts
            and self._pool.short(self, error)
        ):
            return  # this process has no descriptors for it now; a server that is busy says so otherwise
        stale = self.used and not self.proved
        asked = [
            attempt.read
            for attempt in self.attempts.values()
            if attempt.read is not None and attempt.read.attempt is attempt
        ]
        queued = list(self.queue)
        errands = [*self._errands, *self.running]
        self.close()
        for errand in errands:
            errand.lost(error)
        self._reads.failures.connection_lost(self, asked, queued, error, stale=stale)

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
        self.running.clear()
        self.session.close()
        self._pool.owe(self.session.owed())
        self._pool.removed(self)
        if self._endpoint is not None:
            self._endpoint.close(self._pool.descriptors_free)
        else:
            self._pool.descriptors_free(True)  # noqa: FBT003 - as a link calls it
