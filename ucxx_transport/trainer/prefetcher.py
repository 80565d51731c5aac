"""Prefetcher: batches fetched side by side while a trainer does something else, by one plain thread with one client."""

from __future__ import annotations

import atexit
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Final, Unpack

from ucxx_transport.client.core import ClientCore
from ucxx_transport.config import ClientConfig
from ucxx_transport.logs import get_logger
from ucxx_transport.machine import start_thread
from ucxx_transport.schema.episode_record import several
from ucxx_transport.settings import check_names, known_options
from ucxx_transport.teardown import Closing, refuse_forked
from ucxx_transport.trainer.batch import Batch, FetchLimits, FetchSettings, LimitSettings, PrefetchStatistics
from ucxx_transport.trainer.loss_policy import AskedFor, Loss
from ucxx_transport.trainer.pending import Fetches, PendingBatch
from ucxx_transport.trainer.unpacking import unpacker_for

if TYPE_CHECKING:
    from ucxx_transport.client import ClientStatistics
    from ucxx_transport.client.reads import Watcher
    from ucxx_transport.link.reactor import LinkFactory

_log = get_logger(__name__)

_JOIN_TIMEOUT_S: Final = 5.0


class Prefetcher(Fetches, Closing):
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
        config: settings of the client, or a mapping of them.
        device: where episodes are given: None for numpy views, "cpu" for torch tensors, "cuda:N" and "cupy:N" for
            tensors and arrays on a GPU.
        deadline_s: of one batch; 30.
        max_fetch_rounds: as for `fetch_batch`; 3.
        max_staleness: as for `fetch_batch`.
        discard_lost: discard episodes that were given up although they may still lie in their slots (`failed`,
            `timeout`, `unreachable`). False leaves them there, for another trainer that is given their records; but if
            none is, a ring that does not overwrite loses those slots.
        unreachable_batches: after so many batches in a row without an answer of a source that has never answered, or of
            which nothing came at all, `result` raises; 3; None: never.
        on_loss: called with every episode that is in no batch, by `result` and `fetch` in the caller's thread. One line
            a batch and reason is logged in any case (`episodes_lost`), once a minute while it lasts.
        watcher: as for `UCXXClient`.
        link_factory: as for `UCXXClient`.

    Attributes:
        unpack: gives the arrays of a payload, where episodes are given; valid for as long as they live.
        in_a_batch: its own batches that count as one for `unreachable_batches`.

    Raises:
        ConfigError: an argument is out of its bounds, or this machine has no such device.
    """

    def __init__(
        self,
        config: ClientConfig | Mapping[str, object] | None = None,
        *,
        device: object = None,
        on_loss: Callable[[Loss], None] | None = None,
        watcher: Watcher | None = None,
        link_factory: LinkFactory | None = None,
        **limits: Unpack[LimitSettings],
    ) -> None:
        known = {"config", *FetchSettings.__annotations__, *(type(self).__init__.__kwdefaults__ or ())}
        check_names(f"setting of {type(self).__name__}", limits, known)
        checked = FetchLimits(**limits, on_loss=on_loss)
        self.unpack, uploader, in_place = unpacker_for(device)
        page_locker = None if uploader is None else uploader.page_locker
        core = ClientCore(config, link_factory, watcher=watcher, page_locker=page_locker, in_place=in_place)
        super().__init__(core, checked, uploader)
        self._stopping = threading.Event()
        try:
            self._thread = start_thread(self._run, name="ucxx-prefetch")
        except BaseException:
            self._end_core()
            raise
        atexit.register(self.close)

    @known_options
    def fetch(self, records: Sequence[AskedFor], *, policy_version: int | None = None) -> Batch:
        """Fetch a batch beside whatever is on its way, and wait for it; see `begin` and `PendingBatch.result`.

        What came of a batch that raises is released.
        """
        return self.begin(records, policy_version=policy_version).fetch()

    @known_options
    def begin(self, records: Sequence[AskedFor], *, policy_version: int | None = None) -> PendingBatch:
        """Begin to fetch a batch beside whatever is on its way, and return at once.

        Raises:
            ConfigError: `records` is no list, `policy_version` is missing, or the prefetcher is closed.
        """
        given = dict(enumerate(several(records, "records")))
        pending = self.add(PendingBatch(self, given, policy_version))
        pending.begin()
        return pending

    def statistics(self) -> PrefetchStatistics:
        """Counts since this was made."""
        refuse_forked(self.core.pid, type(self).__name__)
        return replace(self.counts, losses=dict(self.counts.losses))

    def client_statistics(self) -> ClientStatistics:
        """Counts of the client since this was made: what was read which way, and how long it took."""
        refuse_forked(self.core.pid, type(self).__name__)
        found: Future[ClientStatistics] = Future()
        self.core.reactor.submit(lambda: found.set_result(self.core.statistics()))  # in the thread that has the link
        while self._thread.is_alive():  # one that ends does not answer
            with suppress(TimeoutError):
                return found.result(1.0)
        return self.core.statistics()

    def close(self) -> None:
        """Give up what is not taken, take leave of the servers, end the thread. Idempotent, bounded."""
        if self.core.inherited:
            return
        atexit.unregister(self.close)
        try:
            self._leave_all()
        finally:
            self.core.reactor.submit(self._stopping.set)
            self._thread.join(_JOIN_TIMEOUT_S)

    def _leave_all(self) -> None:
        with self.lock:
            self.closed = True
            untaken = [*self.untaken]
            self.changed.notify_all()
        for pending in untaken:
            pending.cancel()
        if untaken:
            _log.info("episodes_not_taken", episodes=self.counts.losses.get("closed", 0))

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                try:
                    self.core.reactor.run_once(math.inf)
                except Exception as error:
                    # of a copy: what is taken leaves without the lock
                    running = [each for each in [*self.untaken] if each.has_begun and not each.is_ready]
                    if not running:
                        raise
                    for pending in running:
                        pending.fail(error)
        except Exception as error:  # noqa: BLE001 - the edge of a thread: those who wait hear that it is closed
            self.failure = error.with_traceback(None)  # which would keep frames, and payloads by them
            _log.error("prefetcher_failed", reason=f"{type(error).__name__}: {error}")
            self._leave_all()
        finally:
            self._end_core()

    def _end_core(self) -> None:
        if self.uploader is not None:
            self.uploader.close()  # before the core, which frees the buffers that come back
        self.core.close()
