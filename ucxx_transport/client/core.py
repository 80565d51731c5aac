"""ClientCore, which the blocking and the asyncio client and the prefetcher share.

Identity, settings, reads of this host's rings, delivery by name, counts; and the reactor with the reads over the link.
What begins or ends jobs is for the thread that runs the reactor; `admit` and the local reads are thread-safe.
"""

from __future__ import annotations

import math
import os
import secrets
import threading
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from typing_extensions import Buffer

from ucxx_transport.client.buffer_pool import BufferPool, Bytes, PageLocker
from ucxx_transport.client.errands import Discard
from ucxx_transport.client.jobs import Job, OnJobDone, OnPayload
from ucxx_transport.client.local import LocalReader
from ucxx_transport.client.membership import Membership, Watcher
from ucxx_transport.client.payload import Payload, writable_bytes
from ucxx_transport.client.reads import Reads
from ucxx_transport.client.statistics import ClientCounters, ClientStatistics
from ucxx_transport.client.takes import Take, TakeRequest, newest_of
from ucxx_transport.config import ClientConfig, checked_seconds
from ucxx_transport.errors import ConfigError, PeerLostError, SlotError, StaleSlotError, TransportError
from ucxx_transport.link.reactor import Reactor

if TYPE_CHECKING:
    from ucxx_transport.client.ports import Takeable
    from ucxx_transport.link.base import Link, LinkFactory, Timers
    from ucxx_transport.ring import SharedRingBuffer
    from ucxx_transport.ring.reading import ReadLease
    from ucxx_transport.schema import SlotRef

Into = Buffer

REMEMBERED_RINGS: Final = 1 << 16
"""Rings whose delivered names are remembered, 100 bytes and 50 a slot each: more than a job has sources at a time."""

_OWN_CODE: Final = str(Path(__file__).parent)


