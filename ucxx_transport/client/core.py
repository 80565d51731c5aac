"""ClientCore, which the blocking and the asyncio client and the prefetcher share: `Here`, and a reactor with its reads.

What begins or ends jobs is for the thread that runs the reactor.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from ucxx_transport.client.errands import Discard, Take
from ucxx_transport.client.here import Entry, Here, Into, in_turn
from ucxx_transport.client.jobs import Call, Job, OnPayload
from ucxx_transport.client.membership import Membership, Watcher
from ucxx_transport.client.reads import Reads
from ucxx_transport.config import ClientConfig, checked_seconds
from ucxx_transport.errors import ConfigError, PeerLostError
from ucxx_transport.link.reactor import Reactor

if TYPE_CHECKING:
    from ucxx_transport.client.buffer_pool import PageLocker
    from ucxx_transport.client.ports import Takeable
    from ucxx_transport.client.statistics import ClientStatistics
    from ucxx_transport.link.base import Link, LinkFactory, Timers
    from ucxx_transport.ring import SharedRingBuffer
    from ucxx_transport.schema import SlotRef

FIRST_PAUSE_S: Final = 0.003
LONGEST_PAUSE_S: Final = 0.1
"""A ring whose lock was held is tried again after the first, then ever later."""


class ClientCore(Here):
    """See the module; arguments and errors as `UCXXClient`.

    Args:
        config: settings. page_locker, in_place: as for `Here`.
        link_factory: opens the link on the first read that needs one; the default is UCX.
        watcher: which sources there are.
        on_link: called when the link has been opened.
        clock: of the reactor and of every deadline.

    Attributes:
        reactor: runs everything that is not local; opens the link only when it is needed.
        reads: those over the link.
        damaged: whether a step of the reactor may have been cut in two; `repair` is then to be called first.
    """

    def __init__(
        self,
        config: ClientConfig | None,
        link_factory: LinkFactory | None,
        *,
        watcher: Watcher | None = None,
        page_locker: PageLocker | None = None,
        in_place: Callable[[SharedRingBuffer], bool] | None = None,
        on_link: Callable[[], object] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(config, page_locker=page_locker, in_place=in_place, clock=clock)
        self.damaged = False
        self._link_factory = link_factory or _ucxx_links(self.config)
        self._on_link = on_link
        self._membership = Membership(watcher) if watcher is not None else None
        self.reactor, self.reads = self._opened()

    def _opened(self) -> tuple[Reactor, Reads]:
        """A reactor, and the reads that it runs."""
        reactor = Reactor(self._open_link, spin_s=self.config.spin_s, clock=self._clock)
        reads = Reads(
            self.config,
            reactor,
            reader=self.reader,
            pool=self.pool,
            counters=self.counters,
            claim=self.delivered.claim,
            membership=self._membership,
        )
        if self._membership is not None:
            self._membership.bind(reactor, reads.hear)
        return reactor, reads

    def _open_link(self, timers: Timers) -> Link:
        link = self._link_factory(timers)
        if self._on_link is not None:
            self._on_link()
        return link

    # --- Jobs: in the thread that runs the reactor ---

    def begin(
        self,
        refs: Sequence[SlotRef],
        deadline_s: float | str | None = None,
        *,
        on_done: Callable[[Any], object] | None = None,
        on_payload: OnPayload | None = None,
        into: Into | None = None,
    ) -> Job:
        """Read payloads: those of this host's rings now, the others as the reactor is run.

        Args:
            refs: what to read.
            deadline_s: for all of them together; default `ClientConfig.deadline_s`.
            on_done: called with the job once it is done; before this returns, when nothing is to be waited for.
            on_payload: called with each payload and its index as it comes; what it returns takes the payload's place, a
                TransportError that it raises becomes the outcome.
            into: memory of the caller's for the payload, of a job of one.

        Raises:
            ConfigError: the client is closed or a forked copy, or `deadline_s` is no duration.
        """
        self.require_usable()
        limit_s = self.limit_s(deadline_s)
        job = Job(refs, self.reactor.now() + limit_s, on_done, on_payload, into)
        self.go_on(job, *self.look_at(job, range(len(refs))))
        return job

    def go_on(self, job: Job, remote: Sequence[int], here: Sequence[tuple[int, SharedRingBuffer]]) -> None:
        """Do the rest of a job after `look_at`: what is asked of other hosts leaves before anything is copied here."""
        if remote and len(job.refs) == 1:
            self.reads.start_one(job)
        elif remote:
            self.reads.start(job, remote)
            here = in_turn(here, partial(self.read_at, job))
        if here:
            self.reads.jobs.add(job)
        self._until_free(job, here, partial(self.read_at, job), over=partial(self.reads.here_over, job))

    def _until_free(
        self,
        call: Call,
        held: Sequence[tuple[Entry, SharedRingBuffer]],
        visit: Callable[[Entry, SharedRingBuffer], bool],
        *,
        over: Callable[[], object],
        pause_s: float = FIRST_PAUSE_S,
    ) -> None:
        """Visit rings whose locks are held ever again, while the reactor does what else there is; then it is `over`."""

        def again() -> None:
            if not call.done:
                left = [] if self.closed else in_turn(held, visit)
                self._until_free(call, left, visit, over=over, pause_s=min(2 * pause_s, LONGEST_PAUSE_S))

        if held:
            self.reactor.call_at(min(self.reactor.now() + pause_s, call.until_s), again)
        else:
            over()

    def discard_call(
        self,
        refs: Sequence[SlotRef],
        deadline_s: float | str | None = None,
        on_done: Callable[[Any], object] | None = None,
    ) -> Discard:
        """Let payloads of this host's rings go unread; `discard` does so with the others, if there are any.

        Raises:
            ConfigError: as for `begin`.
        """
        self.require_usable()
        call = Discard(self.reactor.now() + self.limit_s(deadline_s), on_done)
        call.rings, call.here = self.look_at_discards(call, refs)
        return call

    def discard(self, call: Discard) -> None:
        """Do the rest of a call of `discard_call`, as the reactor is run."""
        call.left += 1
        self.reads.discard(call)
        self._until_free(call, call.here, partial(self.discard_at, call), over=call.one_over)

    def take_call(
        self,
        source: Takeable,
        *,
        max_payloads: int,
        max_bytes: int,
        selector: str,
        wait_s: float | str,
        on_done: Callable[[Any], object] | None = None,
    ) -> Take:
        """A call that takes payloads, for `Reads.take` or `take_here`; errors as `SyncUCXXClient.take`."""
        self.require_usable()
        wait = checked_seconds(wait_s, "wait_s")
        return Take(
            source,
            max_payloads=max_payloads,
            max_bytes=max_bytes,
            selector=selector,
            wait_s=wait,
            until_s=self.reactor.now() + wait + self.config.deadline_s,
            on_done=on_done,
        )

    def abandon(self, call: Call) -> None:
        """Nobody wants a call any more: its payloads are released, and what is in flight ends as not delivered.

        A discard goes on by itself: what cannot be said now is said with the next read.
        """
        if isinstance(call, Job):
            self.reads.abandon(call)
        elif isinstance(call, Take):
            call.abandon()

    def forget(self, call: Call) -> None:
        """`abandon` while the core is damaged: nothing is done for it any more."""
        job = call.job if isinstance(call, Take) else call
        if isinstance(call, Take):
            self.reads.takes.discard(call)
        if isinstance(job, Job):
            job.done = True
            job.outcomes.clear()
            job.reads.clear()
            self.reads.jobs.discard(job)
            self.reads.finished = [other for other in self.reads.finished if other is not job]

    def repair(self) -> None:
        """After an interrupt that may have cut a step of the reactor in two: go on with a new one.

        Connections are opened again; calls of other threads that are under way begin again. What was delivered stays
        so, by name.
        """
        reactor, reads = self.reactor, self.reads
        with suppress(Exception):
            reads.connections.close()  # what they owe is known then
            reads.end_discards()
        with suppress(Exception):
            reactor.close()
        self.reactor, self.reads = self._opened()
        self.damaged = False
        for names in reads.connections.unsettled.values():
            self.reads.connections.owe(names)
        begun_again = {*reads.jobs, *reads.finished}  # of a take, what its server has picked
        for job in begun_again:
            job.reads.clear()
            missing = [index for index, outcome in enumerate(job.outcomes) if outcome is None]
            job.left = len(missing)
            self.go_on(job, *self.look_at(job, missing))  # which reports it at once when nothing is missing
        for take in tuple(reads.takes):
            if take.job in begun_again:
                take.bind(self.reads, self.reads.dispatch, self.reads.takes)
            else:
                take.fail(PeerLostError("the connection was closed after an interrupt", reason="closed"))

    def close(self) -> None:
        """Fail what is under way, take leave of the servers, close connections and rings. Bounded; idempotent."""
        if self.reactor.closed or self.inherited:
            return
        if self.damaged:
            self.closed = True
            self.end()
            return
        said: list[bool] = []
        with suppress(ConfigError):  # the link was closed before: the interpreter exits
            self.begin_goodbye(lambda: said.append(True))
            while not said and self.reactor.has_link:
                self.reactor.run_once(math.inf)
        self.end()

    def begin_goodbye(self, on_said: Callable[[], None]) -> None:
        """The first half of closing: refuse further reads, fail those under way, take leave of the servers."""
        self.closed = True
        if self._membership is not None:
            self._membership.close()
        self.fail_all()
        self.reads.connections.say_goodbye(on_said)

    def fail_all(self) -> None:
        """Fail every job under way, because the client is closed."""
        self.reads.fail_all(PeerLostError("the client was closed", reason="closed"))

    def end(self) -> None:
        """The second half: nothing is left behind. Payloads still held stay valid."""
        self.reads.connections.close()
        self.reactor.close()
        self.local.close()
        self.pool.close()

    def statistics(self) -> ClientStatistics:
        """The counts now."""
        pool = self.pool.statistics()
        connections = self.reads.connections
        link = self.reactor.link if self.reactor.has_link and not self.reactor.closed else None
        return self.counters.snapshot(
            pooled_endpoints=connections.idle_count,
            lent_buffers=pool.lent,
            idle_buffer_bytes=pool.idle_bytes,
            leaked_buffers=link.statistics().leaked_buffers if link is not None else 0,
            transports=link.transports() if link is not None else (),
        )


def _ucxx_links(config: ClientConfig) -> LinkFactory:
    def open_link(timers: Timers) -> Link:
        from ucxx_transport.link.ucx import UCXXLink

        return UCXXLink(timers, shm_lanes=config.shm_lanes, ucx=config.link_settings)

    return open_link
