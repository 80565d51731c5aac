"""Reads over a link: every payload that is asked of another host, from the call to its outcome.

A *job* is one call of a client: references, one deadline. Each of its payloads is a *read*, and each time that a read
is asked of a port is an *attempt*. Everything here runs in the thread that runs the reactor: a callback of the link, a
timer, or a call takes one step, and `settle` does what follows from it.

| a read is | because                                                | when it is due                             |
|-----------|--------------------------------------------------------|--------------------------------------------|
| queued    | its connection is being opened, or its window is full  | it goes on at the next port, without blame |
| asked     | its attempt is in flight                               | its port is quarantined; it goes elsewhere |
| paused    | the server was busy, or not ready                      | it is asked again                          |

The policy is in `ports`, how a connection is used in `connection`.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from copy import copy
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol

from ucxx_transport.client.connection import Connection
from ucxx_transport.client.connections import Connections
from ucxx_transport.client.dispatch import Dispatch
from ucxx_transport.client.errands import Errand, Request
from ucxx_transport.client.jobs import REMEMBERED_RINGS, Job, Read, removed, too_late
from ucxx_transport.client.payload import Payload
from ucxx_transport.client.ports import Source
from ucxx_transport.errors import ConfigError, PeerLostError, StaleSlotError, TransportError
from ucxx_transport.settings import check_can

if TYPE_CHECKING:
    from ucxx_transport.client.jobs import ClientBase
    from ucxx_transport.client.local import LocalReader
    from ucxx_transport.link.reactor import Reactor
    from ucxx_transport.membership.sources import SourceChange, SourceRecord

LOCK_PAUSE_S: Final = 0.05
"""A ring whose lock was held is tried again after this."""


class Watcher(Protocol):
    """What a client needs of a `SourceWatcher`."""

    def report_to(self, report: Callable[[SourceChange], object]) -> Callable[[], None]: ...


class Membership:
    """Which sources are gone: what a watcher, if there is one, reports in its thread, for the reads in the reactor's.

    A read of a source that is gone fails at once, in whatever it was waiting, instead of by its deadline.

    Attributes:
        gone: rings whose sources are.
        news: the newest report of each ring that the reads have not seen. A client that lies idle runs no reactor, and
            what waits for it must not grow with every report.
        announce: called when there are news and were none. close: ends the reports.
    """

    def __init__(self, watcher: Watcher | None) -> None:
        self.gone: OrderedDict[bytes, None] = OrderedDict()
        self.news: dict[bytes, tuple[SourceRecord, bool]] = {}
        self.announce: Callable[[], None] | None = None
        self._lock = threading.Lock()
        self.close: Callable[[], None] = lambda: None
        if watcher is not None:
            check_can(watcher, "report_to", "watcher", "a SourceWatcher")
            self.close = watcher.report_to(self._report)

    def take_news(self) -> Iterable[tuple[SourceRecord, bool]]:
        """The news, which are none then: whose, and whether it is there."""
        with self._lock:
            news, self.news = self.news, {}
        return news.values()

    def _report(self, change: SourceChange) -> None:
        if change.kind == "update":
            return
        record, is_there = change.record, change.kind == "add"
        ring_id = record.ring_id
        with self._lock:
            if is_there:
                self.gone.pop(ring_id, None)
            else:
                self.gone[ring_id] = None
                if len(self.gone) > REMEMBERED_RINGS:
                    self.gone.popitem(last=False)
            is_first = not self.news
            was_removed = ring_id in self.news and not self.news[ring_id][1]
            # One that was removed and is back ends its reads all the same: it is another epoch.
            self.news[ring_id] = (record, is_there and not was_removed)
        if is_first and self.announce is not None:
            self.announce()


class Reads(Dispatch):
    """All calls of a client that are under way, and its connections, to any port of any source."""

    def __init__(self, base: ClientBase, reactor: Reactor, local: LocalReader, membership: Membership) -> None:
        super().__init__(base, reactor)
        self.connections = Connections(base, reactor, lambda key: Connection(self.connections, self, key))
        self._local = local
        self._membership = membership
        membership.announce = partial(reactor.submit, self.hear)
        if membership.news:
            membership.announce()

    def hear(self) -> None:
        """Take in what a watcher has reported; before a read begins, which a report from before does not concern."""
        for record, is_there in self._membership.take_news() if self._membership.news else ():
            keys = [] if record.host is None else [(record.host, port) for port in record.ports]
            if is_there:
                for key in keys:  # worth a try
                    self.ports.forgive(key, self.now())
                continue
            self.fail_all(removed(record), record.ring_id)
            for key in keys:
                self.connections.evict(key)

    def go_on(self, job: Job) -> None:
        """Do the rest of a job: what is asked of other hosts leaves before anything is copied here."""
        self.jobs.add(job)
        if isinstance(job, Errand):
            job.engine = self
        if len(job.here) < job.left:
            if len(job.refs) == 1 and job.counts:
                self.start_one(job)
                return
            here = {index for index, _ in job.here}
            self._start(job, [index for index in job.missing if index not in here])
            if not here:
                return
        self._visit(job)

    def _visit(self, job: Job) -> None:
        """Visit its rings of this host; where locks are held ever again, while the reactor does what else there is."""
        job.here = [] if job.done else self._local.in_turn(job, job.here)
        if job.here:
            self.call_at(min(self.now() + LOCK_PAUSE_S, job.until_s), partial(self._visit, job))
        else:
            self._check(job)
            self.settle()

    def _check(self, job: Job) -> None:
        """A job may have its last outcome, though no read has brought it."""
        if not (job.left or job.done or job in self.finished):
            self.finished.append(job)

    def _start(self, job: Job, indices: Iterable[int]) -> None:
        """Begin to read, or to ask for, what is elsewhere."""
        now = self.now()
        self.hear()
        groups: dict[tuple[str, tuple[int, ...]], tuple[Source, list[Read]]] = {}
        refs, until_s, gone = job.refs, job.until_s, self._membership.gone
        make: Callable[..., Read] = Read if job.counts else Request
        for index in indices:
            ref = refs[index]
            if ref.host is None or not ref.ports:
                message = "this reference carries no address to read from; start the UCXXServer before writing"
                if not ref.generation:  # it names no payload, but its source
                    message = "this source has no address to ask; start its UCXXServer"
                self._local.over(job, index, ConfigError(message, ring=ref.ring_name))
            elif ref.ring_id in gone:
                self._local.over(job, index, removed(ref))
            elif until_s <= now:
                self._local.over(job, index, too_late(ref))  # before any port is blamed for it
            else:
                address = ref.host, ref.ports
                source, group = groups.get(address) or groups.setdefault(address, (self.ports.source(*address), []))
                job.reads[index] = read = make(job, index, ref, source, until_s)
                group.append(read)
        job.alone = len(groups) < 2
        for source, group in groups.values():
            source.under_way += len(group)
        for source, group in groups.values():
            self.assign(source, group, now)
        self._check(job)
        self.settle()

    def start_one(self, job: Job) -> None:
        """`go_on` for one payload elsewhere; what is usual in few steps: a read of 4 KiB costs no more than they do."""
        self.jobs.add(job)
        ref, membership = job.refs[0], self._membership
        source = self.ports.sources.get((ref.host, ref.ports))  # type: ignore[arg-type]  # None is in no key
        now, connections = self.now(), self.connections
        if (
            source is not None
            and not source.under_way
            and (connection := connections.known.get(source.key)) is not None
            and now - connection.used_s <= connections.max_age_s
            and now < job.until_s
            and not self.ports.avoided
            and not (membership.news or ref.ring_id in membership.gone)
        ):
            source.under_way = 1
            job.reads[0] = read = Read(job, 0, ref, source, job.until_s)
            read.alternate = source.alternate
            if connection.ask_one(read, now):
                if self.again or self.finished:
                    self.settle()
                return
            source.under_way = 0
        self._start(job, (0,))

    def fail_all(self, error: TransportError, ring_id: bytes | None = None) -> None:
        """Fail whatever is under way, or only what is asked for of one ring over the link."""
        for job in tuple(self.jobs):
            for read in tuple(job.reads.values()):
                if ring_id in (None, read.ref.ring_id):
                    self.fail(read, copy(error))
            for index in job.missing if ring_id is None else ():  # they wait for the lock of a ring of this host
                self._local.over(job, index, copy(error))
            self._check(job)
        self.settle()

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
        read.connection.end_held(read, delivered=True)

    def abandon(self, job: Job) -> None:
        """Nobody wants a job any more: what is in flight is ended as not delivered when it comes."""
        job.on_done = None
        if job.held is not None:
            job.held.connection.end_held(job.held, delivered=False)
            job.held = None
        for read in tuple(job.reads.values()):
            self.over(read, PeerLostError("abandoned", reason="cancelled"))
        for outcome in job.outcomes:
            if isinstance(outcome, Payload):
                outcome.release()
        self.settle()
        self.jobs.discard(job)
        job.done = True
