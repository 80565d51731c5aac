"""Prefetcher: fetches a trainer's next batch while it trains on this one.

| call              | nothing under way  | a batch is being fetched    | a batch has been fetched            |
|-------------------|--------------------|-----------------------------|-------------------------------------|
| `start(records)`  | is fetched         | refused: collect or defer   | refused: collect or defer           |
| `defer(records)`  | is fetched         | queued                      | queued                              |
| `wait()`          | refused: start it  | waits; in vain: given up    | nothing                             |
| `collect()`       | refused: start it  | refused: wait first         | the batch; the one before goes      |
| `release()`       | the one in use goes | the one in use goes        | the one in use goes                 |

After `collect`, and after a batch was given up, the oldest deferred one is fetched next.

Fetches begin and end in the prefetcher's own thread, which runs the reactor of its client's core, and sleeps while
nothing is on its way. Calls hand over what that thread is to do, and wait on a condition.
"""

from __future__ import annotations

import atexit
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Final, Self

from ucxx_transport.client.core import ClientCore
from ucxx_transport.errors import ConfigError, DeadlineExceededError, TransportError
from ucxx_transport.logs import get_logger
from ucxx_transport.trainer.batch import (
    DEFAULT_FETCH_ROUNDS,
    Batch,
    BatchFetch,
    FetchLimits,
    FetchRequest,
    PrefetchCounters,
    PrefetchStatistics,
    Records,
)
from ucxx_transport.trainer.loss_policy import AskedFor, Loss, LossReason, discardable_of

if TYPE_CHECKING:
    from ucxx_transport.client import ClientStatistics
    from ucxx_transport.client.membership import Watcher
    from ucxx_transport.config import ClientConfig
    from ucxx_transport.link.base import LinkFactory
    from ucxx_transport.trainer.gpu_upload import DeviceUploader

_log = get_logger(__name__)

_GRACE_S = 5.0
"""A fetch keeps its own deadline; who waits for it gives the thread this much more before the batch counts as lost."""

_JOIN_TIMEOUT_S = 5.0

YIELD_S: Final = 1e-3
"""A trainer's thread that starts a fetch goes on with its step; where it has had its batches in time, the fetch begins
so much later, rather than take the interpreter from it at once."""


class PendingBatch:
    """A batch that was begun. Take its `result`, or `cancel` it."""

    __slots__ = ("_prefetcher", "fetch", "is_left", "outcome")

    def __init__(self, prefetcher: Prefetcher) -> None:
        self._prefetcher = prefetcher
        self.fetch: BatchFetch
        self.is_left = False
        self.outcome: Batch | Exception | None = None

    def result(self) -> Batch:
        """Wait for it: counted, its losses reported; the caller releases it. A ConfigError: it was closed meanwhile."""
        return self._prefetcher.take(self)

    def cancel(self) -> None:
        """Give it up: what came of it is released, and all of it is counted as lost by "closed"."""
        self._prefetcher.leave(len(self.fetch.request.records))
        self._prefetcher.drop(self)


