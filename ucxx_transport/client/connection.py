"""One connection of a client: filled with requests as far as its windows allow, until it is closed.

There is one for each (address, port) that is read from; `connections` opens it. All of it is of the reactor's thread.

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
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from ucxx_transport.client.errands import Errand, Request
from ucxx_transport.client.jobs import FRAMING_BYTES, OWN_WINDOW_BYTES, Read, next_request
from ucxx_transport.client.payload import Payload
from ucxx_transport.errors import BusyError, PeerLostError, StaleSlotError, TransportError
from ucxx_transport.wire.client_side import Asked, ClientSession, Offer
from ucxx_transport.wire.codec import clear_trailer, seal_of
from ucxx_transport.wire.frames import HEADER_BYTES, MAX_CHANNEL, NONCE_BYTES, SHORTEST_BYTES, TRAILER_BYTES

if TYPE_CHECKING:
    from ucxx_transport.client.connections import Connections
    from ucxx_transport.client.dispatch import Dispatch
    from ucxx_transport.client.ports import PortKey
    from ucxx_transport.link.base import OnDone, Operation
    from ucxx_transport.link.endpoint import Endpoint


class Connection:
    """See the module.

    Attributes:
        endpoint: None until the address is resolved.
        attempts: asked for and not answered. late: how many of them have exceeded their time.
        used_s: when it was last given a read. rested: whether it has lain idle, and nothing has been answered since.
    """

    def __init__(self, pool: Connections, engine: Dispatch, key: PortKey) -> None:
        self.pool = pool
        self.key = key
        nonce, token = secrets.token_bytes(NONCE_BYTES), pool.base.config.token_bytes
        self.session = ClientSession(reader=pool.base.reader, nonce=nonce, token=token)
        self.endpoint: Endpoint | None = None
        self.queue: deque[Read] = deque()
        self.attempts: set[Read] = set()
        self.late = 0
        self.used_s = 0.0
        self.is_open = self.closed = self.rested = False
        self.schemas, self.lend = pool.schemas, pool.base.buffers.lend
        self._engine = engine

    @property
    def idle(self) -> bool:
        return self.is_open and not (self.attempts or self.queue)

    def ask(self, asked: Asked, on_answer: Callable[[Asked, memoryview], None]) -> None:
        """Send a frame whose answer is small, and of which nothing is reused."""
        answer = memoryview(bytearray(asked.receive_bytes))
        self._post(asked.frame, ((answer, partial(self._answered, asked, answer, on_answer), asked.attempt),))

    def _answered(
        self, asked: Asked, answer: memoryview, on_answer: Callable[[Asked, memoryview], None], operation: Operation
    ) -> None:
        if operation.error is not None:
            self.lost(operation.error)
        if self.closed:
            return
        self.rested = False
        try:
            on_answer(asked, answer)
        except TransportError as error:
            self.lost(error)

    def pump(self) -> None:
        """Ask for what waits, as far as both windows have room; ends that wait go along."""
        queue, session = self.queue, self.session
        while queue and self.is_open and not self.late and not self.closed:
            if isinstance(first := queue[0], Request):
                queue.popleft()
                self._ask_request(first)
                continue
            if session.named > 1 and session.named_bytes > OWN_WINDOW_BYTES // 2:
                return  # many names a frame, rather than one for each answer
            reads, shared_bytes = next_request(queue, session)
            if not reads:
                return
            ring_id, pool = reads[0].ref.ring_id, self.pool
            if ring_id in pool.unsettled and not pool.settle(self, ring_id):
                self._engine.reassign(reads)  # closed, by what was just sent
            else:
                self._ask_several(reads, shared_bytes)

    def _ask_several(self, reads: list[Read], shared_bytes: int) -> None:
        """Ask for payloads by one frame, whose answers share a message of so many bytes, or have each its own."""
        session = self.session
        receives: list[tuple[memoryview, OnDone, int]] = []
        if shared_bytes:
            try:
                whole = self.lend(shared_bytes)
            except TransportError as error:
                for read in reads:
                    self._engine.fail(read, error)
                return
            whole.fill(0)  # nothing of an earlier answer may pass for one of these; 2 µs
            view, start = whole.data, 0
            for read in reads:
                end = start + read.whole_bytes
                read.message, read.start, read.view = whole, start, view[start:end]
                start = end
            frame = session.fetch(reads, packed=True)
            receives.append((view, partial(self.came, reads), reads[0].shared))
        else:
            for read in tuple(reads):
                try:
                    self._lend_to(read)
                except TransportError as error:
                    reads.remove(read)
                    self._engine.fail(read, error)
            if not reads:
                return
            frame = session.fetch(reads)
            receives += [(read.view, partial(self.came, (read,)), read.number) for read in reads]
        self.attempts.update(reads)
        self._engine.asked(self, reads)
        self._post(frame, receives)
        for read in reads:  # while the server works
            read.seal = seal_of(read.ref)

    def ask_one(self, read: Read, now: float) -> bool:
        """Ask for one payload in few steps, if nothing else is under way here, nor to be learnt or said before."""
        ref = read.ref
        if (
            not self.is_open
            or self.attempts
            or self.queue
            or read.sequence
            or ref.fingerprint not in self.schemas
            or ref.ring_id in self.pool.unsettled
        ):
            return False
        engine, endpoint, due_s = self._engine, self.endpoint, read.limit_s
        assert endpoint is not None
        read.connection = self
        self.attempts.add(read)
        try:
            endpoint.post_send(self.session.fetch_one(read))  # first: nothing takes in its answer before the next turn
            if read.call < engine.read_attempts or read.alternate is not None:
                due_s = (now + due_s) / 2  # as `Dispatch.asked`
            read.due_s = due_s
            if due_s < engine.look_s:
                engine.look_at(due_s)
            self.used_s = now
            _, _, end, whole = read.seal = seal_of(ref)
            read.message = message = self.lend(whole if whole > SHORTEST_BYTES else SHORTEST_BYTES)  # noqa: FURB136 - `max` takes longer
            read.view = view = message.data
            clear_trailer(view, end)  # of an earlier answer, which could pass for this one's
            endpoint.post_receive(view, partial(self._one_came, read), channel=read.number & MAX_CHANNEL)
        except TransportError as error:
            self.lost(error)
        return True

    def _ask_request(self, request: Request) -> None:
        """Ask for something else than payloads by name, if that is still wanted."""
        errand = request.job
        if errand is not None:
            self.attempts.add(request)
            self._engine.asked(self, (request,))
            self.ask(errand.frame(self, request), partial(self._request_came, request, errand))

    def _request_came(self, request: Request, errand: Errand, asked: Asked, answer: memoryview) -> None:
        self.attempts.remove(request)
        self.late -= request.late
        try:
            errand.take_in(self, request, asked.attempt, answer)
        except TransportError as error:
            if self.session.broken:
                self.attempts.add(request)  # it is lost with the connection
                raise
            self._engine.refused(request, error)
        self.after_answers()

    def _lend_to(self, read: Read) -> None:
        """What an answer of its own arrives in; of an earlier one it has no trailer that could pass for its own."""
        whole = FRAMING_BYTES + ((read.ref.nbytes + 7) & ~7)
        read.start = 0
        read.message = message = self.lend(whole if whole > SHORTEST_BYTES else SHORTEST_BYTES)  # noqa: FURB136 - `max` takes longer
        read.view = view = message.data
        clear_trailer(view, whole - TRAILER_BYTES)

    def _post(self, frame: bytes | None, receives: Sequence[tuple[memoryview, OnDone, int]] = ()) -> None:
        """Send a frame, and post what its answers arrive in, in one turn: nothing is taken in before the next."""
        endpoint = self.endpoint
        assert endpoint is not None
        try:
            if frame is not None:
                endpoint.post_send(frame)
            for view, on_done, number in receives:
                endpoint.post_receive(view, on_done, channel=number & MAX_CHANNEL)
        except TransportError as error:
            self.lost(error)

    def receive(self, offer: Offer, reads: list[Read]) -> None:
        """Receive what the server has picked, each payload for its read; one without a job is given back."""
        self.session.receive(offer, reads)
        self.attempts.update(reads)
        is_lone = len(reads) == 1 and offer.fingerprint in self.schemas
        receives: list[tuple[memoryview, OnDone, int]] = []
        try:
            for read in reads:
                self._lend_to(read)
                on_done = partial(self._one_came, read) if is_lone else partial(self.came, (read,))
                receives.append((read.view, on_done, read.number))
        except TransportError as error:  # they are on their way all the same
            self.lost(error)
            return
        self._engine.asked(self, reads)
        self._post(None, receives)

    def came(self, reads: Sequence[Read], operation: Operation) -> None:
        """A receive is over: the message has the answers to these, whose ends leave; then more is asked for."""
        if operation.error is not None:
            self.lost(operation.error)
        if self.closed:
            return  # maybe by a callback before: what had arrived by then is called back all the same
        self.rested = False
        session, attempts = self.session, self.attempts
        arrived: list[Read] = []
        refused: list[tuple[Read, TransportError]] = []
        for read in reads:
            attempts.remove(read)
            if read.late:
                self.late -= 1
            try:
                session.verify(read, read.view)
            except TransportError as error:
                error.__traceback__ = None  # its frames hold the message
                refused.append((read, error))
                if session.broken:
                    break
            else:
                arrived.append(read)
        self._engine.arrived(self, arrived)
        for read, refusal in refused:  # which may close the connection: the ends of the others wait already
            self._engine.refused(read, refusal)
        if session.broken:
            self.lost(PeerLostError("closed after an answer that broke the protocol", reason="aborted"))
        self.after_answers()

    def _one_came(self, read: Read, operation: Operation) -> None:
        """The receive of the one payload that was asked for is over.

        An answer that is the whole payload, while there still is nothing else to do here, needs no list of ends: what
        `came` and `Reads.arrived` do of it is done here in one step. Whatever else comes is theirs.
        """
        engine, job, ref, view = self._engine, read.job, read.ref, read.view
        header, trailer, end, whole = read.seal or seal_of(ref)
        if (
            operation.error is not None
            or self.closed
            or read.late
            or read.before is not None
            or ref.checksum is not None
            or len(self.attempts) > 1
            or self.queue
            or self.pool.waiting
            or engine.ports.avoided
            or view[:HEADER_BYTES] != header
            or view[end:whole] != trailer
            or job is None
            or job.on_payload is not None
        ):
            self.came((read,), operation)
            return
        if not job.is_held:
            try:
                engine.claim(ref)  # while the slot is held: no newer payload of it can have been delivered yet
            except StaleSlotError:
                self.came((read,), operation)
                return
        content = read.message[HEADER_BYTES : HEADER_BYTES + ref.nbytes]
        job.outcomes[read.index] = Payload(ref, content, self.schemas[ref.fingerprint], "ucx")
        del job.reads[read.index]
        read.job = None
        read.source.under_way -= 1
        self.rested = True
        self.attempts.clear()
        job.left -= 1
        if job.is_held:
            job.held = read
        else:
            way = engine.delivered
            way.reads += 1
            way.nbytes += ref.nbytes
            way.recent_s.append(time.perf_counter() - job.began_s)
            self._post(self.session.conclude(read, delivered=True))
        if len(job.outcomes) > 1:
            if not job.left:
                engine.finished.append(job)
                engine.settle()
            return
        job.done = True
        engine.jobs.discard(job)  # not before: an interrupt must not lose it
        if job.on_done is not None:
            job.finish()

    def end_held(self, read: Read, *, delivered: bool) -> None:
        """End an attempt that was kept in suspense; where the connection is lost meanwhile, by the next one."""
        if self.closed:
            if delivered:
                self.pool.owe((read.ref,))
        elif read.has_arrived:
            self.session.end(read, delivered=delivered)
            self.pump()  # what there was no room for meanwhile
            self.send_ends()
        else:
            self._post(self.session.conclude(read, delivered=delivered))
            self.pump()

    def after_answers(self) -> None:
        """What has come is taken: ask for more, and see that the ends leave."""
        engine = self._engine
        if not self.closed:
            if self.queue:
                self.pump()
            if self.session.ends:
                if self.attempts and not engine.finished:
                    self.pool.delay_ends(self)
                else:
                    self.send_ends()
            if not self.attempts and not self.queue:
                self.rested = True
                if self.pool.waiting:
                    self.pool.start_waiting()  # which may need its descriptors
        if engine.again or engine.finished:
            engine.settle()

    def send_ends(self) -> None:
        if self.session.ends and not self.closed:
            self._post(self.session.ends_frame())

    def lost(self, error: TransportError) -> None:
        """The connection is of no use any more; its reads go on elsewhere, or fail with `error`."""
        if self.closed:
            return
        if isinstance(error, BusyError) and "limit" in error.facts:
            self.pool.short()
        asked, queued = [read for read in self.attempts if not read.late], list(self.queue)
        self.close()  # which may start, and lose, others, and so end calls: their callbacks may end reads of this one
        self._engine.connection_lost(self, asked, queued, error)

    def close(self) -> None:
        """Close it; what it owes is known from now on. A buffer still in flight stays out of the pool until it ends."""
        if self.closed:
            return
        self.closed = True
        for read in self.attempts:
            if read.late and not isinstance(read, Request):
                del read.message  # which the read that took its place would keep as long as it lasts
                read.view = memoryview(b"")
        self.attempts.clear()
        self.queue.clear()
        self.session.close()
        self.pool.owe(self.session.owed())
        self.pool.removed(self)
        if self.endpoint is not None:
            self.endpoint.close(self.pool.descriptors_free)
        else:
            self.pool.descriptors_free(True)  # noqa: FBT003 - as a link calls it
