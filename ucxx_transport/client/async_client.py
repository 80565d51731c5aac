"""UCXXClient: payloads by reference, from this host's rings in place and from others over UCX, for an event loop.

How its tasks wait is in `waiters`: on asyncio a read that is alone polls for its answer within the calling task, for as
long as a blocking client would; most answers come sooner than a loop gets round.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from os import getpid
from typing import TYPE_CHECKING, Final, Self

from anyio import to_thread
from anyio.lowlevel import checkpoint

from ucxx_transport.client.core import ClientCore
from ucxx_transport.client.errands import DEFAULT_MAX_BYTES, DEFAULT_MAX_PAYLOADS
from ucxx_transport.client.jobs import Call, Job
from ucxx_transport.client.payload import Payload
from ucxx_transport.client.waiters import TURN_S, Waiter, waiter_of
from ucxx_transport.errors import DeadlineExceededError, TransportError

if TYPE_CHECKING:
    from ucxx_transport.client.buffer_pool import PageLocker
    from ucxx_transport.client.errands import Selector
    from ucxx_transport.client.local import Into
    from ucxx_transport.client.membership import Watcher
    from ucxx_transport.client.ports import Takeable
    from ucxx_transport.client.statistics import ClientStatistics
    from ucxx_transport.config import ClientConfig
    from ucxx_transport.link.base import LinkFactory
    from ucxx_transport.ring import SharedRingBuffer
    from ucxx_transport.schema import SlotRef

# Copies and checksums of more than this run in a thread: below it the hop costs more than it frees the loop.
INLINE_BYTES: Final = 1 << 20
# So is a wait for a ring's lock that takes longer than this: a transition takes some microseconds.
INLINE_WAIT_S: Final = 0.005

LOOK_S: Final = 0.25
"""A thread that waits for payloads of this host looks this often whether it is still wanted."""


class UCXXClient:
    """Reads payloads. Belongs to the event loop it is first used in; close it with `aclose()` or `async with`.

    Args and guarantees as `SyncUCXXClient`.

    Args:
        config: settings; the default reads local rings in place and everything else over UCX.
        watcher: as for `SyncUCXXClient`.
        link_factory: opens the link on the first read that needs one; the default is UCX.
        page_locker: page-locks the memory that payloads are received in, for a GPU that copies them from there. Rings
            of this host are then copied out of too.

    Raises:
        ConfigError: page-locked, and `local="view"`.
    """

    def __init__(
        self,
        config: ClientConfig | None = None,
        *,
        watcher: Watcher | None = None,
        link_factory: LinkFactory | None = None,
        page_locker: PageLocker | None = None,
    ) -> None:
        self._core = ClientCore(config, link_factory, watcher=watcher, page_locker=page_locker)
        self._waiter: Waiter | None = None
        self._kept_s = 0.0

    @property
    def config(self) -> ClientConfig:
        """The settings in force."""
        return self._core.config

    @property
    def reader_id(self) -> int:
        """This client's random id, u64, as servers and rings see it."""
        return self._core.reader

    async def read(self, ref: SlotRef, *, into: Into | None = None, deadline_s: float | str | None = None) -> Payload:
        """Read one payload; arguments, result and errors as `SyncUCXXClient.read`."""
        core = self._core
        if core.closed or getpid() != core.pid:
            core.require_usable()
        limit_s = core.config.deadline_s if deadline_s is None else core.limit_s(deadline_s)
        until_s = core.reactor.now() + limit_s
        if self._kept_s > TURN_S:
            self._kept_s = 0.0
            await checkpoint()  # before the read: cancelled here, it has lost nothing
        began_s = time.perf_counter()
        try:
            ring = core.admit(ref, into)
            if ring is not None:
                if ref.nbytes > INLINE_BYTES and core.local.copies(ref):
                    return await self._read_aside(ring, ref, into, limit_s, began_s)
                try:
                    return core.local.read(ring, ref, into, min(limit_s, INLINE_WAIT_S), began_s)
                except DeadlineExceededError:  # the ring's lock is held
                    return await self._read_aside(ring, ref, into, limit_s, began_s)
        except TransportError as error:
            core.count_failure(error)
            raise
        job = Job((ref,), until_s, None, None, into)
        job.is_held = True
        await self._run(job, partial(core.reads.start_one, job))
        core.reads.deliver(job)  # nothing is awaited from here to the caller: a cancellation would lose the payload
        self._kept_s += time.perf_counter() - began_s
        outcome = job.outcomes.pop()
        if isinstance(outcome, Payload):
            return outcome
        assert outcome is not None
        try:
            raise outcome
        finally:
            del outcome  # which would refer to itself, by this frame

    async def read_many(
        self, refs: Sequence[SlotRef], *, deadline_s: float | str | None = None
    ) -> list[Payload | TransportError]:
        """Read payloads concurrently, fairly across sources; arguments and result as `SyncUCXXClient.read_many`."""
        core = self._core
        core.require_usable()
        job = Job(refs, core.reactor.now() + core.limit_s(deadline_s))
        remote, here = core.look_at(job, range(len(refs)))
        if remote or here:
            await self._run(job, partial(core.go_on, job, remote, here))
        return [outcome for outcome in job.outcomes if outcome is not None]

    async def discard(self, refs: Sequence[SlotRef], *, deadline_s: float | str | None = None) -> int:
        """Let payloads go unread; arguments and result as `SyncUCXXClient.discard`."""
        core = self._core
        call = core.discard_call(refs, deadline_s)
        if call.rings or call.here:
            await self._run(call, partial(core.discard, call))
        return call.found

    async def take(
        self,
        source: Takeable,
        *,
        max_payloads: int = DEFAULT_MAX_PAYLOADS,
        max_bytes: int = DEFAULT_MAX_BYTES,
        selector: Selector = "oldest",
        wait_s: float | str = 0.0,
    ) -> list[Payload]:
        """Take payloads without knowing their references; arguments, result and errors as `SyncUCXXClient.take`."""
        core = self._core
        take = core.take_call(source, max_payloads=max_payloads, max_bytes=max_bytes, selector=selector, wait_s=wait_s)
        ring = core.local.ring_of(source)
        if ring is None:
            await self._run(take, partial(core.reads.take, take))
            return take.result()
        until_s = time.monotonic() + take.wait_s
        while not (payloads := core.local.take(ring, take, core.config.deadline_s)):
            left_s = min(until_s - time.monotonic(), LOOK_S)
            if left_s <= 0:
                break
            await to_thread.run_sync(partial(ring.wait_for_ready, left_s, reader=core.reader), abandon_on_cancel=True)
        return payloads

    def statistics(self) -> ClientStatistics:
        """Counts since this client was made."""
        return self._core.statistics()

    async def aclose(self) -> None:
        """Close all connections and rings. Bounded; idempotent. Payloads still held stay valid."""
        core = self._core
        if core.inherited or core.reactor.closed:
            return
        if core.reactor.has_link:
            goodbye = Call(math.inf)
            core.begin_goodbye(goodbye)
            if not goodbye.done:  # there was a server to take leave of
                await self._bound().wait(goodbye, alone=False)
        if self._waiter is not None:
            self._waiter.unbind()
        core.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.aclose()

    async def _read_aside(
        self, ring: SharedRingBuffer, ref: SlotRef, into: Into | None, limit_s: float, began_s: float
    ) -> Payload:
        """Read on this host, with the copying and waiting in a thread. Cancelled, the payload stays in its slot."""
        core = self._core
        begun = await to_thread.run_sync(core.local.begin, ring, ref, limit_s, abandon_on_cancel=True)
        return core.local.deliver(ref, *begun, into, began_s)

    async def _run(self, call: Call, start: Callable[[], None]) -> None:
        """Start a call and return when it is done."""
        core, waiter = self._core, self._bound()
        try:
            start()
            if not call.done:
                await waiter.wait(call, alone=core.reads.in_flight == 1)
        except BaseException:
            core.abandon(call)
            raise

    def _bound(self) -> Waiter:
        waiter = self._waiter
        if waiter is None:
            waiter = self._waiter = waiter_of(self._core.reactor, self._core.config.spin_s)
        waiter.bind()
        return waiter