class ClientCore:
    """See the module; arguments and errors as `UCXXClient`.

    Args:
        config: settings.
        link_factory: opens the link on the first read that needs one; the default is UCX.
        watcher: which sources there are.
        page_locker: page-locks the memory that payloads are received in; payloads of this host's rings are then copied
            into such memory too.
        in_place: beside a page_locker: of which rings payloads may stay in their slots all the same.
        on_link: called when the link has been opened.
        clock: of the reactor and of every deadline.

    Attributes:
        config: the settings. reader: this client's random id. counters: its counts. pool: its buffers.
        reactor: runs everything that is not local; opens the link only when it is needed.
        local: reads of this host's rings. reads: those over the link.
        closed: whether `close` has been called. pid: of the process that made it.
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
        self.config = config if config is not None else ClientConfig()
        if page_locker is not None and self.config.local == "view":
            raise ConfigError(
                "local='view' reads in place, but a GPU takes payloads from page-locked buffers: leave local at "
                "'auto', which then copies into those, or receive with device='cpu'",
                field="local",
            )
        self.reader = secrets.randbits(63) + 1
        self.counters = ClientCounters()
        self.pool = BufferPool(self.config.buffer_pool_bytes, page_locker)
        self.closed = self.damaged = False
        self._link_factory = link_factory or _ucxx_links(self.config)
        self._on_link = on_link
        self._clock = clock
        self._delivered = Deduplicator(REMEMBERED_RINGS)
        self._membership = Membership(watcher) if watcher is not None else None
        self.pid = os.getpid()
        stays: bool | Callable[[SharedRingBuffer], bool] = self.config.local != "copy"
        if page_locker is not None:
            stays = in_place if in_place is not None and self.config.local != "copy" else False
        self.local = LocalReader(
            self.config.local,
            in_place=stays,
            reader=self.reader,
            pool=self.pool,
            max_rings=self.config.max_attached_rings,
            verify=self.config.verify_checksum,
            on_fallback=partial(self.counters.add, "fallbacks"),
            claim=self._delivered.claim,
        )
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
            claim=self._delivered.claim,
            membership=self._membership,
        )
        if self._membership is not None:
            self._membership.bind(reads, reactor)
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
        on_done: OnJobDone | None = None,
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
        remote = self.read_here(job)
        if remote:
            self.reads.start(job, remote)
        else:
            job.done = True
            if on_done is not None:
                on_done(job)
        return job

    def begin_discard(
        self,
        refs: Sequence[SlotRef],
        deadline_s: float | str | None = None,
        *,
        on_done: Callable[[Discard], None] | None = None,
    ) -> Discard:
        """Let payloads go unread: those of this host's rings now, the others as the reactor is run.

        Args:
            refs: payloads.
            deadline_s: for all of them together, as for `begin`.
            on_done: called once it is done; before this returns, when nothing is to be waited for.

        Raises:
            ConfigError: as for `begin`.
        """
        limit_s = self.limit_s(deadline_s)
        until_s = self.reactor.now() + limit_s
        found, elsewhere = self.discard_here(refs, limit_s)

        def counted(call: Discard) -> None:
            self.counters.add("discarded", call.found)
            if on_done is not None:
                on_done(call)

        call = Discard(found, until_s, counted)
        self.reads.discard(call, elsewhere)
        return call

    def take_request(
        self, source: Takeable, max_payloads: int, max_bytes: int, selector: str, wait_s: float | str
    ) -> TakeRequest:
        """What a `take` asks for; errors as `SyncUCXXClient.take`."""
        self.require_usable()
        wait = checked_seconds(wait_s, "wait_s")
        return TakeRequest(
            source=source,
            max_payloads=max_payloads,
            max_bytes=max_bytes,
            newest=newest_of(selector),
            wait_s=wait,
            until_s=self.reactor.now() + wait + self.config.deadline_s,
        )

    def begin_take(self, request: TakeRequest, on_done: Callable[[Take], object] | None = None) -> Take:
        """Take from a ring of another host, as the reactor is run.

        Args:
            request: see `take_request`.
            on_done: called once it is done; before this returns, when its source is known to be gone.

        Raises:
            ConfigError: the source has no address.
        """
        take = Take(request, on_done)
        self.reads.take(take)
        return take

    def abandon(self, call: Job | Take | object) -> None:
        """Nobody wants a call any more: its payloads are released, and what is in flight ends as not delivered.

        A discard goes on by itself: what cannot be said now is said with the next read.
        """
        if isinstance(call, Job):
            self.reads.abandon(call)
        elif isinstance(call, Take):
            call.abandon()

    def forget(self, call: Job | Take | object) -> None:
        """`abandon` while the core is damaged: nothing is done for it any more."""
        if isinstance(call, Job):
            call.outcomes.clear()
            self.reads.jobs.discard(call)
            self.reads.finished = [job for job in self.reads.finished if job is not call]

    def repair(self) -> None:
        """After an interrupt that may have cut a step of the reactor in two: go on with a new one.

        Connections are opened again; calls of other threads that are under way begin again. What was delivered stays
        so, by name.
        """
        reactor, reads = self.reactor, self.reads
        with suppress(Exception):
            reads.connections.close()  # what they owe is known then
        with suppress(Exception):
            reactor.close()
        self.reactor, self.reads = self._opened()
        self.damaged = False
        for names in reads.connections.unsettled.values():
            self.reads.connections.owe(names)
        for job in {*reads.jobs, *reads.finished}:
            job.reads.clear()
            missing = [index for index, outcome in enumerate(job.outcomes) if outcome is None]
            job.left = len(missing)
            self.reads.start(job, missing)  # which reports it at once when nothing is missing
        for take in tuple(reads.takes):
            take.fail(PeerLostError("the connection was closed after an interrupt", reason="closed"))

    def limit_s(self, deadline_s: float | str | None) -> float:
        """The seconds that a call may take; a ConfigError when they are no duration."""
        return self.config.deadline_s if deadline_s is None else checked_seconds(deadline_s, "deadline_s")

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

    # --- Local reads and names: in any thread ---

    def admit(self, ref: SlotRef, into: Into | None) -> SharedRingBuffer | None:
        """First look at a reference: refuse what must not be read; returns its ring if it is read locally.

        Raises:
            StaleSlotError: delivered before, or its ring on this host is gone.
            ConfigError: the payload is larger than `max_payload_bytes` or does not fit `into`.
        """
        if ref.nbytes > self.config.max_payload_bytes:
            raise ConfigError(
                f"ref.nbytes = {ref.nbytes} is larger than client.max_payload_bytes = "
                f"{self.config.max_payload_bytes}; raise the setting if such payloads are real",
                field="max_payload_bytes",
                value=self.config.max_payload_bytes,
            )
        if into is not None:
            writable_bytes(into, ref.nbytes)
        slots = self._delivered.rings.get(ref.ring_id)
        if slots is not None and slots.get(ref.slot, 0) >= ref.generation:
            self._delivered.check(ref)
        local = self.local
        return None if local.is_off or ref.host_id != local.host_id else local.ring_of(ref)

    def read_here(self, job: Job) -> list[int]:
        """Read what a job reads on this host; returns the indices of the rest, for `Reads.start`."""
        remote: list[int] = []
        for index, ref in enumerate(job.refs):
            try:
                ring = self.admit(ref, job.into)
                if ring is None:
                    remote.append(index)
                    continue
                left_s = max(0.0, job.until_s - self.reactor.now())
                payload = self.read_local(ring, ref, job.into, left_s, job.began_s)
                job.outcomes[index] = payload if job.on_payload is None else job.on_payload(index, payload)
            except TransportError as error:
                self.counters.failed(error)
                job.outcomes[index] = _without_traceback(error)
            job.left -= 1
        return remote

    def require_usable(self) -> None:
        """Refuse a closed client, and a forked copy of one, by a ConfigError."""
        if self.closed:
            raise ConfigError("the client is closed; make another")
        if os.getpid() != self.pid:
            raise ConfigError("a client cannot be used in a forked child; make one in the process that reads")

    def read_local(
        self, ring: SharedRingBuffer, ref: SlotRef, into: Into | None, limit_s: float, began_s: float
    ) -> Payload:
        """Read from an attached ring, counted from `began_s` (`perf_counter`); `limit_s` is for the ring's lock."""
        try:
            begun = ring, *self.local.begin(ring, ref, limit_s)
        except SlotError:
            begun = self._begin_elsewhere(ring, ref, limit_s)
        payload = self.local.finish(ref, *begun)
        if into is not None:
            payload = payload.copied_into(into)
        self.counters.delivered(payload.transport, ref.nbytes, time.perf_counter() - began_s)
        return payload

    def finish_local(
        self, ref: SlotRef, begun: tuple[SharedRingBuffer, ReadLease, Bytes | None], into: Into | None, began_s: float
    ) -> Payload:
        """The second half of `read_local`, which delivers."""
        payload = self.local.finish(ref, *begun)
        if into is not None:
            payload = payload.copied_into(into)
        self.counters.delivered(payload.transport, ref.nbytes, time.perf_counter() - began_s)
        return payload

    def take_here(self, ring: SharedRingBuffer, request: TakeRequest, limit_s: float) -> list[Payload]:
        """Take what a ring of this host has ready now; `limit_s` is for its lock."""
        began_s = time.perf_counter()
        payloads = []
        for lease in ring.take(
            request.max_payloads,
            max_bytes=request.max_bytes,
            newest=request.newest,
            reader=self.reader,
            deadline_s=limit_s,
        ):
            try:
                payload = self.local.taken(ring, lease)
            except TransportError as error:  # a duplicate, or its bytes have changed: the others are none the worse
                self.count_failure(error)
                continue
            self.counters.delivered(payload.transport, payload.nbytes, time.perf_counter() - began_s)
            payloads.append(payload)
        return payloads

    def discard_local(self, ring: SharedRingBuffer, ref: SlotRef, limit_s: float) -> bool:
        """Discard a payload of an attached ring; whether it was still there."""
        try:
            lease = ring.acquire(ref, reader=self.reader, deadline_s=limit_s)
            self.claim(ref)
            return lease.mark_consumed()
        except TransportError:
            return False

    def discard_here(self, refs: Sequence[SlotRef], limit_s: float) -> tuple[int, list[list[SlotRef]]]:
        """Discard those of rings on this host: how many were still there; and the others by ring, their names taken."""
        self.require_usable()
        until_s = time.monotonic() + limit_s
        found = 0
        elsewhere: dict[bytes, list[SlotRef]] = {}
        for ref in refs:
            try:
                self._delivered.check(ref)
                ring = self.local.ring_of(ref)
            except TransportError:
                continue  # gone, delivered before, or out of this client's reach
            if ring is not None:
                found += self.discard_local(ring, ref, max(0.0, until_s - time.monotonic()))
            elif self.claim(ref):
                elsewhere.setdefault(ref.ring_id, []).append(ref)
        return found, list(elsewhere.values())

    def claim(self, ref: SlotRef) -> bool:
        """Take a payload's name, so that this client never delivers it; whether it was not taken yet."""
        try:
            self._delivered.claim(ref)
        except StaleSlotError:
            return False
        return True

    def begin_local(
        self, ring: SharedRingBuffer, ref: SlotRef, limit_s: float
    ) -> tuple[SharedRingBuffer, ReadLease, Bytes | None]:
        """The first half of `read_local`, which copies and waits; dropped, it leaves no trace."""
        try:
            return ring, *self.local.begin(ring, ref, limit_s)
        except SlotError:
            return self._begin_elsewhere(ring, ref, limit_s)

    def _begin_elsewhere(
        self, ring: SharedRingBuffer, ref: SlotRef, limit_s: float
    ) -> tuple[SharedRingBuffer, ReadLease, Bytes | None]:
        """While an error is handled: begin by another handle, if another read has closed this one meanwhile.

        It does so to make room, or because the worker died.
        """
        replacement = self.local.ring_of(ref) if ring.closed else None
        if replacement is None:
            raise  # noqa: PLE0704 - the error being handled
        return replacement, *self.local.begin(replacement, ref, limit_s)

    @property
    def inherited(self) -> bool:
        """Whether this is a forked child's copy: connections are its parent's."""
        return os.getpid() != self.pid

    def count_failure(self, error: TransportError) -> None:
        """Count a read that raised; the error may be kept, its buffers are not."""
        clear_traceback_frames(error)
        self.counters.failed(error)

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


