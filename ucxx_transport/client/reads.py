"""Reads over a link: every payload that is asked of another host, from the call to its outcome.

A *job* is one call of a client: references, one deadline. Each of its payloads is a *read*, and each time that a read
is asked of a port is an *attempt*. Everything here runs in the thread that runs the reactor: a callback of the link, a
timer, or a call takes one step, and `settle` does what follows from it.

| a read is | because                                                | when it is due                             |
|-----------|--------------------------------------------------------|--------------------------------------------|
| queued    | its connection is being opened, or its window is full  | it goes on at the next port, without blame |
| asked     | its attempt is in flight                               | its port is quarantined; it goes elsewhere |
| paused    | the server was busy, or not ready                      | it is asked again                          |

An attempt that has exceeded its time is *late*: if its answer comes after all and the read has no outcome yet, it is
delivered. The policy is in `ports`, how a connection is used in `connection`.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING

from ucxx_transport.client.connection import Connection
from ucxx_transport.client.connections import Connections
from ucxx_transport.client.dispatch import Claim, Dispatch
from ucxx_transport.client.jobs import Job, Outcome, Read, copy_of, removed, too_late
from ucxx_transport.client.local import verify_checksum
from ucxx_transport.client.payload import Payload
from ucxx_transport.client.ports import Source
from ucxx_transport.errors import ChecksumError, ConfigError, StaleSlotError, TransportError
from ucxx_transport.wire.codec import clear_trailer, seal_of
from ucxx_transport.wire.frames import HEADER_BYTES, MAX_CHANNEL, SHORTEST_BYTES

if TYPE_CHECKING:
    from ucxx_transport.client.buffer_pool import BufferPool
    from ucxx_transport.client.errands import SourceCall
    from ucxx_transport.client.jobs import Carrier
    from ucxx_transport.client.membership import Membership
    from ucxx_transport.client.statistics import ClientCounters
    from ucxx_transport.config import ClientConfig
    from ucxx_transport.link.base import Operation
    from ucxx_transport.link.reactor import Reactor


class LoneRead(Read):
    """The one payload of a job, asked for while nothing else is under way on its connection, in few steps.

    The request leaves before anything is made ready for its answer: the server works meanwhile, and nothing that comes
    is taken in before the reactor's next turn. An answer that is the whole payload, while there still is nothing else
    to do on the connection, needs no queue, no settling and no list of ends: what `Connection.came` and `Reads.arrived`
    do of it is done here in one step. Whatever else comes, or was asked meanwhile, is theirs.

    Attributes:
        at: the connection that it was asked on first; `connection` is where it may have gone on since.
    """

    def __init__(self, job: Job, source: Source, at: Carrier, engine: Dispatch) -> None:
        self.job = job
        self.index = 0
        self.ref = job.refs[0]
        self.source = source
        self.limit_s = job.until_s
        self.connection = self.at = at
        self._engine = engine

    def ask(self, now: float) -> None:
        """Ask for it, by a request that brings the ends along that wait."""
        at, engine, due_s, unsent = self.at, self._engine, self.limit_s, None
        endpoint = at.endpoint
        assert endpoint is not None
        try:
            endpoint.post_send(at.session.fetch_one(self))
        except TransportError as error:
            unsent = error
        self.alternate = alternate = self.source.alternate
        if engine.read_attempts > 1 or alternate is not None:
            due_s = (now + due_s) / 2  # as `Dispatch.asked`
        self.place, self.due_s = "asked", due_s
        if due_s < engine.look_s:
            engine.look_at(due_s)
        at.used_s = now
        at.attempts.add(self)
        at.asked_bytes += self.ref.nbytes
        self.seal = seal_of(self.ref)
        _, _, end, whole = self.seal
        try:
            self.message = message = at.lend(whole if whole > SHORTEST_BYTES else SHORTEST_BYTES)  # noqa: FURB136 - `max` takes longer
        except TransportError as error:
            engine.fail(self, error)
            at.fail(error)
            return
        self.view = view = message.data
        clear_trailer(view, end)  # of an earlier answer, which could pass for this one's
        try:
            if unsent is not None:
                raise unsent
            endpoint.post_receive(view, self.came, channel=self.number & MAX_CHANNEL)
        except TransportError as error:
            at.fail(error)

    def came(self, operation: Operation) -> None:
        """Its receive is over."""
        at, engine, job, ref, view = self.at, self._engine, self.job, self.ref, self.view
        assert self.seal is not None
        header, trailer, end, whole = self.seal
        if (
            operation.error is not None
            or at.closed
            or self.place != "asked"
            or ref.checksum is not None
            or len(at.attempts) > 1
            or at.queue
            or engine.connections.waiting
            or engine.wary
            or view[:HEADER_BYTES] != header
            or view[end:whole] != trailer
            or job is None
            or not (job.is_held or self._is_claimed(job))
        ):
            at.came((self,), operation)
            return
        content = self.message[HEADER_BYTES : HEADER_BYTES + ref.nbytes]
        job.outcomes[0] = Payload(ref, content, engine.connections.schemas[ref.fingerprint], "ucx")
        self.place, self.job = "over", None
        self.source.under_way -= 1
        at.rested = True
        at.asked_bytes = 0
        at.attempts.clear()
        job.reads.clear()
        job.left = 0
        if job.is_held:
            job.held = self
        else:
            way = engine.delivered
            way.reads += 1
            way.nbytes += ref.nbytes
            way.recent_s.append(time.perf_counter() - job.began_s)
            at.end_one(self, delivered=True)
        job.done = True
        engine.jobs.discard(job)  # not before: an interrupt must not lose it
        if job.on_done is not None:
            job.finish()

    def _is_claimed(self, job: Job) -> bool:
        """Whether it is the caller's as it lies, and no duplicate."""
        if job.into is not None or job.on_payload is not None:
            return False
        try:
            self._engine.claim(self.ref)  # while the slot is held: no newer payload of it can have been delivered yet
        except StaleSlotError:
            return False
        return True