class Prefetcher:
    """One background thread with one client, for a trainer's life. Thread-safe; not usable in a forked child.

    Args:
        config: settings of the client.
        deadline_s: of one batch.
        max_fetch_rounds: as for `fetch_batch`.
        max_staleness: as for `fetch_batch`.
        discard_lost: discard episodes that were given up although they may still lie in their slots (`failed`,
            `timeout`, `unreachable`). False leaves them there, for another trainer that is given their records; but if
            none is, a ring that does not overwrite loses those slots.
        on_loss: called with every episode that is in no batch, by `wait`, `collect` and `fetch` in the caller's thread.
        watcher: as for `UCXXClient`.
        link_factory: as for `UCXXClient`.
        uploader: takes every payload to a GPU as soon as it has come; closed with the prefetcher.

    Raises:
        ConfigError: an argument is out of its bounds.
    """

    def __init__(
        self,
        config: ClientConfig | None = None,
        *,
        deadline_s: float = 30.0,
        max_fetch_rounds: int = DEFAULT_FETCH_ROUNDS,
        max_staleness: int | None = None,
        discard_lost: bool = True,
        on_loss: Callable[[Loss], None] = lambda _: None,
        watcher: Watcher | None = None,
        link_factory: LinkFactory | None = None,
        uploader: DeviceUploader | None = None,
    ) -> None:
        self._limits = FetchLimits(
            deadline_s=deadline_s, max_fetch_rounds=max_fetch_rounds, max_staleness=max_staleness
        )
        self._core = ClientCore(
            config,
            link_factory,
            watcher=watcher,
            page_locker=None if uploader is None else uploader.page_locker,
            in_place=None if uploader is None else uploader.is_locked,
        )
        self._uploader = uploader
        self._on_payload = None if uploader is None else partial(uploader.upload, timers=self._core.reactor)
        self._discard_lost = discard_lost
        self._on_loss = on_loss
        self._changed = threading.Condition()
        self._head: PendingBatch | None = None
        self._deferred: deque[FetchRequest] = deque()
        self._in_use: Batch | None = None
        self._running: set[PendingBatch] = set()
        self._counters = PrefetchCounters()
        self._pid = os.getpid()
        self._closed = self._stopping = False
        self._is_awaited = True
        self._thread = threading.Thread(target=self._run, name="ucxx-prefetch", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    @property
    def is_cold_start(self) -> bool:
        """Whether nothing is on its way and nothing waits to be collected."""
        return self._head is None

    @property
    def is_ready(self) -> bool:
        """Whether a batch waits to be collected."""
        head = self._head
        return head is not None and head.outcome is not None

    @property
    def batch(self) -> Batch | None:
        """The batch that was collected last; its payloads are released by the next `collect`."""
        return self._in_use

    def start(self, records: Records, *, policy_version: int | None = None) -> None:
        """Begin to fetch a batch, and return at once.

        Raises:
            ConfigError: a batch is on its way or waits to be collected; `policy_version` is missing; or the prefetcher
                is closed.
        """
        request = FetchRequest(records, policy_version, self._limits)
        with self._opened():
            if self._head is not None:
                raise ConfigError(
                    "a batch is on its way or waits to be collected; collect_prefetch() first, or "
                    "defer_prefetch(rollouts)"
                )
            self._head = self._begun(request)

    def defer(self, records: Records, *, policy_version: int | None = None) -> None:
        """Fetch a batch as soon as those before it are out of the way: at once when there are none.

        Raises:
            ConfigError: `policy_version` is missing, or the prefetcher is closed.
        """
        request = FetchRequest(records, policy_version, self._limits)
        with self._opened():
            self._deferred.append(request)
            self._begin_next()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until the batch on its way can be collected.

        Args:
            timeout_s: how long at most; None: the batch's own deadline.

        Returns:
            False when it did not come: it is given up, its episodes are counted as lost, and whatever still comes of
            it is released. The next deferred batch is then on its way.

        Raises:
            ConfigError: nothing is on its way, or the prefetcher is closed.
        """
        limit_s = self._limits.deadline_s + _GRACE_S if timeout_s is None else timeout_s
        until_s = time.monotonic() + limit_s
        with self._opened():
            head = self._head
            if head is None:
                raise ConfigError("nothing is on its way: start_prefetch(rollouts) first")
            self._is_awaited = head.outcome is None
            while head is self._head and head.outcome is None and (left_s := until_s - time.monotonic()) > 0:
                self._changed.wait(left_s)
                self._require_open()
            if head is not self._head or head.outcome is not None:
                return True
            self.drop(head)
            self._head = None
            self._begin_next()
        self._report(self._given_up(head.fetch.request))
        return False

    def collect(self) -> Batch:
        """Take the fetched batch into use: the one before it is released, and the next deferred one is on its way.

        Raises:
            ConfigError: there is none yet.
            Exception: what ended the fetch, if that was no `TransportError` of one episode.
        """
        with self._opened():
            if self._head is None:
                raise ConfigError("nothing was prefetched: start_prefetch(rollouts) first")
            outcome = self._head.outcome
            if outcome is None:
                raise ConfigError("the batch is still on its way: wait_prefetch() first")
            done, self._in_use = self._in_use, outcome if isinstance(outcome, Batch) else None
            self._head = None
            self._begin_next()
        if done is not None:
            done.release()
        if isinstance(outcome, Exception):
            raise outcome
        self._hand_out(outcome)
        return outcome

    def release(self) -> None:
        """Release the batch in use now rather than with the next `collect`. Nothing without one."""
        with self._changed:
            done, self._in_use = self._in_use, None
        if done is not None:
            done.release()

    def fetch(self, records: Sequence[AskedFor], *, policy_version: int | None = None) -> Batch:
        """Fetch a batch and wait for it, beside whatever is on its way. The caller releases it.

        Raises:
            ConfigError: `policy_version` is missing, or the prefetcher is closed.
        """
        return self.begin(records, policy_version=policy_version).result()

    def begin(self, records: Sequence[AskedFor], *, policy_version: int | None = None) -> PendingBatch:
        """Begin to fetch a batch beside whatever is on its way, and return at once.

        Raises:
            ConfigError: `policy_version` is missing, or the prefetcher is closed.
        """
        request = FetchRequest(records, policy_version, self._limits)
        with self._opened():
            return self._begun(request, at_once=True)

    def take(self, pending: PendingBatch) -> Batch:
        """See `PendingBatch.result`."""
        try:
            if pending.outcome is None:
                with self._opened():
                    while pending.outcome is None:
                        self._changed.wait()
                        self._require_open()
        except BaseException:
            self.drop(pending)
            raise
        if isinstance(pending.outcome, Exception):
            raise pending.outcome
        self._hand_out(pending.outcome)
        return pending.outcome

    def drop(self, pending: PendingBatch) -> None:
        """Fetch it no longer, and release what came of it."""
        with self._changed:
            pending.is_left = True
            outcome, pending.outcome = pending.outcome, None
            if pending in self._running:
                self._running.discard(pending)
                self._core.reactor.submit(pending.fetch.abandon)
        if isinstance(outcome, Batch):
            outcome.release()

    def leave(self, count: int) -> None:
        """Count episodes that were asked for and will not be taken, as lost by "closed"."""
        self._counters.left(count)

    def statistics(self) -> PrefetchStatistics:
        """Counts since this prefetcher was made."""
        uploader = self._uploader
        return self._counters.snapshot(0 if uploader is None else uploader.unlocked_rings)

    def client_statistics(self) -> ClientStatistics:
        """Counts of the client since this prefetcher was made: what was read which way, and how long it took."""
        return self._core.statistics()

    def close(self) -> None:
        """Give up what is on its way, release what is held, take leave of the servers, end the thread. Idempotent."""
        if os.getpid() != self._pid:
            return  # a forked child's copy: the thread is its parent's
        with self._changed:
            if self._closed:
                return
            self._closed = True
            head, self._head = self._head, None
            done, self._in_use = self._in_use, None
            waiting = [*self._deferred]
            self._changed.notify_all()
        atexit.unregister(self.close)
        unused = None if head is None else head.outcome
        if head is not None and unused is None:
            waiting.append(head.fetch.request)
        count = sum(len(request.records) for request in waiting)
        if isinstance(unused, Batch):
            count += len(unused.payloads)
            self._counters.lost(unused.losses)
        if total := self._counters.left(count):
            _log.warning("episodes_not_taken", episodes=total)
        for batch in (done, unused):
            if isinstance(batch, Batch):
                batch.release()
        self._core.reactor.submit(self._stop)
        self._thread.join(_JOIN_TIMEOUT_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # --- in any thread ------------------------------------------------------------------------------------------------

    @contextmanager
    def _opened(self) -> Iterator[None]:
        """The lock, for what needs the prefetcher open."""
        if os.getpid() != self._pid:  # before the lock, which a thread of the parent may have held at the fork
            raise ConfigError("a prefetcher cannot be used in a forked child; make one in the process that reads")
        with self._changed:
            self._require_open()
            yield

    def _require_open(self) -> None:
        if self._closed:
            raise ConfigError("the prefetcher is closed; make another")

    def _begun(self, request: FetchRequest, *, at_once: bool = False) -> PendingBatch:
        pending = PendingBatch(self)
        fetch = pending.fetch = BatchFetch(self._core, request, partial(self._came, pending), self._on_payload)
        self._running.add(pending)
        self._core.reactor.submit(partial(fetch.start, 0.0 if at_once or self._is_awaited else YIELD_S))
        return pending

    def _begin_next(self) -> None:
        if self._head is None and self._deferred:
            self._head = self._begun(self._deferred.popleft())

    def _given_up(self, request: FetchRequest) -> list[Loss]:
        self._counters.gave_up()
        _log.warning("batch_abandoned", episodes=len(request.records))
        error = DeadlineExceededError("the batch did not come in time")
        wanted, losses = request.sort_out()
        losses += [
            Loss(index=entry.index, record=entry.record, reason=LossReason.TIMEOUT, error=error) for entry in wanted
        ]
        losses.sort(key=lambda loss: loss.index)
        self._core.reactor.submit(partial(self._discard, losses))
        return losses

    def _hand_out(self, batch: Batch) -> None:
        self._counters.handed_out(batch)
        self._report(batch.losses)

    def _report(self, losses: Sequence[Loss]) -> None:
        self._counters.lost(losses)
        for loss in losses:
            self._on_loss(loss)

    # --- in the prefetcher's thread -----------------------------------------------------------------------------------

    def _run(self) -> None:
        reactor = self._core.reactor
        try:
            while not self._stopping:
                reactor.run_once(math.inf)
        except Exception as error:  # noqa: BLE001 - the edge of a thread: those who wait hear that it is closed
            _log.error("prefetcher_failed", reason=f"{type(error).__name__}: {error}")
        finally:
            with self._changed:
                self._closed = True
                fetches = [pending.fetch for pending in self._running]
                self._running.clear()
                self._changed.notify_all()
            for fetch in fetches:
                fetch.abandon()
            if self._uploader is not None:
                self._uploader.close()  # before the core, which frees the buffers that come back
            self._core.close()

    def _stop(self) -> None:
        self._stopping = True

    def _came(self, pending: PendingBatch, outcome: Batch | Exception) -> None:
        if isinstance(outcome, Batch):
            self._discard(outcome.losses)
        with self._changed:
            self._running.discard(pending)
            if not pending.is_left and not self._closed:
                pending.outcome = outcome
                self._changed.notify_all()
                return
        if isinstance(outcome, Batch):
            outcome.release()  # whose episodes were counted as lost

    def _discard(self, losses: Sequence[Loss]) -> None:
        """Begin to discard what of these may still lie in its slot."""
        refs = discardable_of(losses, discard_lost=self._discard_lost)
        if refs:
            try:
                self._core.begin_discard(refs, self._limits.deadline_s)
            except TransportError as error:
                _log.warning("discard_failed", reason=f"{type(error).__name__}: {error}")
