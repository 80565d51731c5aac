"""Prefetcher: batches fetched side by side while a trainer does something else, by one plain thread with one client.

| a batch         | its future      | is held by                  | counts, when the prefetcher is closed           |
|-----------------|-----------------|-----------------------------|-------------------------------------------------|
| prepared        | pending         | its caller                  | its episodes, as lost by "closed"               |
| begun           | pending         | a `BatchFetch`              | the same                                        |
| come            | has its outcome | its future                  | its payloads, the same; its losses, as they are |
| taken           | …               | its caller, who releases it | nothing more: counted then                      |
| given up        | cancelled       | nobody: released as it comes| nothing more: counted then                      |

Fetches begin and end in the thread, which runs the reactor of the client's core; others wait for a future.
"""

from __future__ import annotations

import atexit
import math
import os
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Self

from ucxx_transport.client.core import ClientCore
from ucxx_transport.config import checked_seconds
from ucxx_transport.errors import ConfigError, DeadlineExceededError, TransportError
from ucxx_transport.logs import get_logger
from ucxx_transport.trainer.batch import (
    DEFAULT_FETCH_ROUNDS,
    Batch,
    BatchFetch,
    FetchRequest,
    PrefetchStatistics,
    Records,
)
from ucxx_transport.trainer.loss_policy import Loss, LossReason, discardable_of

if TYPE_CHECKING:
    from ucxx_transport.client import ClientStatistics
    from ucxx_transport.client.membership import Watcher
    from ucxx_transport.config import ClientConfig
    from ucxx_transport.link.reactor import LinkFactory
    from ucxx_transport.trainer.unpacking import DeviceUploader

_log = get_logger(__name__)

_GRACE_S: Final = 5.0
"""A fetch keeps its own deadline; who waits for it gives the thread this much more before the batch counts as lost."""

_JOIN_TIMEOUT_S: Final = 5.0


class PendingBatch:
    """A batch to come, of `Prefetcher.begin` or `prepare`. Take its `result`, or `cancel` it."""

    __slots__ = ("_prefetcher", "future", "outcome", "request")

    def __init__(self, prefetcher: Prefetcher, request: FetchRequest) -> None:
        self._prefetcher = prefetcher
        self.request = request
        self.future: Future[Batch | Exception] = Future()
        self.outcome: Batch | Exception | None = None  # the future's, which takes longer to ask

    @property
    def is_ready(self) -> bool:
        """Whether its result need not be waited for."""
        return self.outcome is not None or self.future.done()

    def begin(self, after_s: float = 0.0) -> None:
        """Begin to fetch one that was prepared, in so many seconds, and return at once. Idempotent."""
        self._prefetcher.begin_prepared(self, after_s)

    def wait(self, timeout_s: float | str | None = None) -> bool:
        """Wait for it.

        Args:
            timeout_s: how long at most; None: its own deadline, and some seconds for the thread.

        Returns:
            False when it did not come: it is given up, its episodes are counted and reported as lost by "timeout",
            and whatever still comes of it is released.

        Raises:
            ConfigError: it was cancelled, or the prefetcher is closed.
        """
        return self._prefetcher.wait_for(self, timeout_s)

    def result(self) -> Batch:
        """Wait for it, count it and report its losses. The caller releases it.

        Raises:
            ConfigError: it was cancelled, or the prefetcher is closed.
            Exception: what ended the fetch, if that was no `TransportError` of one episode.
        """
        return self._prefetcher.take(self)

    def cancel(self) -> None:
        """Give it up: what came of it is released, and counted as lost by "closed". Idempotent."""
        self._prefetcher.leave(self)