class Reads(Dispatch):
    """All jobs of a client that read over the link, and its connections.

    Attributes:
        connections: to any port of any source.
    """

    def __init__(
        self,
        config: ClientConfig,
        reactor: Reactor,
        reader: int,
        counters: ClientCounters,
        claim: Claim,
        *,
        pool: BufferPool,
        membership: Membership | None,
    ) -> None:
        super().__init__(config, reactor, reader, counters, claim)
        self.connections = Connections(
            config, reactor, counters, pool.lend, lambda key: Connection(self.connections, self, key)
        )
        self._schemas = self.connections.schemas
        self._membership = membership
        self._gone: Collection[bytes] = () if membership is None else membership.gone
        self._verify_checksum = config.verify_checksum

    @property
    def in_flight(self) -> int:
        """Jobs that are not done."""
        return len(self.jobs)

    # --- Calls ---

    def hear(self) -> None:
        """Take in what a watcher has reported."""
        if self._membership is not None and self._membership.news:
            self._membership.apply(self)

    def start(self, job: Job, indices: Iterable[int]) -> None:
        """Begin to read what a job reads over the link."""
        now = self.now()
        self.hear()
        groups: dict[tuple[str, tuple[int, ...]], tuple[Source, list[Read]]] = {}
        self.jobs.add(job)
        refs, until_s, gone = job.refs, job.until_s, self._gone
        for index in indices:
            ref = refs[index]
            if ref.host is None or not ref.ports:
                message = "this reference carries no address to read from; start the UCXXServer before writing"
                self._fail_at(job, index, ConfigError(message, ring=ref.ring_name))
            elif ref.ring_id in gone:
                self._fail_at(job, index, removed(ref))
            elif until_s <= now:
                self._fail_at(job, index, too_late(ref))  # before any port is blamed for it
            else:
                address = ref.host, ref.ports
                source, group = groups.get(address) or groups.setdefault(address, (self.ports.source(*address), []))
                job.reads[index] = read = Read(job, index, ref, source, until_s)
                group.append(read)
        job.alone = len(groups) < 2
        for source, group in groups.values():
            source.under_way += len(group)
        for source, group in groups.values():
            self.assign(source, group, now)
        self.settle()

    def start_one(self, job: Job) -> None:
        """`start` for a job of one; what is usual in few steps, for a read of 4 KiB costs no more than they do."""
        ref, membership = job.refs[0], self._membership
        source = self.ports.sources.get((ref.host, ref.ports))  # type: ignore[arg-type]  # None is in no key
        now, connections = self.now(), self.connections
        if (
            source is not None
            and not source.under_way
            and (connection := connections.known.get(source.key)) is not None
            and connection.is_open
            and not (connection.attempts or connection.queue or self.wary or ref.ring_id in connections.unsettled)
            and now - connection.used_s <= connections.max_age_s
            and now < job.until_s
            and ref.fingerprint in self._schemas
            and (membership is None or not (membership.news or ref.ring_id in membership.gone))
        ):
            source.under_way = 1
            self.jobs.add(job)
            job.reads[0] = read = LoneRead(job, source, connection, self)
            read.ask(now)
            if self.again or self.finished:
                self.settle()
        else:
            self.start(job, (0,))

    def here_over(self, job: Job) -> None:
        """What a job reads on this host has its outcomes; where that was all, it is done."""
        if not (job.left or job.done or job in self.finished):
            self.finished.append(job)
            self.settle()

    def begin(self, errand: SourceCall) -> None:
        """Have payloads taken, or discarded."""
        self.hear()
        errand.bind(self)
        if errand.source.ring_id in self._gone:
            errand.fail(removed(errand.source))
        else:
            errand.ask()

    def fail_all(self, error: TransportError) -> None:
        """Fail every job."""
        for job in tuple(self.jobs):
            for read in tuple(job.reads.values()):
                self.fail(read, copy_of(error))
            for index, outcome in enumerate(job.outcomes):
                if outcome is None:  # it waits for the lock of a ring of this host
                    self._fail_at(job, index, copy_of(error))
        for errand in tuple(self.errands):
            errand.fail(copy_of(error))
        self.settle()

    def arrived(self, connection: Carrier, reads: Sequence[Read]) -> None:
        """See `Dispatch`."""
        if self.wary:
            self.forgive(connection.key)
        end, schemas, orphans, way = connection.session.end, self._schemas, self.orphans, self.delivered
        now_s = time.perf_counter()
        for read in reads:
            job, ref = read.job, read.ref
            if job is None or read.place != "asked":  # it is late, or not wanted
                orphans.discard(read)
                if job is None or read.index not in job.reads:
                    end(read, delivered=False)
                    continue
            read.place = "over"
            start = read.start + HEADER_BYTES
            content = read.message[start : start + ref.nbytes]
            try:
                if ref.checksum is not None and self._verify_checksum:
                    # Also a large one here, at 18-35 GB/s: less than receiving it has held this thread.
                    verify_checksum(content, ref)
                payload = Payload(ref, content, schemas[ref.fingerprint], "ucx")
                if job.is_held:
                    job.held = read
                    self.over(read, payload)
                    continue
                self.claim(ref)  # while the slot is held: no newer payload of it can have been delivered yet
            except TransportError as error:
                self._unusable(connection, read, error)
                continue
            way.reads += 1
            way.nbytes += ref.nbytes
            way.recent_s.append(now_s - job.began_s)
            plain = job.into is None and job.on_payload is None
            self.over(read, payload if plain else self._passed_on(job, read.index, payload))
            end(read, delivered=True)

    def _unusable(self, connection: Carrier, read: Read, error: TransportError) -> None:
        """A payload has come and is not delivered: its bytes have changed, or it has been delivered before."""
        error.__traceback__ = None  # its frames hold the payload
        has_changed = isinstance(error, ChecksumError)
        connection.session.end(read, delivered=not has_changed)
        if not has_changed:
            self.fail(read, error)
        elif not read.late:  # else the read has gone on without it
            self.failed(read, error)

    def _passed_on(self, job: Job, index: int, payload: Payload) -> Outcome:
        """A payload as its caller wants it."""
        try:
            if job.into is not None:
                payload = payload.copied_into(job.into)
            return payload if job.on_payload is None else job.on_payload(index, payload)
        except TransportError as error:
            error.__traceback__ = None  # its frames hold the payload
            self._counters.failed(error)
            return error

    def deliver(self, job: Job) -> None:
        """The caller has got this far: what was held for it is its own now, and the server hears so."""
        read, job.held = job.held, None
        payload = job.outcomes[0]
        if read is None or not isinstance(payload, Payload):
            return
        try:
            self.claim(payload.ref)
        except StaleSlotError as error:
            self._counters.failed(error)
            job.outcomes[0] = error
        else:
            self._counters.delivered("ucx", payload.nbytes, time.perf_counter() - job.began_s)
            if job.into is not None:
                job.outcomes[0] = self._passed_on(job, 0, payload)
        read.connection.end_held(read, delivered=True)

    def _fail_at(self, job: Job, index: int, error: TransportError) -> None:
        """Fail what is no read yet."""
        self._counters.failed(error)
        job.outcomes[index] = error
        job.left -= 1
        if not job.left:
            self.finished.append(job)
