"""UCXXClient: payloads by reference, from this host's rings in place and from others over UCX, for an event loop.

One of the tasks that wait runs the reactor for all: it sleeps in its loop on the reactor's descriptor, until the next
timer at most. A read that is alone first polls for its answer, for as long as a blocking client would; most answers
come sooner than a loop gets round. Between two calls nothing runs, as in a blocking client.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from threading import get_ident
from typing import TYPE_CHECKING, Final, Self

import anyio
from anyio.lowlevel import checkpoint

from ucxx_transport.client.core import ClientCore
from ucxx_transport.client.errands import DEFAULT_MAX_BYTES, DEFAULT_MAX_PAYLOADS
from ucxx_transport.client.jobs import Call, Job, Takeable
from ucxx_transport.client.local import LOCK_TURN_S
from ucxx_transport.client.payload import Payload
from ucxx_transport.errors import ConfigError, DeadlineExceededError, TransportError
from ucxx_transport.machine import in_thread
from ucxx_transport.schema import SlotRef
from ucxx_transport.schema.episode_record import slot_ref_of
from ucxx_transport.teardown import OfOneProcess

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from typing_extensions import Buffer

    from ucxx_transport.client.errands import Selector
    from ucxx_transport.client.reads import Watcher
    from ucxx_transport.client.statistics import ClientStatistics
    from ucxx_transport.config import ClientConfig
    from ucxx_transport.link.reactor import LinkFactory
    from ucxx_transport.schema.episode_record import Referring

# Copies and checksums of more than this run in a thread: below it the hop costs more than it frees the loop.
INLINE_BYTES: Final = 1 << 20

TURN_S: Final = 0.001
"""The reactor gives the loop back after this at the latest."""

KEPT_S: Final = 0.003
"""Reads that never had to wait for the loop give it back after this together: behind 1 MiB a turn of it takes 90 µs."""

LOOK_S: Final = 0.25
"""A thread that waits for payloads of this host looks this often whether it is still wanted."""


class UCXXClient(OfOneProcess):
    """Reads payloads. Belongs to the thread it is first used in; close it with `aclose()` or `async with`.

    Its arguments (`config`, `watcher`, `link_factory`), errors and guarantees are those of `SyncUCXXClient`.
    """

    def __init__(
        self,
        config: ClientConfig | Mapping[str, object] | None = None,
        *,
        watcher: Watcher | None = None,
        link_factory: LinkFactory | None = None,
    ) -> None:
        self._core = ClientCore(config, link_factory, watcher=watcher)
        self._waiters = _Waiters(self._core)
        self._kept_s = 0.0

    @property
    def config(self) -> ClientConfig:
        """The settings in force."""
        return self._core.config

    async def read(
        self, ref: Referring, *, into: Buffer | None = None, deadline_s: float | str | None = None
    ) -> Payload:
        """Read one payload; arguments, result and errors as `SyncUCXXClient.read`."""
        core = self._core
        if core.closed or core.reactor.forked:
            core.require_usable()
        limit_s = core.config.deadline_s if deadline_s is None else core.limit_s(deadline_s)
        until_s = core.reactor.now() + limit_s
        if self._kept_s > KEPT_S:
            self._kept_s = 0.0
            await checkpoint()  # before the read: cancelled here, it has lost nothing
        began_s = time.perf_counter()
        try:
            if type(ref) is not SlotRef:
                ref = slot_ref_of(ref)
            ring = core.admit(ref, into)
            if ring is not None:
                local, is_long = core.local, ref.nbytes > INLINE_BYTES and core.local.copies(ref)
                try:
                    payload = None if is_long else local.read(ring, ref, min(limit_s, LOCK_TURN_S), began_s)
                except DeadlineExceededError:  # the ring's lock is held
                    payload = None
                if payload is None:  # copied and waited for in a thread; cancelled then, the payload stays in its slot
                    begun = await in_thread(partial(local.begin, ring, ref, limit_s))
                    payload = local.deliver(ref, begun, began_s)
                return payload if into is None else payload.copied_into(into)
        except TransportError as error:
            core.count_failure(error)
            raise
        job = Job([ref], until_s)
        job.is_held = True
        await self._run(job, core.reads.start_one)
        core.reads.deliver(job)  # nothing is awaited from here to the caller: a cancellation would lose the payload
        self._kept_s += time.perf_counter() - began_s
        payload = job.payload()
        return payload if into is None else payload.copied_into(into)

    async def read_many(
        self, refs: Iterable[Referring], *, deadline_s: float | str | None = None
    ) -> list[Payload | TransportError]:
        """Read payloads concurrently, fairly across sources; arguments and result as `SyncUCXXClient.read_many`."""
        job = self._core.read_call(refs, deadline_s)
        if job.left:
            await self._run(job, self._core.reads.go_on)
        return job.results()

    async def discard(self, refs: Iterable[Referring], *, deadline_s: float | str | None = None) -> int:
        """Let payloads go unread; arguments and result as `SyncUCXXClient.discard`."""
        call = self._core.discard_call(refs, deadline_s)
        if call.left:
            await self._run(call, self._core.reads.go_on)
        return call.found

    async def take(
        self,
        source: Takeable | Referring,
        *,
        max_payloads: int = DEFAULT_MAX_PAYLOADS,
        max_bytes: int = DEFAULT_MAX_BYTES,
        selector: Selector = "oldest",
        wait_s: float | str = 0.0,
    ) -> list[Payload]:
        """Take payloads without knowing their references; arguments, result and errors as `SyncUCXXClient.take`."""
        core = self._core
        take = core.take_call(source, wait_s, max_payloads=max_payloads, max_bytes=max_bytes, selector=selector)
        ring = core.local.ring_of(take.source)
        if ring is None:
            await self._run(take, core.reads.go_on)
            return take.result()
        lock_until_s = core.reactor.now() + core.config.deadline_s
        while True:
            try:
                payloads = core.local.take(ring, take, LOCK_TURN_S)
            except DeadlineExceededError:
                if core.reactor.now() >= lock_until_s:
                    raise
                # a thread waits for the lock: this call has no other effect
                await in_thread(ring.statistics)
                continue
            left_s = min(take.wait_until_s - core.reactor.now(), LOOK_S)
            if payloads or left_s <= 0:
                return payloads
            await in_thread(partial(ring.wait_for_ready, left_s, reader=core.reader))

    def statistics(self) -> ClientStatistics:
        """Counts since this client was made."""
        return self._core.statistics()

    async def aclose(self) -> None:
        """Close all connections and rings. Bounded; idempotent. Payloads still held stay valid."""
        core = self._core
        if core.inherited or core.reactor.closed:
            return
        goodbye = Call(math.inf)
        core.begin_goodbye(goodbye)
        if not goodbye.done:  # there was a server to take leave of
            await self._waiters.wait(goodbye, alone=False)
        core.end()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.aclose()

    async def _run(self, call: Job, start: Callable[[Job], object]) -> None:
        """Start a call and return when it is done."""
        core = self._core
        try:
            self._waiters.check_thread()
            start(call)
            if not call.done:
                await self._waiters.wait(call, alone=len(core.reads.jobs) == 1)
        except BaseException:
            core.abandon(call)
            raise


class _Waiters:
    """Tasks that wait for one reactor: one of them runs it, for the others too; each that leaves wakes the next."""

    def __init__(self, core: ClientCore) -> None:
        self._core = core
        self._thread = 0
        self._sleep: anyio.CancelScope | None = None
        self._followers: dict[anyio.Event, None] = {}

    def check_thread(self) -> None:
        """A ConfigError in another thread than the one of the first call."""
        if self._thread != get_ident():
            if self._thread:
                raise ConfigError("this client belongs to an event loop of another thread; make one client a loop")
            self._thread = get_ident()

    async def wait(self, call: Call, *, alone: bool) -> None:
        """Return when the call is done; `alone` when nothing else is waited for."""
        reactor, spin_s = self._core.reactor, self._core.config.spin_s if alone else 0.0
        try:
            while True:
                give_up_s = reactor.now() + TURN_S
                has_more = True
                while has_more and not call.done and reactor.now() <= give_up_s:
                    has_more = reactor.poll(spin_s) or not reactor.arm()
                if call.done:
                    return
                spin_s = 0.0
                next_s = 0.0 if has_more else reactor.next_timer_s - reactor.now()
                if self._sleep is None:
                    await self._rest(call, next_s)
                else:
                    self._sleep.deadline = min(self._sleep.deadline, anyio.current_time() + next_s)
                    await self._follow(call)
        finally:
            if self._sleep is None and self._followers:
                next(iter(self._followers)).set()

    async def _rest(self, call: Call, limit_s: float) -> None:
        """Wait until there is something to do for the reactor, in whose descriptor or by time."""
        if limit_s <= 0:
            await checkpoint()
            return
        try:
            with anyio.CancelScope(deadline=anyio.current_time() + limit_s) as self._sleep:
                call.on_done = lambda _, sleep=self._sleep: sleep.cancel()
                await anyio.wait_readable(self._core.reactor.fileno())
        finally:
            self._sleep = None

    async def _follow(self, call: Call) -> None:
        """Wait until the call is done, or the task that runs the reactor has left."""
        woken = anyio.Event()
        call.on_done = lambda _: woken.set()
        self._followers[woken] = None
        try:
            await woken.wait()
        finally:
            del self._followers[woken]
