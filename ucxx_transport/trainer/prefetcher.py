"""Prefetcher: fetches a trainer's next batch while it trains on this one."""

from __future__ import annotations

import asyncio
import atexit
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, Self

from ucxx_transport.client import ClientStatistics, UCXXClient
from ucxx_transport.client.loop_thread import LoopThread
from ucxx_transport.config import ClientConfig
from ucxx_transport.errors import ConfigError, DeadlineExceededError
from ucxx_transport.logs import get_logger
from ucxx_transport.trainer.batch import (
    DEFAULT_FETCH_ROUNDS,
    Batch,
    BatchReader,
    FetchRequest,
    LossDiscarder,
    PendingBatch,
    PrefetchCounters,
    PrefetchStatistics,
    Records,
    check_limits,
    fetch_batch,
)
from ucxx_transport.trainer.gpu_upload import DeviceUploader, UploadingReader
from ucxx_transport.trainer.loss_policy import AskedFor, Loss, LossReason, check_staleness, sort_out
from ucxx_transport.trainer.prefetch import DoubleBuffer, FetchOrder

if TYPE_CHECKING:
    from ucxx_transport.client.core import LinkFactory
    from ucxx_transport.client.membership import Watcher

_log = get_logger(__name__)

_GRACE_S = 5.0
"""A fetch keeps its own deadline; who waits for it gives the loop this much more before the batch counts as lost."""


YIELD_S: Final = 1e-3
"""A trainer's thread that starts a fetch goes on with its step; where it has had its batches in time, the fetch begins
so much later, rather than take the interpreter from it at once."""


