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
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from ucxx_transport.client.connection import Connection
from ucxx_transport.client.connections import Connections
from ucxx_transport.client.dispatch import Dispatch
from ucxx_transport.client.jobs import Job, Outcome, Read, copy_of, removed, too_late
from ucxx_transport.client.local import verify_checksum
from ucxx_transport.client.payload import Payload
from ucxx_transport.client.ports import Source
from ucxx_transport.errors import ChecksumError, ConfigError, StaleSlotError, TransportError
from ucxx_transport.wire.frames import HEADER_BYTES

if TYPE_CHECKING:
    from ucxx_transport.client.errands import SourceErrand
    from ucxx_transport.client.jobs import Carrier, ClientBase
    from ucxx_transport.link.reactor import Reactor


class Reads(Dispatch):
    """All jobs of a client that read over the link, and its connections, to any port of any source."""

    def __init__(self, base: ClientBase, reactor: Reactor) -> None:
        super().__init__(base, reactor)
        self.connections = Connections(base, reactor, lambda key: Connection(self.connections, self, key))
        self._schemas = self.connections.schemas
        self._membership = membership = base.membership
        self._gone = {} if membership is None else membership.gone
        self._verify_checksum = base.config.verify_checksum
        if membership is not None:
            membership.bind(reactor, self.hear)

    def hear(self) -> None:
        """Take in what a watcher has reported; before a read begins, which a report from before does not concern."""
        membership = self._membership
        for record, is_there in () if membership is None or not membership.news else membership.take_news():
            keys = [] if record.host is None else [(record.host, port) for port in record.ports]
            if is_there:
                for key in keys:  # worth a try
                    self.forgive(key)
                continue
            self.fail_all(removed(record), record.ring_id)
            for key in keys:
                self.connections.evict(key)

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
            job.reads[0] = read = Read(job, 0, ref, source, job.until_s)
            connection.ask_one(read, now)
            if self.again or self.finished:
                self.settle()
        else:
            self.start(job, (0,))

    def here_over(self, job: Job) -> None:
        """What a job reads on this host has its outcomes; where that was all, it is done."""
        if not (job.left or job.done or job in self.finished):
            self.finished.append(job)
            self.settle()

    def begin(self, errand: SourceErrand) -> None:
        """Have payloads taken, or discarded."""
        self.hear()
        errand.bind(self)
        if errand.source.ring_id in self._gone:
            errand.end(removed(errand.source))
        else:
            errand.ask()

    def fail_all(self, error: TransportError, ring_id: bytes | None = None) -> None:
        """Fail whatever is under way, or only what is asked for of one ring over the link."""
        for job in tuple(self.jobs):
            for read in tuple(job.reads.values()):
                if ring_id in (None, read.ref.ring_id):
                    self.fail(read, copy_of(error))
            for index in job.missing if ring_id is None else ():  # they wait for the lock of a ring of this host
                self._fail_at(job, index, copy_of(error))
        for errand in tuple(self.errands):
            if ring_id in (None, errand.source.ring_id):
                errand.end(copy_of(error))
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
            self.counters.failed(error)
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
            self.counters.failed(error)
            job.outcomes[0] = error
        else:
            self.counters.delivered("ucx", payload.nbytes, time.perf_counter() - job.began_s)
            if job.into is not None:
                job.outcomes[0] = self._passed_on(job, 0, payload)
        read.connection.end_held(read, delivered=True)

    def _fail_at(self, job: Job, index: int, error: TransportError) -> None:
        """Fail what is no read yet."""
        self.counters.failed(error)
        job.outcomes[index] = error
        job.left -= 1
        if not job.left:
            self.finished.append(job)
