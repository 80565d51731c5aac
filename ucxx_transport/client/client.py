"""SyncUCXXClient: payloads by reference, from this host's rings in place and from other hosts over UCX; blocking.

There is no thread and no event loop behind it: a call runs the reactor until it has what it asked for. Of several
threads that share a client one *leads*: it runs the reactor, for the others too. They wait, each for a lock of its own,
until their job is done or the lead is free.

No wake-up is lost: one that follows first joins the line and then looks whether the lead is free; one that leaves the
lead first releases it and then looks at the line. Whoever leaves wakes the next.
"""

from __future__ import annotations

import atexit
import math
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from os import getpid
from typing import TYPE_CHECKING, Final, Self, TypeAlias

from ucxx_transport.client.core import ClientCore, Into
from ucxx_transport.client.errands import Discard
from ucxx_transport.client.jobs import Job
from ucxx_transport.client.payload import Payload
from ucxx_transport.errors import TransportError

if TYPE_CHECKING:
    from ucxx_transport.client.membership import Watcher
    from ucxx_transport.client.statistics import ClientStatistics
    from ucxx_transport.config import ClientConfig
    from ucxx_transport.link.base import LinkFactory
    from ucxx_transport.schema import SlotRef

Call: TypeAlias = "Job | Discard | _Question"

_LOOK_S: Final = 1.0
"""A thread that follows looks this often whether there is a lead to take; it is woken long before."""

_CLOSE_WAIT_S: Final = 5.0


class _Follower:
    """A thread that waits while another one leads."""

    __slots__ = ("_lock",)

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def wake(self, _: object = None) -> None:
        """Let it look again."""
        with suppress(RuntimeError):  # it has been woken already
            self._lock.release()

    def wait(self) -> None:
        """Sleep until woken."""
        self._lock.acquire(timeout=_LOOK_S)


