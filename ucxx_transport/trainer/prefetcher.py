"""Prefetcher: fetches a trainer's next batch while it trains on this one.

| call              | nothing under way  | a batch is being fetched    | a batch has been fetched            |
|-------------------|--------------------|-----------------------------|-------------------------------------|
| `start(records)`  | is fetched         | refused: collect or defer   | refused: collect or defer           |
| `defer(records)`  | is fetched         | queued                      | queued                              |
| `wait()`          | refused: start it  | waits; in vain: given up    | nothing                             |
| `collect()`       | refused: start it  | refused: wait first         | the batch; the one before goes      |
| `release()`       | the one in use goes | the one in use goes        | the one in use goes                 |

After `collect`, and after a batch was given up, the oldest deferred one is fetched next. What was given up is never
taken for another: an outcome belongs to its own fetch (`fetch_thread`).
"""

from __future__ import annotations

import atexit
from collections import Counter, deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Final, Self

from ucxx_transport.client.core import ClientCore
from ucxx_transport.config import checked_seconds
from ucxx_transport.errors import ConfigError, DeadlineExceededError
from ucxx_transport.logs import get_logger
from ucxx_transport.trainer.batch import (
    DEFAULT_FETCH_ROUNDS,
    Batch,
    BatchFetch,
    FetchRequest,
    PrefetchStatistics,
    Records,
)
from ucxx_transport.trainer.fetch_thread import FetchThread
from ucxx_transport.trainer.loss_policy import AskedFor, Loss, LossReason

if TYPE_CHECKING:
    from ucxx_transport.client import ClientStatistics
    from ucxx_transport.client.membership import Watcher
    from ucxx_transport.config import ClientConfig
    from ucxx_transport.link.base import LinkFactory
    from ucxx_transport.trainer.gpu_upload import DeviceUploader

_log = get_logger(__name__)

_GRACE_S = 5.0
"""A fetch keeps its own deadline; who waits for it gives the thread this much more before the batch counts as lost."""

YIELD_S: Final = 1e-3
"""A trainer's thread that starts a fetch goes on with its step; where it has had its batches in time, the fetch begins
so much later, rather than take the interpreter from it at once."""


