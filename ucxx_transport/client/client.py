"""SyncUCXXClient: payloads by reference, from this host's rings in place and from other hosts over UCX; blocking.

There is no thread and no event loop behind it: a call runs the reactor until it has what it asked for. Of several
threads that share a client one *leads*: it runs the reactor for the others too. They follow: they wait, each for a lock
of its own, until their call is done or the lead is free. No wake-up is lost: one that follows first joins the line and
then looks whether the lead is free; one that leaves the lead first releases it and then looks at the line. Each one
that leaves wakes the next.

An interrupt (Ctrl-C) may come between any two steps of Python. While the reactor sleeps it has cut nothing in two: the
call that was interrupted is abandoned, and the others go on. Anywhere else it may have: then the next thread that leads
repairs the core first (`ClientCore.repair`).
"""

from __future__ import annotations

import atexit
import sys
import threading
import time
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from ucxx_transport.client.core import ClientCore
from ucxx_transport.client.errands import DEFAULT_MAX_BYTES, DEFAULT_MAX_PAYLOADS, Discard
from ucxx_transport.client.jobs import Call, Job, Takeable
from ucxx_transport.client.payload import Payload
from ucxx_transport.client.reads import Reads
from ucxx_transport.errors import ConfigError, DeadlineExceededError, TransportError
from ucxx_transport.machine import LOOK_S
from ucxx_transport.schema import SlotRef
from ucxx_transport.schema.episode_record import slot_ref_of
from ucxx_transport.teardown import Closing, refuse_forked

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from types import FrameType

    from typing_extensions import Buffer

    from ucxx_transport.client.errands import Selector
    from ucxx_transport.client.reads import Watcher
    from ucxx_transport.client.statistics import ClientStatistics
    from ucxx_transport.config import ClientConfig
    from ucxx_transport.link.reactor import LinkFactory
    from ucxx_transport.schema.episode_record import Referring

_CLOSE_WAIT_S: Final = 5.0

OVERDUE_S: Final = 5.0
"""One that follows gives up so long after its deadline: the one that leads hangs in a callback of the application."""