class Prefetcher:
    """One background thread with one client, for a trainer's life. Thread-safe; not usable in a forked child.

    ```python
    with Prefetcher(config) as prefetcher:
        pending = prefetcher.begin(next_records())
        while training:
            batch = pending.result()
            pending = prefetcher.begin(next_records())    # fetched while this one is trained on
            train(batch.payloads)
            batch.release()
    ```

    Args:
        config: settings of the client.
        deadline_s: of one batch.
        max_fetch_rounds: as for `fetch_batch`.
        max_staleness: as for `fetch_batch`.
        discard_lost: discard episodes that were given up although they may still lie in their slots (`failed`,
            `timeout`, `unreachable`). False leaves them there, for another trainer that is given their records; but if
            none is, a ring that does not overwrite loses those slots.
        on_loss: called with every episode that is in no batch, by `wait`, `result` and `fetch` in the caller's thread.
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
        deadline_s: float | str = 30.0,
        max_fetch_rounds: int = DEFAULT_FETCH_ROUNDS,
        max_staleness: int | None = None,
        discard_lost: bool = True,
        on_loss: Callable[[Loss], None] = lambda _: None,
        watcher: Watcher | None = None,
        link_factory: LinkFactory | None = None,
        uploader: DeviceUploader | None = None,
    ) -> None:
        self._request = partial(
            FetchRequest, deadline_s=deadline_s, max_fetch_rounds=max_fetch_rounds, max_staleness=max_staleness
        )
        self._deadline_s = self._request((), 0).deadline_s  # wrong bounds are refused here
        self._discard_lost = discard_lost
        self._on_loss = on_loss
        self._uploader = uploader
        self._core = ClientCore(
            config,
            link_factory,
            watcher=watcher,
            page_locker=None if uploader is None else uploader.page_locker,
            in_place=None if uploader is None else uploader.is_locked,
        )
        self._on_payload = None if uploader is None else partial(uploader.upload, timers=self._core.reactor)
        self._pid = os.getpid()
        self._lock = threading.RLock()
        self._closed = False
        self._untaken: set[PendingBatch] = set()
        self._counts: defaultdict[str, Any] = defaultdict(int)  # of `PrefetchStatistics`, by its names
        self._losses: Counter[str] = Counter()
        self._running: dict[PendingBatch, BatchFetch] = {}  # the thread's own
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ucxx-prefetch", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def fetch(self, records: Records, *, policy_version: int | None = None) -> Batch:
        """Fetch a batch beside whatever is on its way, and wait for it; see `begin` and `PendingBatch.result`."""
        return self.begin(records, policy_version=policy_version).result()

    def begin(self, records: Records, *, policy_version: int | None = None) -> PendingBatch:
        """Begin to fetch a batch beside whatever is on its way, and return at once.

        Raises:
            ConfigError: `policy_version` is missing, or the prefetcher is closed.
        """
        pending = self.prepare(records, policy_version=policy_version)
        pending.begin()
        return pending

    def prepare(self, records: Records, *, policy_version: int | None = None) -> PendingBatch:
        """A batch whose fetch is begun later, by its `begin`; errors as `begin`."""
        pending = PendingBatch(self, self._request(records, policy_version))
        with self._lock:
            self.check_usable()
            self._untaken.add(pending)  # where closing finds it
        return pending

    def check_usable(self) -> None:
        """Refuse, by a ConfigError, a prefetcher that is closed, or its parent process's."""
        if os.getpid() != self._pid:
            raise ConfigError("a prefetcher cannot be used in a forked child; make one in the process that reads")
        if self._closed:
            raise ConfigError("the prefetcher is closed; make another")

    def begin_prepared(self, pending: PendingBatch, after_s: float) -> None:
        self._core.reactor.submit(partial(self._start, pending, after_s))

    def wait_for(self, pending: PendingBatch, timeout_s: float | str | None) -> bool:
        limit_s = self._deadline_s + _GRACE_S if timeout_s is None else checked_seconds(timeout_s, "timeout_s")
        try:
            self._outcome_of(pending, limit_s)
        except TimeoutError:
            if self._dropped(pending) is None and self._forgotten(pending):
                self._lose(pending.request)
                return False
        return True

    def take(self, pending: PendingBatch) -> Batch:
        try:
            batch = self._outcome_of(pending)
        except ConfigError:
            raise
        except BaseException:  # interrupted
            self.leave(pending)
            raise
        if not self._forgotten(pending):
            raise ConfigError("the batch was taken or cancelled")
        if isinstance(batch, Exception):
            raise batch
        counts = self._counts
        with self._lock:
            counts["batches"] += 1
            counts["episodes"] += len(batch.payloads)
            counts["nbytes"] += batch.nbytes
            counts["fetch_s"] += batch.took_s
            counts["retried"] += batch.retried
        self._count(batch.losses, self._on_loss)
        return batch

    def leave(self, pending: PendingBatch) -> None:
        if not self._forgotten(pending):
            return
        outcome = self._dropped(pending)
        if isinstance(outcome, Batch):
            self.count_left(len(outcome.payloads))
            self._count(outcome.losses)
            outcome.release()
        else:
            self.count_left(len(pending.request.records))

    def count_left(self, episodes: int) -> None:
        """Count episodes that were asked for and will not be taken, as lost by "closed"."""
        with self._lock:
            self._losses.update({LossReason.CLOSED.value: episodes} if episodes else {})

    def statistics(self) -> PrefetchStatistics:
        """Counts since this prefetcher was made."""
        unlocked_rings = 0 if self._uploader is None else self._uploader.unlocked_rings
        with self._lock:
            return PrefetchStatistics(**self._counts, losses=dict(self._losses), unlocked_rings=unlocked_rings)

    def client_statistics(self) -> ClientStatistics:
        """Counts of the client since this prefetcher was made: what was read which way, and how long it took."""
        found: Future[ClientStatistics] = Future()
        self._core.reactor.submit(lambda: found.set_result(self._core.statistics()))  # in the thread that has the link
        while self._thread.is_alive():  # one that ends does not answer
            with suppress(TimeoutError):
                return found.result(1.0)
        return self._core.statistics()

    def close(self) -> None:
        """Give up what is not taken, take leave of the servers, end the thread. Idempotent, bounded."""
        if self._closed or os.getpid() != self._pid:
            return
        atexit.unregister(self.close)
        try:
            self._leave_all()
        finally:
            self._core.reactor.submit(self._stopping.set)
            self._thread.join(_JOIN_TIMEOUT_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _outcome_of(self, pending: PendingBatch, limit_s: float | None = None) -> Batch | Exception:
        """Wait for it; a TimeoutError when there is none in time, a ConfigError when there will be none."""
        self.check_usable()
        try:
            return pending.outcome or pending.future.result(limit_s)
        except CancelledError:
            self.check_usable()
            raise ConfigError("the batch was cancelled") from None

    def _forgotten(self, pending: PendingBatch) -> bool:
        """Whether it had not been taken or given up; it has now."""
        with self._lock:
            found = pending in self._untaken
            self._untaken.discard(pending)
        return found

    def _dropped(self, pending: PendingBatch) -> Batch | Exception | None:
        """Fetch it no longer; what has come of it already."""
        if pending.future.cancel():
            self._core.reactor.submit(partial(self._abandon, pending))
            return None
        return pending.future.result()

    def _lose(self, request: FetchRequest) -> None:
        with self._lock:
            self._counts["given_up"] += 1
        _log.warning("batch_abandoned", episodes=len(request.records))
        error, (wanted, lost) = DeadlineExceededError("the batch did not come in time"), request.sort_out()
        late = [Loss(index=each.index, record=each.record, reason=LossReason.TIMEOUT, error=error) for each in wanted]
        losses = sorted([*lost, *late], key=lambda loss: loss.index)
        self._core.reactor.submit(partial(self._discard, losses))
        self._count(losses, self._on_loss)

    def _leave_all(self) -> None:
        with self._lock:
            self._closed = True
            untaken = [*self._untaken]
        for pending in untaken:
            self.leave(pending)
        if untaken:
            _log.warning("episodes_not_taken", episodes=self._losses[LossReason.CLOSED.value])

    def _count(self, losses: Sequence[Loss], on_loss: Callable[[Loss], None] = lambda _: None) -> None:
        with self._lock:
            self._losses.update(loss.reason.value for loss in losses)
        for loss in losses:
            on_loss(loss)

    def _run(self) -> None:  # from here on: by the thread itself
        try:
            while not self._stopping.is_set():
                try:
                    self._core.reactor.run_once(math.inf)
                except Exception as error:
                    if not self._running:
                        raise
                    for fetch in [*self._running.values()]:
                        fetch.fail(error)
        except Exception as error:  # noqa: BLE001 - the edge of a thread: those who wait hear that it is closed
            _log.error("prefetcher_failed", reason=f"{type(error).__name__}: {error}")
            self._leave_all()
        finally:
            if self._uploader is not None:
                self._uploader.close()  # before the core, which frees the buffers that come back
            self._core.close()

    def _start(self, pending: PendingBatch, after_s: float) -> None:
        if pending not in self._running and not pending.future.done():
            fetch = BatchFetch(self._core, pending.request, partial(self._came, pending), self._on_payload)
            self._running[pending] = fetch
            fetch.start(after_s)

    def _abandon(self, pending: PendingBatch) -> None:
        fetch = self._running.pop(pending, None)
        if fetch is not None:
            fetch.abandon()

    def _came(self, pending: PendingBatch, outcome: Batch | Exception) -> None:
        del self._running[pending]
        if isinstance(outcome, Batch):
            self._discard(outcome.losses)
            if self._uploader is None:  # made here and kept, the arrays cost the trainer no time
                with suppress(TransportError):  # raised to who takes those arrays
                    any(payload.arrays is None for payload in outcome.payloads.values())
        if pending.future.set_running_or_notify_cancel():
            pending.outcome = outcome
            pending.future.set_result(outcome)
        elif isinstance(outcome, Batch):
            outcome.release()  # whose episodes were counted as lost

    def _discard(self, losses: Sequence[Loss]) -> None:
        refs = discardable_of(losses, discard_lost=self._discard_lost)
        if refs:
            try:
                self._core.discard(self._core.discard_call(refs, self._deadline_s))
            except TransportError as error:
                _log.warning("discard_failed", reason=f"{type(error).__name__}: {error}")