class SyncUCXXClient:
    """Reads payloads from code without an event loop. Thread-safe; close it with `close()` or `with`.

    One client is one reader: of a payload meant for several readers (`RingConfig(readers=N)`) it gets one share, and a
    payload it has delivered once is `StaleSlotError` ever after.

    Args:
        config: settings; the default reads local rings in place and everything else over UCX.
        watcher: a `SourceWatcher`: reads over UCX from a source that it says is gone fail at once, and the ports of one
            that it says is there are worth a try again. Its owner stops it.
        link_factory: opens the link on the first read that needs one; the default is UCX.
    """

    def __init__(
        self,
        config: ClientConfig | None = None,
        *,
        watcher: Watcher | None = None,
        link_factory: LinkFactory | None = None,
    ) -> None:
        self._core = ClientCore(config, link_factory, watcher=watcher)
        self._lead = threading.Lock()
        self._followers: dict[_Follower, None] = {}
        self._closes_at_exit = False

    @property
    def config(self) -> ClientConfig:
        """The settings in force."""
        return self._core.config

    @property
    def reader_id(self) -> int:
        """This client's random id, u64, as servers and rings see it."""
        return self._core.reader

    def read(self, ref: SlotRef, *, into: Into | None = None, deadline_s: float | str | None = None) -> Payload:
        """Read one payload.

        Args:
            ref: names it and says where it is.
            into: writable contiguous buffer of at least `ref.nbytes` bytes to copy the payload into; by default it
                stays in a pooled buffer, or in the slot itself.
            deadline_s: seconds this call may take in all, retries included, or text such as `"5s"`; default
                `ClientConfig.deadline_s`.

        Returns:
            The payload. Release it when its data is used up.

        Raises:
            StaleSlotError: it is gone (recycled, overwritten, its ring closed) or was delivered to this client before.
            DeadlineExceededError: not in time. PeerLostError, BusyError, NotReadyError: not after all retries.
            ChecksumError: the bytes differ from what was written. ProtocolError, AuthenticationError: the peer.
            ConfigError: the reference has no address, is too large, `into` is unfit, or `deadline_s` is no duration.
        """
        core = self._core
        if core.closed or getpid() != core.pid:
            core.require_usable()
        limit_s = core.config.deadline_s if deadline_s is None else core.limit_s(deadline_s)
        try:
            ring = core.admit(ref, into)
            if ring is not None:
                return core.read_local(ring, ref, into, limit_s, time.perf_counter())
        except TransportError as error:
            core.count_failure(error)
            raise
        job = Job((ref,), core.reactor.now() + limit_s, None, None, into)
        self._perform(job, partial(core.reads.start_one, job), partial(core.reads.abandon, job))
        outcome = job.outcomes.pop()
        if isinstance(outcome, Payload):
            return outcome
        assert outcome is not None
        try:
            raise outcome
        finally:
            del outcome  # which would refer to itself, by this frame

    def read_many(
        self, refs: Sequence[SlotRef], *, deadline_s: float | str | None = None
    ) -> list[Payload | TransportError]:
        """Read payloads, those over UCX together and fairly across sources; one that fails costs the others nothing.

        Args:
            refs: what to read.
            deadline_s: for all of them together, as for `read`.

        Returns:
            A list as long as `refs`: the payload, or the error that `read` would have raised.
        """
        core = self._core
        core.require_usable()
        job = Job(refs, core.reactor.now() + core.limit_s(deadline_s))
        remote = core.read_here(job)
        if remote:
            self._perform(job, partial(core.reads.start, job, remote), partial(core.reads.abandon, job))
        return [outcome for outcome in job.outcomes if outcome is not None]

    def discard(self, refs: Sequence[SlotRef], *, deadline_s: float | str | None = None) -> int:
        """Let payloads go unread: each counts as this client's read of it, and none of its bytes is moved.

        Args:
            refs: payloads that this trainer will not read; without it they would stay in their slots.
            deadline_s: for all of them together, as for `read`.

        Returns:
            How many were still there. Never raises for one that is not, nor for a worker that does not answer: it is
            notified with the next read from it (of the last 1024 payloads a ring).

        Raises:
            ConfigError: the client is closed, or `deadline_s` is no duration.
        """
        core = self._core
        limit_s = core.limit_s(deadline_s)
        until_s = core.reactor.now() + limit_s
        found, elsewhere = core.discard_here(refs, limit_s)
        call = Discard(found, None)
        if elsewhere:
            self._perform(call, partial(core.discard_there, call, elsewhere, until_s), _nothing)
        core.counters.add("discarded", call.found)
        return call.found

    def statistics(self) -> ClientStatistics:
        """Counts since this client was made."""
        core = self._core
        if not core.reactor.has_link or core.closed:
            return core.statistics()
        question = _Question(core.statistics)  # UCX's endpoints are of the thread that leads
        self._perform(question, question.start, question.start)
        assert question.answer is not None
        return question.answer

    def close(self) -> None:
        """Close all connections and rings. Bounded; idempotent. Payloads still held stay valid."""
        core = self._core
        if core.inherited or core.reactor.closed:
            return  # a forked child's copy: the connections are its parent's
        atexit.unregister(self.close)
        core.closed = True
        if not self._lead.acquire(blocking=False):
            core.reactor.submit(core.fail_all)  # so that the thread that leads has no reason to
            if not self._lead.acquire(timeout=_CLOSE_WAIT_S):
                return  # it hangs in a callback of the application: whatever is closed now would be in use
        try:
            core.close()
        finally:
            self._lead.release()
            self._wake_next()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # --- Who runs the reactor ---

    def _perform(self, call: Call, start: Callable[[], object], abandon: Callable[[], object]) -> None:
        """Start a call and run the reactor until it is done, or let the thread that leads do so."""
        lead = self._lead
        if not lead.acquire(blocking=False):
            self._follow(call, start, abandon)
            return
        try:
            start()
            run_once = self._core.reactor.run_once
            while not call.done:
                run_once(math.inf)  # the deadline is a timer of the reactor
        except BaseException:
            abandon()
            raise
        finally:
            lead.release()
            if self._followers:
                self._wake_next()
            if not self._closes_at_exit:  # after the link was opened, which is closed at exit too: in reverse order
                self._closes_at_exit = True
                atexit.register(self.close)

    def _follow(self, call: Call, start: Callable[[], object], abandon: Callable[[], object]) -> None:
        """Let the thread that leads start a call, and lead when it has left."""
        reactor, lead, follower = self._core.reactor, self._lead, _Follower()
        call.on_done = follower.wake
        self._followers[follower] = None
        try:
            reactor.submit(partial(_started, start))
            while not call.done:
                if lead.acquire(blocking=False):
                    try:
                        while not call.done:
                            reactor.run_once(math.inf)
                    finally:
                        lead.release()
                else:
                    follower.wait()
        except BaseException:
            reactor.submit(partial(_started, abandon))
            raise
        finally:
            del self._followers[follower]
            self._wake_next()

    def _wake_next(self) -> None:
        """Have one of those that follow take the lead, if it is free."""
        if not self._lead.locked():
            for follower in tuple(self._followers):
                follower.wake()
                return


class _Question:
    """A call that asks something of the thread that leads."""

    __slots__ = ("_function", "answer", "done", "on_done")

    def __init__(self, function: Callable[[], ClientStatistics]) -> None:
        self._function = function
        self.answer: ClientStatistics | None = None
        self.done = False
        self.on_done: Callable[[_Question], object] | None = None

    def start(self) -> None:
        """Answer it."""
        self.answer = self._function()
        self.done = True
        if self.on_done is not None:
            self.on_done(self)


def _started(action: Callable[[], object]) -> None:
    """What a reactor takes; it has no use for a result."""
    action()


def _nothing() -> None:
    """A discard goes on by itself: what cannot be said now is said with the next read."""