class SyncUCXXClient(Closing):
    """Reads payloads from code without an event loop. Thread-safe; close it with `close()` or `with`.

    One client is one reader: of a payload meant for several readers (`RingConfig(readers=N)`) it gets one share, and a
    payload it has delivered once is `StaleSlotError` ever after.

    Args:
        config: settings, a dict or a `ClientConfig`; the default reads local rings in place and everything else over
            UCX.
        watcher: a `SourceWatcher`: reads over UCX from a source that it says is gone fail at once, and the ports of one
            that it says is there are worth a try again. Its owner stops it.
        link_factory: opens the link on the first read that needs one; the default is UCX.

    Raises:
        ConfigError: a setting is wrong.
    """

    def __init__(
        self,
        config: ClientConfig | Mapping[str, object] | None = None,
        *,
        watcher: Watcher | None = None,
        link_factory: LinkFactory | None = None,
    ) -> None:
        # At exit the link is closed too, but after this, which is registered later.
        self._core = ClientCore(config, link_factory, watcher=watcher, on_link=lambda: atexit.register(self.close))
        self._lead = _Lead(self._core)

    @property
    def config(self) -> ClientConfig:
        """The settings in force."""
        return self._core.config

    def read(self, ref: Referring, *, into: Buffer | None = None, deadline_s: float | str | None = None) -> Payload:
        """Read one payload.

        Args:
            ref: names it and says where it is; a record, or what became of either in a queue (`to_dict()`, JSON), will
                do as well, here and wherever references are taken.
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
            ConfigError: `ref` is no reference, has no address or is too large, `into` is unfit, or `deadline_s` no
                duration.
        """
        core = self._core
        if core.closed or core.reactor.forked:
            core.require_usable()
        limit_s = core.config.deadline_s if deadline_s is None else core.limit_s(deadline_s)
        try:
            if type(ref) is not SlotRef:
                ref = slot_ref_of(ref)
            ring = core.admit(ref, into)
            if ring is not None:
                payload = core.local.read(ring, ref, limit_s, time.perf_counter())
                return payload if into is None else payload.copied_into(into)
        except TransportError as error:
            core.count_failure(error)
            raise
        job = Job([ref], core.reactor.now() + limit_s)
        self._lead.perform(job, Reads.start_one)
        payload = job.payload()
        return payload if into is None else payload.copied_into(into)

    def read_many(
        self, refs: Iterable[Referring], *, deadline_s: float | str | None = None
    ) -> list[Payload | TransportError]:
        """Read payloads, those over UCX together and fairly across sources; one that fails costs the others nothing.

        Args:
            refs: what to read.
            deadline_s: for all of them together, as for `read`.

        Returns:
            A list as long as `refs`: the payload, or the error that `read` would have raised.
        """
        job = self._core.read_call(refs, deadline_s)
        if job.left:
            self._lead.perform(job, Reads.go_on)
        return job.results()

    def discard(self, refs: Iterable[Referring], *, deadline_s: float | str | None = None) -> int:
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
        call = self._core.discard_call(refs, deadline_s)
        if call.left:
            self._lead.perform(call, Reads.go_on)
        return call.found

    def take(
        self,
        source: Takeable | Referring,
        *,
        max_payloads: int = DEFAULT_MAX_PAYLOADS,
        max_bytes: int = DEFAULT_MAX_BYTES,
        selector: Selector = "oldest",
        wait_s: float | str = 0.0,
    ) -> list[Payload]:
        """Take payloads that no reader has had yet, without knowing their references.

        Args:
            source: whose: a watcher's record, or any reference of the ring.
            max_payloads: how many at most, 1 to 64.
            max_bytes: of them all.
            selector: "oldest" first, or "newest".
            wait_s: how long to wait for a first one.

        Returns:
            The payloads, in the selector's order, each with the `record` that its writer gave it; none of them is
            given to another taker too. [] when there was none in time. Release them when their data is used up.

        Raises:
            PeerLostError, DeadlineExceededError, BusyError, NotReadyError, …: as `read`; nothing was taken.
            ConfigError: the next payload is larger than `max_bytes`, an argument is out of its range, the source has no
                address, or the client is closed.
        """
        core = self._core
        take = core.take_call(source, wait_s, max_payloads=max_payloads, max_bytes=max_bytes, selector=selector)
        ring = core.local.ring_of(take.source)
        if ring is None:
            self._lead.perform(take, Reads.go_on)
            return take.result()
        while not (payloads := core.local.take(ring, take, core.config.deadline_s)):
            left_s = take.wait_until_s - core.reactor.now()
            if left_s <= 0 or not ring.wait_for_ready(left_s, reader=core.reader):
                break
        return payloads

    def statistics(self) -> ClientStatistics:
        """Counts since this client was made."""
        core = self._core
        refuse_forked(core.pid, "client")
        if not core.reactor.has_link or core.closed:
            return core.statistics()
        question = Call(core.reactor.now() + core.config.deadline_s)
        answers: list[ClientStatistics] = []

        def answer(*_: object) -> None:
            answers.append(core.statistics())
            question.finish()

        self._lead.perform(question, answer)  # UCX's endpoints are of the thread that leads
        return answers[0]

    def close(self) -> None:
        """Close all connections and rings. Bounded; idempotent. Payloads still held stay valid."""
        core = self._core
        if core.inherited or core.reactor.closed:
            return  # a forked child's copy: the connections are its parent's
        atexit.unregister(self.close)
        core.closed = True
        lead = self._lead
        if lead.lock._is_owned():  # type: ignore[attr-defined]  # noqa: SLF001 - as `threading.Condition` asks
            core.damaged = True  # a signal handler closes what it has interrupted
        if not lead.lock.acquire(blocking=False):
            core.reactor.submit(core.fail_all)  # so that the thread that leads has no reason to
            if not lead.lock.acquire(timeout=_CLOSE_WAIT_S):
                return  # it hangs in a callback of the application: whatever is closed now would be in use
        try:
            core.close()
        finally:
            lead.lock.release()
            lead.wake(None)