class Prefetcher:
    """One background thread with one event loop and one client, for a trainer's life. Thread-safe.

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
        check_limits(deadline_s, max_fetch_rounds)
        check_staleness(max_staleness, policy_version=0)
        self._client = UCXXClient(
            config,
            watcher=watcher,
            link_factory=link_factory,
            page_locker=None if uploader is None else uploader.page_locker,
        )
        self._uploader = uploader
        self._reader: BatchReader = self._client if uploader is None else UploadingReader(self._client, uploader)
        self._deadline_s = deadline_s
        self._max_fetch_rounds = max_fetch_rounds
        self._max_staleness = max_staleness
        self._discarder = LossDiscarder(self._client, discard_lost=discard_lost, deadline_s=deadline_s)
        self._on_loss = on_loss
        self._changed = threading.Condition()
        self._buffer: DoubleBuffer[FetchRequest, Batch | Exception] = DoubleBuffer()
        self._running: dict[int, tuple[Future[None], FetchRequest]] = {}
        self._beside: set[Future[Batch]] = set()
        self._counters = PrefetchCounters()
        self._closed = False
        self._is_awaited = True
        self._thread = LoopThread("ucxx-prefetch")
        atexit.register(self.close)  # registered after the loop's own, so run before it

    @property
    def is_cold_start(self) -> bool:
        """Whether nothing is on its way and nothing waits to be collected."""
        with self._changed:
            return self._buffer.is_cold_start

    @property
    def is_ready(self) -> bool:
        """Whether a batch waits to be collected."""
        with self._changed:
            return self._buffer.fetched

    @property
    def batch(self) -> Batch | None:
        """The batch that was collected last; its payloads are released by the next `collect`."""
        with self._changed:
            in_use = self._buffer.in_use
        return in_use if isinstance(in_use, Batch) else None

    def start(self, records: Records, *, policy_version: int | None = None) -> None:
        """Begin to fetch a batch, and return at once.

        Raises:
            ConfigError: a batch is on its way or waits to be collected; `policy_version` is missing; or the prefetcher
                is closed.
        """
        with self._changed:
            self._require_open()
            self._begin(self._buffer.start(self._request(records, policy_version)))

    def defer(self, records: Records, *, policy_version: int | None = None) -> None:
        """Fetch a batch as soon as those before it are out of the way: at once when there are none.

        Raises:
            ConfigError: `policy_version` is missing, or the prefetcher is closed.
        """
        with self._changed:
            self._require_open()
            self._begin(self._buffer.defer(self._request(records, policy_version)))

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
        limit_s = self._deadline_s + _GRACE_S if timeout_s is None else timeout_s
        until_s = time.monotonic() + limit_s
        with self._changed:
            self._require_open()
            batch_id = self._buffer.fetching
            self._is_awaited = batch_id is not None
            if batch_id is None:
                if self._buffer.fetched:
                    return True
                raise ConfigError("nothing is on its way: start_prefetch(rollouts) first")
            while self._buffer.fetching == batch_id and (left_s := until_s - time.monotonic()) > 0:
                self._changed.wait(left_s)
            self._require_open()
            if self._buffer.fetching != batch_id:
                return True
            losses = self._give_up(batch_id)
        self._report(losses)
        return False

    def collect(self) -> Batch:
        """Take the fetched batch into use: the one before it is released, and the next deferred one is on its way.

        Raises:
            ConfigError: there is none yet.
            Exception: what ended the fetch, if that was no `TransportError` of one episode.
        """
        with self._changed:
            self._require_open()
            collected = self._buffer.collect()
            self._begin(collected.order)
        if isinstance(collected.done, Batch):
            collected.done.release()
        if isinstance(collected.batch, Exception):
            raise collected.batch
        self._hand_out(collected.batch)
        return collected.batch

    def release(self) -> None:
        """Release the batch in use now rather than with the next `collect`. Nothing without one."""
        with self._changed:
            done = self._buffer.release()
        if isinstance(done, Batch):
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
        with self._changed:
            self._require_open()
            future = self._thread.submit(lambda: self._fetch(request))
            self._beside.add(future)
        future.add_done_callback(self._beside.discard)  # outside the lock: it may be done, and then this calls it
        return PendingBatch(self._thread, future, self._hand_out, lambda: self.leave(len(request.records)))

    def leave(self, count: int) -> None:
        """Count episodes that were asked for and will not be taken, as lost by "closed"."""
        self._counters.left(count)

    def statistics(self) -> PrefetchStatistics:
        """Counts since this prefetcher was made."""
        return self._counters.snapshot()

    def client_statistics(self) -> ClientStatistics:
        """Counts of the client since this prefetcher was made: what was read which way, and how long it took."""

        async def seen() -> ClientStatistics:
            return self._client.statistics()

        try:
            return self._thread.call(seen)  # UCX's endpoints are that thread's alone
        except ConfigError:  # closed
            return self._client.statistics()

    def close(self) -> None:
        """Give up what is on its way, release what is held, take leave of the servers, end the thread. Idempotent."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            closed = self._buffer.close()
            running = list(self._running.values())
            futures: list[Future[Any]] = [*(future for future, _ in running), *self._beside]
            self._running.clear()
            self._changed.notify_all()
        self._count_left([*(request for _, request in running), *closed.waiting], closed.unused)
        for future in futures:
            future.cancel()
        for batch in (closed.done, closed.unused):
            if isinstance(batch, Batch):
                batch.release()
        atexit.unregister(self.close)
        with suppress(ConfigError):  # at the interpreter's exit the thread may have ended before
            self._thread.call(self._aclose)
        self._thread.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _request(self, records: Records, policy_version: int | None) -> FetchRequest:
        check_staleness(self._max_staleness, policy_version)
        return FetchRequest(records, policy_version)

    def _begin(self, order: FetchOrder[FetchRequest] | None) -> None:
        if order is not None:
            future = self._thread.submit(lambda: self._prefetch(order))
            self._running[order.batch_id] = (future, order.rollouts)

    async def _fetch(self, request: FetchRequest) -> Batch:
        batch = await fetch_batch(
            self._reader,
            request.records,
            deadline_s=self._deadline_s,
            max_fetch_rounds=self._max_fetch_rounds,
            policy_version=request.policy_version,
            max_staleness=self._max_staleness,
        )
        self._discarder.discard(batch.losses)
        return batch

    async def _aclose(self) -> None:
        self._discarder.cancel()
        if self._uploader is not None:
            self._uploader.close()  # before the client, which frees the buffers that come back
        await self._client.aclose()

    async def _prefetch(self, order: FetchOrder[FetchRequest]) -> None:
        outcome: Batch | Exception
        if not self._is_awaited:
            await asyncio.sleep(YIELD_S)
        try:
            outcome = await self._fetch(order.rollouts)
        except Exception as error:  # noqa: BLE001 - the edge of a task: `collect` raises it to the trainer
            outcome = error
        with self._changed:
            taken = self._buffer.finished(order.batch_id, outcome)
            self._running.pop(order.batch_id, None)
            self._changed.notify_all()
        if not taken and isinstance(outcome, Batch):
            outcome.release()  # its episodes were counted as lost when it was given up

    def _count_left(self, requests: Sequence[FetchRequest], unused: Batch | Exception | None) -> None:
        left = sum(len(request.records) for request in requests)
        if isinstance(unused, Batch):
            left += len(unused.payloads)
            self._counters.lost(unused.losses)
        if total := self._counters.left(left):
            _log.warning("episodes_not_taken", episodes=total)

    def _give_up(self, batch_id: int) -> list[Loss]:
        future, request = self._running.pop(batch_id)
        future.cancel()
        self._counters.gave_up()
        self._begin(self._buffer.abandon(batch_id))
        _log.warning("batch_abandoned", batch=batch_id, episodes=len(request.records))
        error = DeadlineExceededError("the batch did not come in time", batch=batch_id)
        wanted, losses = sort_out(
            request.records, policy_version=request.policy_version, max_staleness=self._max_staleness
        )
        losses += [
            Loss(index=entry.index, record=entry.record, reason=LossReason.TIMEOUT, error=error) for entry in wanted
        ]
        losses.sort(key=lambda loss: loss.index)

        async def discard() -> None:
            self._discarder.discard(losses)

        self._thread.submit(discard)
        return losses

    def _hand_out(self, batch: Batch) -> None:
        self._counters.handed_out(batch)
        self._report(batch.losses)

    def _report(self, losses: Sequence[Loss]) -> None:
        self._counters.lost(losses)
        for loss in losses:
            self._on_loss(loss)

    def _require_open(self) -> None:
        if self._closed:
            raise ConfigError("the prefetcher is closed; make another")