class Deduplicator:
    """The newest generation of each ring's slots that this client has delivered or discarded. Thread-safe.

    It drops the duplicates that a lost acknowledgement allows. A generation only grows, so the newest one of each slot
    is all there is to remember. Beyond `max_rings` the ring longest unused is forgotten.

    Attributes:
        rings: by id, the newest generation of each slot.
    """

    def __init__(self, max_rings: int) -> None:
        self._max_rings = max_rings
        self.rings: OrderedDict[bytes, dict[int, int]] = OrderedDict()
        self._lock = threading.Lock()

    def check(self, ref: SlotRef) -> None:
        """Refuse (StaleSlotError) a payload that this client, or a newer one of its slot, was delivered before."""
        slots = self.rings.get(ref.ring_id)
        if slots is not None and slots.get(ref.slot, 0) >= ref.generation:
            raise StaleSlotError(
                "this client has already received or discarded this payload, or a newer one of its slot",
                slot=ref.slot,
                generation=ref.generation,
                delivered=slots[ref.slot],
            )

    def claim(self, ref: SlotRef) -> None:
        """Deliver a payload, once: of several reads of it that came this far, one gets it. Errors as `check`.

        Call it while the slot is still held (before it is consumed): then no newer payload of the slot can be faster.
        """
        with self._lock:
            slots = self.rings.get(ref.ring_id)
            if slots is not None and slots.get(ref.slot, 0) >= ref.generation:
                self.check(ref)
            if slots is None:
                slots = self.rings[ref.ring_id] = {}
                while len(self.rings) > self._max_rings:
                    self.rings.popitem(last=False)
            else:
                self.rings.move_to_end(ref.ring_id)
            slots[ref.slot] = ref.generation


def clear_traceback_frames(error: BaseException) -> None:
    """Empty the variables of the frames that `error` has left behind, from this package on downwards.

    They refer to receive buffers of any size, which an error that is kept (a batch's result, a log) must not keep.
    Frames of the package's callers, and those that still run, stay as they are; so do the traceback's lines.
    """
    link: BaseException | None = error
    while link is not None:
        trace = link.__traceback__
        while trace is not None and not trace.tb_frame.f_code.co_filename.startswith(_OWN_CODE):
            trace = trace.tb_next
        traceback.clear_frames(trace)
        link = link.__context__


def _without_traceback(error: TransportError) -> TransportError:
    """The error, to be kept as a value: its frames, and those they were called from, would keep a whole batch."""
    link: BaseException | None = error
    while link is not None:
        link.__traceback__ = None
        link = link.__context__
    return error


def _ucxx_links(config: ClientConfig) -> LinkFactory:
    def open_link(timers: Timers) -> Link:
        from ucxx_transport.link.ucx import UCXXLink

        return UCXXLink(timers, shm_lanes=config.shm_lanes, ucx=config.link_settings)

    return open_link
