"""UCXXClient: payloads by reference, from this host's rings in place and from others over UCX, for an event loop.

How its tasks wait for the reactor:

| backend             | the reactor's descriptor            | its next timer     | who runs it                         |
|---------------------|-------------------------------------|--------------------|-------------------------------------|
| asyncio, uvloop     | `loop.add_reader`                   | `loop.call_later`  | the loop; a lone read itself, first |
| others of anyio     | `anyio.wait_readable`               | the wait's bound   | one of the tasks that wait          |

On asyncio a read that is alone polls for its answer within the calling task, for as long as a blocking client would;
most answers come sooner than a loop gets round.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from os import getpid
from typing import TYPE_CHECKING, Final, Protocol, Self

import anyio
from anyio import to_thread
from anyio.lowlevel import checkpoint

from ucxx_transport.client.core import ClientCore
from ucxx_transport.client.errands import DEFAULT_MAX_BYTES, DEFAULT_MAX_PAYLOADS
from ucxx_transport.client.jobs import Call, Job, Takeable
from ucxx_transport.client.payload import Payload
from ucxx_transport.errors import ConfigError, DeadlineExceededError, TransportError

if TYPE_CHECKING:
    from ucxx_transport.client.buffer_pool import PageLocker
    from ucxx_transport.client.errands import Selector
    from ucxx_transport.client.local import Into
    from ucxx_transport.client.membership import Watcher
    from ucxx_transport.client.statistics import ClientStatistics
    from ucxx_transport.config import ClientConfig
    from ucxx_transport.link.reactor import LinkFactory, Reactor
    from ucxx_transport.ring import SharedRingBuffer
    from ucxx_transport.schema import SlotRef

# Copies and checksums of more than this run in a thread: below it the hop costs more than it frees the loop.
INLINE_BYTES: Final = 1 << 20
# So is a wait for a ring's lock that takes longer than this: a transition takes some microseconds.
INLINE_WAIT_S: Final = 0.005

TURN_S: Final = 0.001
"""The reactor gives the loop back after this at the latest."""

LOOK_S: Final = 0.25
"""A thread that waits for payloads of this host looks this often whether it is still wanted."""


class _Waiter(Protocol):
    """How tasks wait, for one backend."""

    def bind(self) -> None:
        """It belongs to the running loop from the first call on; a ConfigError in another one."""

    async def wait(self, call: Call, *, alone: bool) -> None:
        """Return when the call is done; `alone` when nothing else is waited for."""

    def unbind(self) -> None:
        """Leave the loop."""


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
        self._waiter: _Waiter | None = None
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
        job = Job((ref,), until_s)
        job.into, job.is_held = into, True
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

    def _bound(self) -> _Waiter:
        waiter = self._waiter
        if waiter is None:
            reactor = self._core.reactor
            try:
                asyncio.get_running_loop()
            except RuntimeError:
                waiter = self._waiter = _TaskWaiter(reactor)
            else:
                waiter = self._waiter = _LoopWaiter(reactor, self._core.config.spin_s)
        waiter.bind()
        return waiter


class _LoopWaiter:
    """Runs a reactor within an asyncio loop."""

    def __init__(self, reactor: Reactor, spin_s: float) -> None:
        self._reactor = reactor
        self._spin_s = spin_s
        self._loop: asyncio.AbstractEventLoop | None = None
        self._descriptor = -1
        self._timer: asyncio.TimerHandle | None = None
        self._timer_s = math.inf
        self._soon: asyncio.Handle | None = None

    def bind(self) -> None:
        """See `_Waiter`."""
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            if self._loop is not None:
                raise ConfigError("this client belongs to another event loop; make one client a loop")
            self._loop = loop

    async def wait(self, call: Call, *, alone: bool) -> None:
        """See `_Waiter`."""
        reactor = self._reactor
        if alone:
            give_up_s = reactor.now() + TURN_S
            while reactor.poll(self._spin_s):
                if call.done:
                    break
                if reactor.now() > give_up_s:
                    break
            if call.done:
                self._look_later()
                return
        self.bind()
        came = asyncio.get_running_loop().create_future()

        def on_done(_: object) -> None:
            if not came.done():
                came.set_result(None)

        call.on_done = on_done
        self.turn()
        await came

    def unbind(self) -> None:
        """See `_Waiter`."""
        loop, self._loop = self._loop, None
        if loop is None or loop.is_closed():
            return
        for handle in (self._timer, self._soon):
            if handle is not None:
                handle.cancel()
        if self._descriptor >= 0:
            loop.remove_reader(self._descriptor)
            self._descriptor = -1

    def _look_later(self) -> None:
        """Nothing is waited for; what happens now is looked at when the loop gets round to it."""
        if self._descriptor < 0:
            self.turn()
        elif self._soon is None:
            assert self._loop is not None
            self._soon = self._loop.call_soon(self.turn)

    def turn(self) -> None:
        """Run the reactor until it has nothing to do, or `TURN_S`; then wait for its descriptor and its next timer."""
        reactor, loop = self._reactor, self._loop
        self._soon = None
        if loop is None or reactor.closed:
            return
        give_up_s = reactor.now() + TURN_S
        while reactor.poll() or not reactor.arm():
            if reactor.now() > give_up_s:
                self._soon = loop.call_soon(self.turn)
                return
        if self._descriptor < 0:
            self._descriptor = reactor.fileno()
            loop.add_reader(self._descriptor, self.turn)
        next_s = reactor.next_timer_s
        if next_s != self._timer_s:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            self._timer_s = next_s
            if next_s != math.inf:
                self._timer = loop.call_later(max(0.0, next_s - reactor.now()), self._timer_due)

    def _timer_due(self) -> None:
        self._timer = None
        self._timer_s = math.inf
        self.turn()


class _TaskWaiter:
    """Runs a reactor in one of the tasks that wait for it: the others wait for their calls, or until it has left."""

    def __init__(self, reactor: Reactor) -> None:
        self._reactor = reactor
        self._lead = anyio.Lock(fast_acquire=True)

    def bind(self) -> None:
        """Nothing: only a task that waits touches its backend."""

    def unbind(self) -> None:
        """Nothing: nothing is left in a backend."""

    async def wait(self, call: Call, *, alone: bool) -> None:
        """See `_Waiter`."""
        del alone
        with anyio.CancelScope() as waiting:
            call.on_done = lambda _: waiting.cancel()
            async with self._lead:
                await self._run(call)

    async def _run(self, call: Call) -> None:
        reactor = self._reactor
        give_up_s = reactor.now() + TURN_S
        while not call.done:
            if reactor.poll() or not reactor.arm():
                if reactor.now() > give_up_s:
                    await checkpoint()
                    give_up_s = reactor.now() + TURN_S
                continue
            left_s = reactor.next_timer_s - reactor.now()
            with anyio.move_on_after(max(0.0, left_s)):
                await anyio.wait_readable(reactor.fileno())
            give_up_s = reactor.now() + TURN_S
