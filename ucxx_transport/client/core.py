"""ClientCore, which the blocking and the asyncio client and the prefetcher share.

It has an identity, settings, buffers, counts and names; it reads rings of this host at once, in any thread, and has a
reactor with `reads`: what begins or ends there is for the thread that runs the reactor.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ucxx_transport.client.errands import Discard, Take
from ucxx_transport.client.jobs import Call, ClientBase, Entry, Job, OnPayload, Takeable, clear_frames
from ucxx_transport.client.local import LocalReader
from ucxx_transport.client.payload import PageLocker, writable_bytes
from ucxx_transport.client.reads import Membership, Reads, Watcher
from ucxx_transport.config import ClientConfig, checked_seconds
from ucxx_transport.errors import ConfigError, PeerLostError, StaleSlotError, TransportError
from ucxx_transport.link.reactor import LinkFactory, Reactor
from ucxx_transport.schema import SlotRef
from ucxx_transport.schema.episode_record import Referring, several, slot_ref_of
from ucxx_transport.settings import made_of
from ucxx_transport.teardown import may_end, refuse_forked

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from ucxx_transport.client.statistics import ClientStatistics
    from ucxx_transport.link.endpoint import Link
    from ucxx_transport.ring import SharedRingBuffer


class ClientCore(ClientBase):
    """See the module; other arguments and errors as `UCXXClient`.

    Args:
        in_place: of which rings payloads stay in their slots with `local="auto"`.
        on_link: called when the link has been opened.

    Attributes:
        damaged: whether a step of the reactor may have been cut in two; `repair` is then to be called first.
    """

    def __init__(
        self,
        config: ClientConfig | Mapping[str, object] | None,
        link_factory: LinkFactory | None,
        *,
        watcher: Watcher | None = None,
        page_locker: PageLocker | None = None,
        in_place: bool | Callable[[SharedRingBuffer], bool] = True,
        on_link: Callable[[], object] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        config = made_of(ClientConfig, config, "config")
        if page_locker is not None and config.local == "view":
            raise ConfigError(
                "local='view' reads in place, but a GPU takes payloads from page-locked buffers: leave local at "
                "'auto', which then copies into those, or receive with device='cpu'",
                field="local",
            )
        super().__init__(config, page_locker, clock)
        self.local = LocalReader(self, in_place)
        self._membership = Membership(watcher)
        self.damaged = False
        self.pid = os.getpid()
        self._link_factory = link_factory
        self._on_link = on_link
        self.reads = self._opened()
        self.reactor = self.reads.reactor

    def _opened(self) -> Reads:
        reactor = Reactor(self._open_link, spin_s=self.config.spin_s, clock=self.clock)
        return Reads(self, reactor, self.local, self._membership)

    def _open_link(self, timers: Reactor) -> Link:
        if self._link_factory is not None:
            link = self._link_factory(timers)
        else:
            from ucxx_transport.link.ucx import UCXXLink

            link = UCXXLink(timers, shm_lanes=self.config.shm_lanes, ucx=self.config.link_settings)
        if self._on_link is not None:
            self._on_link()
        return link

    @property
    def inherited(self) -> bool:
        """Whether it is not to be ended here, as in a forked child: connections are its parent's."""
        return not may_end(self.pid)

    def require_usable(self) -> None:
        """Refuse a closed client, and a forked copy of one, by a ConfigError."""
        refuse_forked(self.pid, "client")
        if self.closed:
            raise ConfigError("the client is closed; make another")

    def limit_s(self, deadline_s: float | str | None) -> float:
        """The seconds that a call may take; a ConfigError when they are no duration."""
        return self.config.deadline_s if deadline_s is None else checked_seconds(deadline_s, "deadline_s")

    def admit(self, ref: SlotRef, into: Buffer | None = None) -> SharedRingBuffer | None:
        """First look at a reference, which may raise what `read` does; returns its ring if it is read locally."""
        if ref.nbytes > self.config.max_payload_bytes:
            raise ConfigError(
                f"ref.nbytes = {ref.nbytes} is larger than client.max_payload_bytes = "
                f"{self.config.max_payload_bytes}; raise the setting if such payloads are real",
                field="max_payload_bytes",
                value=self.config.max_payload_bytes,
            )
        if into is not None:
            writable_bytes(into, ref.nbytes)
        slots = self.delivered.rings.get(ref.ring_id)
        if slots is not None and slots.get(ref.slot, 0) >= ref.generation:
            self.delivered.check(ref)
        return None if ref.host_id != self.local.reads_host else self.local.ring_of(ref)

    def count_failure(self, error: TransportError) -> None:
        """Count a read that raised; the error may be kept, its buffers are not."""
        clear_frames(error)
        self.counters.failed(error)

    def begin(
        self,
        refs: Iterable[SlotRef],
        deadline_s: float | str | None = None,
        *,
        on_done: Callable[[Any], object] | None = None,
        on_payload: OnPayload | None = None,
    ) -> Job:
        """Read payloads: those of this host's rings now, the others as the reactor is run.

        `on_done` may be called before this returns. A TransportError that `on_payload` raises becomes the outcome.
        """
        job = self.read_call(refs, deadline_s, on_payload)
        job.on_done = on_done
        self.reads.go_on(job)
        return job

    def read_call(
        self, refs: Iterable[Referring], deadline_s: float | str | None, on_payload: OnPayload | None = None
    ) -> Job:
        """A call that has read payloads of this host's rings, unless there are others too; the rest is for `go_on`."""
        self.require_usable()
        job = Job([*several(refs, "refs")], self.reactor.now() + self.limit_s(deadline_s))
        job.on_payload = on_payload
        here: list[Entry] = []
        for index, ref in enumerate(job.refs):
            try:
                if type(ref) is not SlotRef:
                    job.refs[index] = slot_ref_of(ref)
                ring = self.admit(job.refs[index])
            except TransportError as error:
                self.local.over(job, index, error)
            else:
                if ring is not None:
                    here.append((index, ring))
        job.here = here if len(here) < job.left else self.local.in_turn(job, here)
        return job

    def discard_call(self, refs: Iterable[Referring], deadline_s: float | str | None = None) -> Discard:
        """A call that discards payloads; the same of it is done as of a `read_call`."""
        self.require_usable()
        until_s = self.reactor.now() + self.limit_s(deadline_s)
        named: list[SlotRef] = []
        for each in several(refs, "refs"):
            with suppress(StaleSlotError):  # a record without a payload has none to discard
                named.append(slot_ref_of(each))
        ours: list[SlotRef] = []
        here: list[Entry] = []
        unheard: dict[bytes, dict[tuple[int, int], SlotRef]] = {}
        for ref in named:
            with suppress(TransportError):  # gone, delivered before, or out of this client's reach
                ring = self.local.ring_of(ref)
                if ring is not None:
                    here.append((len(ours), ring))
                    ours.append(ref)
                else:
                    self.delivered.claim(ref)
                    unheard.setdefault(ref.ring_id, {})[ref.slot, ref.generation] = ref
        call = Discard(ours + [next(iter(names.values())) for names in unheard.values()], until_s, unheard)
        call.here = here if unheard else self.local.in_turn(call, here)
        return call

    def take_call(self, source: Takeable | Referring, wait_s: float | str, **what: Any) -> Take:
        """A call that takes payloads, for `Reads.go_on` or `LocalReader.take`; arguments as `SyncUCXXClient.take`."""
        self.require_usable()
        whose: Any = source if hasattr(source, "ring_name") else slot_ref_of(source)
        wait_until_s = self.reactor.now() + checked_seconds(wait_s, "wait_s")
        return Take(whose, wait_until_s + self.config.deadline_s, wait_until_s, **what)

    def abandon(self, call: Call) -> None:
        """A call is not wanted any more: what it has is released, what comes is not delivered; a discard goes on."""
        if isinstance(call, Job) and not isinstance(call, Discard):
            self.reads.abandon(call)

    def repair(self) -> None:
        """After an interrupt that may have cut a step in two: other calls begin again, with a new reactor.

        Another interrupt loses none of them: those that have not begun again by then do so at the next call of this.
        """
        old = self.reads
        for close in (old.connections.close, self.reactor.close):
            with suppress(Exception):
                close()  # what connections owe is known then
        jobs = {*old.jobs, *old.finished}
        for job in jobs:
            job.reads.clear()
        unfinished = [job for job in jobs if not job.done]
        awaited = [job.refs[index] for job in unfinished for index in job.missing]
        for ref in old.claimed:
            if any(ref is each for each in awaited):
                self.delivered.forget(ref)
        reads = self._opened()
        reads.jobs.update(unfinished)
        for names in old.connections.unsettled.values():
            reads.connections.owe(names)
        self.reads, self.reactor = reads, reads.reactor
        for job in unfinished:
            job.left = len(job.missing)
            job.here = [entry for entry in job.here if job.outcomes[entry[0]] is None]
            reads.go_on(job)  # which reports it at once when nothing is missing
        self.damaged = False

    def run_until_done(self, call: Call) -> None:
        """Turn until the call is done; its deadline is a timer of the reactor.

        No caller has the loop in place, under its own handlers: where `while` with a condition jumps back, Python 3.12
        and 3.13 have none for an interrupt (python/cpython#108214).
        """
        run_once = self.reactor.run_once
        while not call.done:
            run_once(math.inf)

    def close(self) -> None:
        """Fail what is under way, take leave of the servers, close connections and rings. Bounded; idempotent."""
        if self.reactor.closed or self.inherited:
            return
        try:
            if not self.damaged:
                goodbye = Call(math.inf)
                with suppress(ConfigError):  # the link was closed before: the interpreter exits
                    self.begin_goodbye(goodbye)
                    if self.reactor.has_link:
                        self.run_until_done(goodbye)
        finally:  # also where Ctrl-C ends the wait for a server that is stopped
            self.closed = True
            self.end()

    def begin_goodbye(self, goodbye: Call) -> None:
        """The first half of closing: refuse further reads, fail those under way, take leave of the servers."""
        self.closed = True
        self.fail_all()
        self.reads.connections.say_goodbye(goodbye)

    def fail_all(self) -> None:
        """Fail every call under way, because the client is closed."""
        self.reads.fail_all(PeerLostError("the client was closed", reason="closed"))

    def end(self) -> None:
        """The second half: nothing is left behind. Payloads still held stay valid."""
        self._membership.close()
        self.reads.connections.close()
        self.reactor.close()
        self.local.close()
        self.buffers.close()

    def statistics(self) -> ClientStatistics:
        refuse_forked(self.pid, "client")
        buffers = self.buffers.statistics()
        link = self.reactor.link if self.reactor.has_link and not self.reactor.closed else None
        return self.counters.snapshot(
            pooled_endpoints=sum(connection.idle for connection in tuple(self.reads.connections.known.values())),
            lent_buffers=buffers.lent,
            idle_buffer_bytes=buffers.idle_bytes,
            leaked_buffers=link.leaked_buffers if link is not None else 0,
            transports=link.transports() if link is not None else (),
        )
