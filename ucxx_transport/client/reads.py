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
from collections.abc import Callable, Collection, Iterable
from typing import TYPE_CHECKING

from ucxx_transport.client.connection import Connection
from ucxx_transport.client.connections import Connections
from ucxx_transport.client.dispatch import Dispatch
from ucxx_transport.client.jobs import Job, Outcome, Read, copy_of, removed, too_late
from ucxx_transport.client.local import verify_checksum
from ucxx_transport.client.payload import Payload
from ucxx_transport.client.ports import PortKey, Source, blames_port
from ucxx_transport.errors import ChecksumError, ConfigError, PeerLostError, StaleSlotError, TransportError
from ucxx_transport.wire.frames import HEADER_BYTES

if TYPE_CHECKING:
    from ucxx_transport.client.buffer_pool import BufferPool
    from ucxx_transport.client.errands import SourceCall
    from ucxx_transport.client.jobs import Attempt
    from ucxx_transport.client.membership import Membership
    from ucxx_transport.client.statistics import ClientCounters
    from ucxx_transport.config import ClientConfig
    from ucxx_transport.link.reactor import Reactor
    from ucxx_transport.schema import SlotRef


class Reads:
    """All jobs of a client that read over the link, and its connections.

    Attributes:
        connections: to any port of any source. dispatch: gives reads their ports.
        jobs: those with reads that have no outcome.
        finished: jobs that have all their outcomes, until `settle` reports them.
        orphans: attempts in flight that no read waits for, and late ones.
        errands: calls that take or discard, and are not done.
    """

    def __init__(
        self,
        config: ClientConfig,
        reactor: Reactor,
        *,
        reader: int,
        pool: BufferPool,
        counters: ClientCounters,
        claim: Callable[[SlotRef], None],
        membership: Membership | None = None,
    ) -> None:
        self.reader = reader
        self.jobs: set[Job] = set()
        self.finished: list[Job] = []
        self.orphans: set[Attempt] = set()
        self.errands: set[SourceCall] = set()
        self.connections = Connections(config, reactor, counters=counters, lend=pool.lend, connect=self._connect)
        self.dispatch = Dispatch(self, self.connections)
        self.now = reactor.now
        self._schemas = self.connections.schemas
        self._counters = counters
        self._claim = claim
        self._membership = membership
        self._gone: Collection[bytes] = () if membership is None else membership.gone
        self._verify_checksum = config.verify_checksum
        self._settling = False

    def _connect(self, key: PortKey) -> Connection:
        return Connection(self.connections, self.dispatch, self, key)

    @property
    def in_flight(self) -> int:
        """Jobs that are not done."""
        return len(self.jobs)

    # --- Calls ---

    def hear(self) -> None:
        """Take in what a watcher has reported."""
        if self._membership is not None and self._membership.news:
            self._membership.apply(self, self.dispatch, self.errands)

    def start(self, job: Job, indices: Iterable[int]) -> None:
        """Begin to read what a job reads over the link."""
        now = self.now()
        self.hear()
        groups: dict[Source, list[Read]] = {}
        self.jobs.add(job)
        for index in indices:
            ref = job.refs[index]
            host = ref.host
            if host is None or not ref.ports:
                message = "this reference carries no address to read from; start the UCXXServer before writing"
                self._fail_at(job, index, ConfigError(message, ring=ref.ring_name))
                continue
            source = self.dispatch.ports.source(host, ref.ports)
            read = Read(job, index, ref, source)
            if ref.ring_id in self._gone:
                self._fail_at(job, index, removed(ref))
                continue
            if job.until_s <= now:
                self._fail_at(job, index, too_late(ref))  # before any port is blamed for it
                continue
            source.under_way += 1
            job.reads.append(read)
            groups.setdefault(source, []).append(read)
        job.alone = len(groups) < 2
        for source, reads in groups.items():
            self.dispatch.assign(source, reads, now)
        self.settle()

    def start_one(self, job: Job) -> None:
        """`start` for a job of one; what is usual in few steps, for a read of 4 KiB costs no more than they do."""
        ref = job.refs[0]
        now = self.now()
        source = self.dispatch.ports.sources.get((ref.host, ref.ports))  # type: ignore[arg-type]  # None is in no key
        membership = self._membership
        has_news = membership is not None and (membership.news or ref.ring_id in membership.gone)
        if not (source is None or source.under_way or self.dispatch.wary or job.until_s <= now or has_news):
            connections = self.connections
            key = source.keys[source.position % len(source.keys)]
            connection = connections.known.get(key)
            if (
                connection is not None
                and connection.is_open
                and not (connection.attempts or connection.queue or ref.ring_id in connections.unsettled)
                and now - connection.used_s <= connections.max_age_s
                and (not ref.fingerprint or ref.fingerprint in self._schemas)
            ):
                connections.known.move_to_end(key)
                source.under_way = 1
                self.jobs.add(job)
                connection.ask_one(job, source, now)
                if self.dispatch.again or self.finished:
                    self.settle()
                return
        self.start(job, (0,))

    def here_over(self, job: Job) -> None:
        """What a job reads on this host has its outcomes; where that was all, it is done."""
        if not (job.left or job.done or job in self.finished):
            self._finish(job)
            self.settle()

    def abandon(self, job: Job) -> None:
        """Nobody wants a job any more: what is in flight is ended as not delivered when it comes."""
        job.on_done = None
        if job.held is not None:
            job.held.connection.end_held(job.held, delivered=False)
            job.held = None
        for read in tuple(job.reads):
            if read.job is not None:
                self._over(read, PeerLostError("abandoned", reason="cancelled"))
        for outcome in job.outcomes:
            if isinstance(outcome, Payload):
                outcome.release()
        self.settle()
        self.jobs.discard(job)
        job.done = True

    def begin(self, errand: SourceCall) -> None:
        """Have payloads taken, or discarded."""
        self.hear()
        errand.bind(self.dispatch, self.errands)
        if errand.source.ring_id in self._gone:
            errand.fail(removed(errand.source))
        else:
            errand.ask()

    def fail_all(self, error: TransportError) -> None:
        """Fail every job."""
        for job in tuple(self.jobs):
            for read in tuple(job.reads):
                if read.job is not None:
                    self.fail(read, copy_of(error))
            for index, outcome in enumerate(job.outcomes):
                if outcome is None:  # it waits for the lock of a ring of this host
                    self._fail_at(job, index, copy_of(error))
        for errand in tuple(self.errands):
            errand.fail(copy_of(error))
        self.settle()

    def arrived(self, attempt: Attempt) -> bool | None:
        """An attempt has brought its payload, and its schema is known.

        Returns:
            Whether it is to be ended as delivered; None: it is not to be ended yet.
        """
        if self.dispatch.wary:
            self.dispatch.forgive(attempt.connection.key)
        read = attempt.read
        self.orphans.discard(attempt)
        job = None if read is None else read.job
        if read is None or job is None:
            return False
        ref = read.ref
        attempt.read = None
        if read.attempt is attempt:
            read.attempt = None  # else the payload would wait for the garbage collector
        content = attempt.message[HEADER_BYTES : HEADER_BYTES + ref.nbytes]
        try:
            if ref.checksum is not None and self._verify_checksum:
                # Also a large one here, at 18-35 GB/s: less than receiving it has held this thread.
                verify_checksum(content, ref)
            payload = Payload(ref, content, self._schemas[ref.fingerprint] if ref.fingerprint else None, "ucx")
            if job.is_held:
                job.held = attempt
                self._over(read, payload)
                return None
            self._claim(ref)  # while the slot is held: no newer payload of it can have been delivered yet
        except TransportError as error:
            error.__traceback__ = None  # its frames hold the payload
            if isinstance(error, ChecksumError):
                self.dispatch.failed(read, error)
                return False
            self.fail(read, error)
            return True
        self._counters.delivered("ucx", ref.nbytes, time.perf_counter() - job.began_s)
        plain = job.into is None and job.on_payload is None
        self._over(read, payload if plain else self._passed_on(job, read.index, payload))
        return True

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
        attempt, job.held = job.held, None
        payload = job.outcomes[0]
        if attempt is None or not isinstance(payload, Payload):
            return
        try:
            self._claim(payload.ref)
        except StaleSlotError as error:
            self._counters.failed(error)
            job.outcomes[0] = error
        else:
            self._counters.delivered("ucx", payload.nbytes, time.perf_counter() - job.began_s)
            if job.into is not None:
                job.outcomes[0] = self._passed_on(job, 0, payload)
        attempt.connection.end_held(attempt, delivered=True)

    def refused(self, attempt: Attempt, error: TransportError) -> None:
        """The server has answered without a payload, or with something that is none."""
        if self.dispatch.wary:
            self.dispatch.forgive(attempt.connection.key)
        read = attempt.read
        if attempt.late or read is None:
            self.orphans.discard(attempt)
        attempt.read = None
        if read is None or read.job is None or read.attempt is not attempt:
            return  # the read has gone on without it
        read.attempt = None
        if blames_port(error):
            self.dispatch.quarantine(attempt.connection.key, error)
        read.source.advance()
        self.dispatch.failed(read, error)

    def no_memory(self, read: Read, error: TransportError) -> None:
        """There is no buffer for a read."""
        error.__traceback__ = None
        self.fail(read, error)

    def fail(self, read: Read, error: TransportError) -> None:
        self._counters.failed(error)
        self._over(read, error)

    def _fail_at(self, job: Job, index: int, error: TransportError) -> None:
        """Fail what is no read yet."""
        self._counters.failed(error)
        job.outcomes[index] = error
        job.left -= 1
        if not job.left:
            self._finish(job)

    def _over(self, read: Read, outcome: Outcome) -> None:
        job, source = read.job, read.source
        assert job is not None
        read.job = None
        source.under_way -= 1
        attempt = read.attempt
        if attempt is not None:  # it goes on without this read
            read.attempt = None
            attempt.read = None
            self.orphans.add(attempt)
            self.dispatch.look_at(attempt.due_s)
        job.outcomes[read.index] = outcome
        job.left -= 1
        if not job.left:  # as `_finish`
            self.jobs.discard(job)
            job.reads.clear()
            self.finished.append(job)

    def _finish(self, job: Job) -> None:
        self.jobs.discard(job)
        job.reads.clear()
        self.finished.append(job)

    def settle(self) -> None:
        """Do what follows from the last step: reads go on, and jobs that have all outcomes are reported."""
        dispatch = self.dispatch
        if self._settling or not (dispatch.again or self.finished):
            return
        self._settling = True
        try:
            while True:
                if dispatch.again:
                    dispatch.run()
                elif self.finished:
                    if self.connections.ending:
                        self.connections.send_ends()
                    job = self.finished.pop(0)
                    job.done = True
                    on_done, job.on_done = job.on_done, None
                    if on_done is not None:
                        on_done(job)
                else:
                    return
        finally:
            self._settling = False
