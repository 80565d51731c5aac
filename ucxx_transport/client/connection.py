"""One connection of a client: filled with requests as far as its windows allow, until it is closed.

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

from collections import deque
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from ucxx_transport.client.jobs import Attempt, Read, SharedMessage
from ucxx_transport.client.line import Line
from ucxx_transport.client.requests import FRAMING_BYTES, OWN_WINDOW_BYTES, SHORTEST_BYTES, next_request, schema_in
from ucxx_transport.errors import BusyError, PeerLostError, TransportError
from ucxx_transport.wire.client_side import DESCRIBE_RECEIVE_BYTES
from ucxx_transport.wire.codec import clear_ends, clear_header, clear_trailer, seal_of
from ucxx_transport.wire.frames import MAX_CHANNEL, TRAILER_BYTES

if TYPE_CHECKING:
    from ucxx_transport.client.buffer_pool import Bytes
    from ucxx_transport.client.connections import Connections
    from ucxx_transport.client.dispatch import Dispatch
    from ucxx_transport.client.jobs import Engine, Errand, Job
    from ucxx_transport.client.ports import PortKey, Source
    from ucxx_transport.link.base import OnDone
    from ucxx_transport.wire.actions import Asked, Offered


class Connection(Line):
    """A line that payloads are read over.

    Attributes:
        queue: reads that wait to be posted.
        errands: that wait for it to be open. running: those that wait for an answer here.
        attempts: asked for and not answered, by number.
        late: how many of them have exceeded their time.
        used_s: when it was last given a read.
    """

    def __init__(self, pool: Connections, dispatch: Dispatch, engine: Engine, key: PortKey) -> None:
        super().__init__(pool.config, pool.reactor, engine.reader, key)
        self._pool = pool
        self._dispatch = dispatch
        self._engine = engine
        self.queue: deque[Read] = deque()
        self.attempts: dict[int, Attempt] = {}
        self.late = 0
        self.used_s = 0.0
        self._asked_bytes = 0
        self._undescribed: dict[int, list[Attempt] | TransportError] = {}
        self.errands: list[Errand] = []
        self.running: list[Errand] = []

    # --- Opening and closing ---

    @property
    def idle(self) -> bool:
        """Whether it is open and nothing uses it."""
        return self.is_open and not (self.attempts or self.queue or self.errands or self.running)

    def opened(self) -> None:
        """See `Line`."""
        for read in self.queue:
            read.due_s = read.limit_s
        errands, self.errands = self.errands, []
        for errand in errands:
            errand.start(self)
        self.pump()
        self._pool.opened(self)

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
        reads, shared_bytes = next_request(self.queue, len(self.attempts), self._asked_bytes, self.session.room)
        pool = self._pool
        if not reads:
            return False
        ref = reads[0].ref
        if pool.unsettled and ref.ring_id in pool.unsettled:
            pool.settle(self, ref.ring_id)
        self.describe(ref.ring_id, ref.fingerprint)
        if self.closed:  # by what was just sent
            self._dispatch.reassign(reads)
        elif shared_bytes:
            self._ask_shared(reads, shared_bytes)
        else:
            self._ask_each(reads)
        return True

    def _ask_shared(self, reads: list[Read], nbytes: int) -> None:
        """Ask for payloads whose answers share a message."""
        try:
            whole = self._pool.lend(nbytes)
        except TransportError as error:
            for read in reads:
                self._engine.no_memory(read, error)
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
            try:
                messages.append(self._message(read.ref.nbytes))
                asked.append(read)
            except TransportError as error:
                self._engine.no_memory(read, error)
        if asked:
            frame, numbers, _ = self.session.fetch([read.ref for read in asked])
            attempts = self._attempts_of(asked, numbers, messages)
            self._send(frame, [(each.message.data, each.arrived, each.number & MAX_CHANNEL) for each in attempts])

    def _message(self, nbytes: int) -> Bytes:
        """What an answer of its own arrives in; of an earlier one it has nothing that could pass for it."""
        whole = FRAMING_BYTES + ((nbytes + 7) & ~7)
        message = self._pool.lend(whole if whole > SHORTEST_BYTES else SHORTEST_BYTES)  # noqa: FURB136 - `max` takes longer
        clear_ends(message.data, nbytes)
        return message

    def _attempts_of(self, reads: list[Read], numbers: list[int], messages: list[Bytes]) -> list[Attempt]:
        attempts = []
        due_of = self._dispatch.attempt_due_s
        for read, number, message in zip(reads, numbers, messages, strict=True):
            attempt = Attempt(self, read, read.ref, number, message, due_of(read))
            read.attempt = self.attempts[number] = attempt
            self._asked_bytes += read.ref.nbytes
            attempts.append(attempt)
        return attempts

    def _send(self, frame: bytes | None, receives: Iterable[tuple[memoryview, OnDone, int]]) -> None:
        """Send a frame, if it has not been sent, and then post what the answers to it arrive in; see `ask_one`."""
        endpoint = self.endpoint
        assert endpoint is not None
        try:
            if frame is not None:
                endpoint.post_send(frame)
            for buffer, on_done, channel in receives:
                endpoint.post_receive(buffer, on_done, channel=channel)
        except TransportError as error:
            self.fail(error)

    def ask_one(self, job: Job, source: Source, now: float) -> None:
        """Ask for the one payload of a job, whose schema is known, while nothing else is in flight here.

        It is what `pump` does of it in few steps. The request leaves before anything is made ready for its answer: the
        server works meanwhile, and nothing that comes is taken in before the reactor's next turn.
        """
        ref, endpoint, unsent = job.refs[0], self.endpoint, None
        frame, number = self.session.fetch_one(ref)
        assert endpoint is not None
        try:
            endpoint.post_send(frame)
        except TransportError as error:
            unsent = error
        self.used_s = now
        read = Read(job, 0, ref, source)
        if len(source.keys) > 1:
            read.alternate = source.keys[(source.position + 1) % len(source.keys)]
        job.reads.append(read)
        dispatch, due_s = self._dispatch, job.until_s
        if read.alternate is not None or dispatch.read_attempts > 1:
            due_s = (now + due_s) / 2
        read.place, read.due_s = "asked", due_s  # as `Dispatch.attempt_due_s`
        if due_s < dispatch.look_s:
            dispatch.look_at(due_s)
        whole = FRAMING_BYTES + ((ref.nbytes + 7) & ~7)
        try:
            message = self._pool.lend(whole if whole > SHORTEST_BYTES else SHORTEST_BYTES)  # noqa: FURB136 - as `_message`
            clear_header(message.data, 0)
            clear_trailer(message.data, whole - TRAILER_BYTES)
            attempt = read.attempt = self.attempts[number] = Attempt(self, read, ref, number, message, due_s)
            self._asked_bytes += ref.nbytes
            attempt.seal = seal_of(ref)
            if unsent is not None:
                raise unsent
            endpoint.post_receive(message.data, attempt.arrived, channel=number & MAX_CHANNEL)
        except TransportError as error:
            if read.attempt is None:
                self._engine.no_memory(read, error)
            self.fail(error)

    def take(self, attempt: Attempt, *, is_last: bool) -> None:
        """An attempt's answer has come; after the last one of a message more is asked for, and the ends leave."""
        ref, session = attempt.ref, self.session
        self.rested = False
        try:
            session.verify(attempt.number, attempt.message.data, attempt.seal)
        except TransportError as error:
            error.__traceback__ = None  # its frames hold the message
            self._refused(attempt, error)
            if session.broken:
                self.fail(PeerLostError("closed after an answer that broke the protocol", reason="aborted"))
        else:
            if ref.fingerprint and ref.fingerprint not in self._pool.schemas and attempt.read is not None:
                waiting = self._undescribed[ref.fingerprint]  # it was asked for with the payload
                if isinstance(waiting, list):
                    waiting.append(attempt)
                else:
                    self._refused(attempt, waiting)
                    session.end(attempt.number, delivered=False)
            else:
                del self.attempts[attempt.number]  # as `_answered`
                self._asked_bytes -= ref.nbytes
                if attempt.late:
                    self.late -= 1
                delivered = self._engine.arrived(attempt)
                if delivered is not None:
                    session.end(attempt.number, delivered=delivered)
        if is_last:
            self.after_answers()

    def receive(self, offered: Sequence[Offered], reads: Sequence[Read | None]) -> None:
        """Receive what the server has picked, each payload for its read, or, without one, to give it back."""
        self.describe(offered[0].ring_id, offered[0].fingerprint)
        late_s = self._pool.reactor.now() + self._pool.config.deadline_s
        try:
            messages = [self._message(named.nbytes) for named in offered]
        except TransportError as error:  # they are on their way all the same
            self.fail(error)
            return
        for named, read, message in zip(offered, reads, messages, strict=True):
            due_s = late_s if read is None else self._dispatch.attempt_due_s(read)
            attempt = Attempt(self, read, named if read is None else read.ref, named.attempt, message, due_s)
            self.attempts[attempt.number] = attempt
            self._asked_bytes += named.nbytes
            if read is None:
                self._engine.orphans.add(attempt)
            else:
                read.attempt, read.connection = attempt, self
        taken = [self.attempts[named.attempt] for named in offered]
        self._send(None, [(each.message.data, each.arrived, each.number & MAX_CHANNEL) for each in taken])

    def end_held(self, attempt: Attempt, *, delivered: bool) -> None:
        """End an attempt that was kept in suspense; where the connection is lost meanwhile, by the next one."""
        if not self.closed:
            self.session.end(attempt.number, delivered=delivered)
            self.send_ends()
        elif delivered:
            self._pool.owe((attempt.ref,))

    def _refused(self, attempt: Attempt, error: TransportError) -> None:
        self._answered(attempt)
        self._engine.refused(attempt, error)

    def _answered(self, attempt: Attempt) -> None:
        """An attempt is in flight no more."""
        del self.attempts[attempt.number]
        self._asked_bytes -= attempt.ref.nbytes
        if attempt.late:
            self.late -= 1

    def after_answers(self) -> None:
        """What has come is taken: ask for more, and see that the ends leave."""
        engine = self._engine
        if not self.closed:
            if self.queue:
                self.pump()
            if self.session.ends:
                if self.attempts and not engine.finished:
                    self._pool.delay_ends(self)
                else:
                    self.send_ends()
            if not self.attempts and not self.queue:
                self.rested = True
                if self._pool.waiting:
                    self._pool.rested(self)
        engine.settle()

    def send_ends(self) -> None:
        """Send the ends that wait, in a frame of their own."""
        endpoint = self.endpoint
        if not self.session.ends or endpoint is None or self.closed:
            return
        try:
            endpoint.post_send(self.session.ends_frame())
        except TransportError as error:
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
                encoded = self.session.described(asked.attempt, answer)
                self._pool.schemas[fingerprint] = schema_in(encoded, fingerprint)
                del self._undescribed[fingerprint]
            except TransportError as caught:
                error = self._undescribed[fingerprint] = caught
            for attempt in waiting:
                self._answered(attempt)
                delivered: bool | None = False
                if error is None:
                    delivered = self._engine.arrived(attempt)
                else:
                    self._engine.refused(attempt, error)
                if delivered is not None:
                    self.session.end(attempt.number, delivered=delivered)
            self.after_answers()

        self.ask(self.session.describe(ring_id), DESCRIBE_RECEIVE_BYTES, described)

    def run(self, errand: Errand) -> None:
        """Start an errand as soon as the connection is open; `ran` ends it."""
        if self.is_open:
            errand.start(self)
        else:
            self.errands.append(errand)

    def fail(self, error: TransportError) -> None:
        """The connection is of no use any more; its reads go on elsewhere, or fail with `error`."""
        if self.closed:
            return
        if isinstance(error, BusyError) and "limit" in error.facts:
            self._pool.short()
        stale = self.rested
        asked = [
            attempt.read
            for attempt in self.attempts.values()
            if attempt.read is not None and attempt.read.attempt is attempt
        ]
        queued = list(self.queue)
        errands = [*self.errands, *self.running]
        self.close()
        for errand in errands:
            errand.lost(self, error)
        self._dispatch.connection_lost(self, asked, queued, error, stale=stale)

    def close(self) -> None:
        """Close it; what it owes is known from now on. A buffer still in flight stays out of the pool until it ends."""
        if self.closed:
            return
        self.closed = True
        self.stop_timer()
        for attempt in self.attempts.values():
            attempt.read = None
            self._engine.orphans.discard(attempt)
        for left in (self.attempts, self.queue, self.errands, self.running):
            left.clear()
        self.session.close()
        self._pool.owe(self.session.owed())
        self._pool.removed(self)
        if self.endpoint is not None:
            self.endpoint.close(self._pool.descriptors_free)
        else:
            self._pool.descriptors_free(True)  # noqa: FBT003 - as a link calls it