class _Lead:
    """See the module."""

    def __init__(self, core: ClientCore) -> None:
        self._core = core
        self.lock = threading.RLock()  # which tells, even after an interrupt at the worst moment, whose it is
        self.followers: dict[threading.Lock, None] = {}  # each waits for its own to be released

    def perform(self, call: Call, start: Callable[[Reads, Any], object]) -> None:
        """Start a call by `start(reads, call)` and run the reactor until it is done, or let the leader do so.

        A ConfigError: a signal handler calls the client that it has interrupted.
        """
        lock, core = self.lock, self._core
        if lock._is_owned():  # type: ignore[attr-defined]  # noqa: SLF001 - as `threading.Condition` asks
            self._recover()
        if not lock.acquire(blocking=False):
            self._follow(call, start)
            return
        try:
            if core.damaged:
                core.repair()
            start(core.reads, call)
            core.run_until_done(call)
        except BaseException:
            core.damaged = True  # first: a second interrupt may come with the next call
            self._interrupted(call)
            raise
        finally:
            lock.release()
            if self.followers:
                self.wake()

    def wake(self, most: int | None = 1) -> None:
        """Have one of those that follow take the lead if it is free, or have all of them look."""
        for follower in tuple(self.followers)[:most]:
            _wake(follower)

    def _follow(self, call: Call, start: Callable[[Reads, Any], object]) -> None:
        """Let the thread that leads start a call, and lead when it has left."""
        core, lock, follower = self._core, self.lock, threading.Lock()
        follower.acquire()
        call.on_done = partial(_wake, follower)
        self.followers[follower] = None
        started: list[bool] = []

        def begin() -> None:
            if not (started or call.done):
                start(core.reads, call)
                started.append(True)  # not before: an interrupt of the thread that leads must not lose it

        reactor = None
        try:
            while True:
                if call.done:
                    return
                if not started and reactor is not core.reactor:  # at first; and when what was submitted is gone
                    reactor = core.reactor
                    if call not in core.reads.jobs:  # which are begun again by `ClientCore.repair`
                        reactor.submit(begin)
                if lock.acquire(blocking=False):
                    self._lead_on(call)
                else:
                    self._wait(follower, call)
        except BaseException:
            started.append(False)
            with suppress(ConfigError):
                core.reactor.submit(partial(core.abandon, call))
            raise
        finally:
            del self.followers[follower]
            self.wake()

    def _wait(self, follower: threading.Lock, call: Call) -> None:
        follower.acquire(timeout=LOOK_S)  # it is woken long before where there is a lead to take
        if self._core.reactor.now() - call.until_s > OVERDUE_S:
            raise DeadlineExceededError("the thread that runs this client's connections does not get on")

    def _lead_on(self, call: Call) -> None:
        """With the lead: repair the core, or run the reactor until a call is done; then leave."""
        core = self._core
        try:
            if core.damaged:
                core.repair()
            else:
                core.run_until_done(call)
        except BaseException:
            core.damaged = True  # first: a second interrupt may come with the next call
            self._interrupted(call)
            raise
        finally:
            self.lock.release()

    def _interrupted(self, call: Call) -> None:
        core = self._core
        is_whole, core.reactor.asleep = core.reactor.asleep, False  # what comes next may be cut in two
        if is_whole:
            core.abandon(call)
            core.damaged = False
        elif not isinstance(call, Discard):  # which goes on
            call.done = True  # nothing is done for it any more

    def _recover(self) -> None:
        """This thread has the lead already: it was interrupted between taking it and using it, or between two uses."""
        frame: FrameType | None = sys._getframe(2)  # noqa: SLF001 - the only way to know whether a signal handler asks
        while frame is not None:
            if frame.f_code in _LEADING and frame.f_locals.get("self") is self:
                raise ConfigError("a signal handler has interrupted this client, and cannot use it; use another client")
            frame = frame.f_back
        while self.lock._is_owned():  # type: ignore[attr-defined]  # noqa: SLF001 - see above
            self.lock.release()


_LEADING: Final = frozenset({_Lead.perform.__code__, _Lead._follow.__code__})  # noqa: SLF001 - its own


def _wake(follower: threading.Lock, _: object = None) -> None:
    """Let a thread that follows look again."""
    with suppress(RuntimeError):  # it has been woken already
        follower.release()