class PendingBatch:
    """A batch that was begun. Take its `result`, or `cancel` it."""

    __slots__ = ("_fetch", "_prefetcher")

    def __init__(self, prefetcher: Prefetcher, fetch: BatchFetch) -> None:
        self._prefetcher = prefetcher
        self._fetch = fetch

    def result(self) -> Batch:
        """Wait for it: counted, its losses reported; the caller releases it. A ConfigError: it was closed meanwhile."""
        return self._prefetcher.take(self._fetch)

    def cancel(self) -> None:
        """Give it up: what came of it is released, and all of it is counted as lost by "closed"."""
        self._prefetcher.leave(len(self._fetch.request.records), self._fetch)


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
        core = ClientCore(
            config,
            link_factory,
            watcher=watcher,
            page_locker=None if uploader is None else uploader.page_locker,
            in_place=None if uploader is None else uploader.is_locked,
        )
        self._uploader = uploader
        self._on_loss = on_loss
        self._head: BatchFetch | None = None
        self._deferred: deque[FetchRequest] = deque()
        self._in_use: Batch | None = None
        self._is_awaited = True
        self._counts: Counter[str] = Counter()
        self._losses: Counter[str] = Counter()
        self._fetch_s = 0.0
        self._thread = FetchThread(
            core, discard_deadline_s=self._deadline_s, discard_lost=discard_lost, uploader=uploader
        )
        self._changed = self._thread.changed
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
        request = self._request(records, policy_version)
        with self._thread.opened():
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
        request = self._request(records, policy_version)
        with self._thread.opened():
            self._deferred.append(request)
            self._begin_next()

    def wait(self, timeout_s: float | str | None = None) -> bool:
        """Wait until the batch on its way can be collected.

        Args:
            timeout_s: how long at most; None: the batch's own deadline.

        Returns:
            False when it did not come: it is given up, its episodes are counted as lost, and whatever still comes of
            it is released. The next deferred batch is then on its way.

        Raises:
            ConfigError: nothing is on its way, or the prefetcher is closed.
        """
        limit_s = self._deadline_s + _GRACE_S if timeout_s is None else checked_seconds(timeout_s, "timeout_s")
        with self._thread.opened():
            head = self._head
            if head is None:
                raise ConfigError("nothing is on its way: start_prefetch(rollouts) first")
            self._is_awaited = head.outcome is None
            if self._thread.wait(head, limit_s) or head is not self._head:
                return True
            self._thread.drop(head)
            self._head = None
            self._begin_next()
        self._report(self._given_up(head.request))
        return False

    def collect(self) -> Batch:
        """Take the fetched batch into use: the one before it is released, and the next deferred one is on its way.

        Raises:
            ConfigError: there is none yet.
            Exception: what ended the fetch, if that was no `TransportError` of one episode.
        """
        with self._thread.opened():
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
        request = self._request(records, policy_version)
        return PendingBatch(self, self._thread.begin(request))

    def check_usable(self) -> None:
        """Refuse, by a ConfigError, a prefetcher that is closed, or its parent process's."""
        with self._thread.opened():
            pass

    def take(self, fetch: BatchFetch) -> Batch:
        """See `PendingBatch.result`."""
        batch = self._thread.result(fetch)
        self._hand_out(batch)
        return batch

    def leave(self, count: int, fetch: BatchFetch | None = None) -> int:
        """Count episodes that were asked for and will not be taken, as lost by "closed"; how many there have been."""
        if fetch is not None:
            self._thread.drop(fetch)
        with self._changed:
            self._losses.update({LossReason.CLOSED.value: count} if count else {})
            return self._losses[LossReason.CLOSED.value]

    def statistics(self) -> PrefetchStatistics:
        """Counts since this prefetcher was made."""
        uploader, counts = self._uploader, self._counts
        with self._changed:
            return PrefetchStatistics(
                batches=counts["batches"],
                episodes=counts["episodes"],
                nbytes=counts["nbytes"],
                fetch_s=self._fetch_s,
                retried=counts["retried"],
                losses=dict(self._losses),
                given_up=counts["given_up"],
                unlocked_rings=0 if uploader is None else uploader.unlocked_rings,
            )

    def client_statistics(self) -> ClientStatistics:
        """Counts of the client since this prefetcher was made: what was read which way, and how long it took."""
        return self._thread.statistics()

    def close(self) -> None:
        """Give up what is on its way, release what is held, take leave of the servers, end the thread. Idempotent."""
        if self._thread.inherited:
            return
        with self._changed:
            if self._thread.closed:
                return
            self._thread.closed = True
            head, self._head = self._head, None
            done, self._in_use = self._in_use, None
            waiting = [*self._deferred]
        atexit.unregister(self.close)
        try:
            self._count_left(head, waiting)
        finally:
            for batch in (done, None if head is None else head.outcome):
                if isinstance(batch, Batch):
                    batch.release()
            self._thread.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _begun(self, request: FetchRequest) -> BatchFetch:
        return self._thread.begin(request, after_s=0.0 if self._is_awaited else YIELD_S)

    def _begin_next(self) -> None:
        if self._head is None and self._deferred:
            self._head = self._begun(self._deferred.popleft())

    def _given_up(self, request: FetchRequest) -> list[Loss]:
        with self._changed:
            self._counts["given_up"] += 1
        _log.warning("batch_abandoned", episodes=len(request.records))
        error = DeadlineExceededError("the batch did not come in time")
        wanted, losses = request.sort_out()
        losses += [
            Loss(index=entry.index, record=entry.record, reason=LossReason.TIMEOUT, error=error) for entry in wanted
        ]
        losses.sort(key=lambda loss: loss.index)
        self._thread.discard(losses)
        return losses

    def _count_left(self, head: BatchFetch | None, waiting: list[FetchRequest]) -> None:
        count = sum(len(request.records) for request in waiting)
        if head is not None and isinstance(head.outcome, Batch):
            count += len(head.outcome.payloads)
            self._count(head.outcome.losses)
        elif head is not None and head.outcome is None:
            count += len(head.request.records)
        if total := self.leave(count):
            _log.warning("episodes_not_taken", episodes=total)

    def _hand_out(self, batch: Batch) -> None:
        with self._changed:
            self._counts.update(
                batches=1,
                episodes=len(batch.payloads),
                nbytes=sum(payload.nbytes for payload in batch.payloads.values()),
                retried=batch.retried,
            )
            self._fetch_s += batch.took_s
        self._report(batch.losses)

    def _report(self, losses: Sequence[Loss]) -> None:
        self._count(losses)
        for loss in losses:
            self._on_loss(loss)

    def _count(self, losses: Sequence[Loss]) -> None:
        with self._changed:
            self._losses.update(loss.reason.value for loss in losses)
