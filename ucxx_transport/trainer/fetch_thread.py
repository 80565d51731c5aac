"""FetchThread: batches fetched side by side, in one plain thread that runs the reactor of its client's core.

Fetches begin and end in that thread, which sleeps while nothing is on its way. Other threads hand over what it is to do
(`Reactor.submit`), and wait on a condition for what came of it.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from ucxx_transport.errors import ConfigError, TransportError
from ucxx_transport.logs import get_logger
from ucxx_transport.trainer.batch import Batch, BatchFetch, FetchRequest
from ucxx_transport.trainer.loss_policy import Loss, discardable_of

if TYPE_CHECKING:
    from ucxx_transport.client import ClientStatistics
    from ucxx_transport.client.core import ClientCore
    from ucxx_transport.trainer.gpu_upload import DeviceUploader

_log = get_logger(__name__)

_JOIN_TIMEOUT_S = 5.0

_LOOK_S = 1.0
"""A caller looks this often whether the thread still runs."""


class FetchThread:
    """See the module. Not usable in a forked child.

    Args:
        core: reads, and is closed with the thread.
        discard_deadline_s: of what is discarded.
        discard_lost: as for `Prefetcher`.
        uploader: as for `Prefetcher`.

    Attributes:
        changed: notified when a fetch has ended, or all of them have.
        closed: whether it takes no more of them.
    """

    def __init__(
        self, core: ClientCore, *, discard_deadline_s: float, discard_lost: bool, uploader: DeviceUploader | None
    ) -> None:
        self._core = core
        self._discard_deadline_s = discard_deadline_s
        self._discard_lost = discard_lost
        self._uploader = uploader
        self._on_payload = None if uploader is None else partial(uploader.upload, timers=core.reactor)
        self._running: set[BatchFetch] = set()
        self._pid = os.getpid()
        self._stopping = False
        self.closed = False
        self.changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="ucxx-prefetch", daemon=True)
        self._thread.start()

    @contextmanager
    def opened(self) -> Iterator[None]:
        """The lock of `changed`; a ConfigError where the thread is closed, or its parent process's."""
        if self.inherited:  # before the lock, which a thread of the parent may have held at the fork
            raise ConfigError("a prefetcher cannot be used in a forked child; make one in the process that reads")
        with self.changed:
            self._require_open()
            yield

    @property
    def inherited(self) -> bool:
        """Whether this is a forked child's copy: the thread is its parent's."""
        return os.getpid() != self._pid

    def begin(self, request: FetchRequest, after_s: float = 0.0) -> BatchFetch:
        """Begin to fetch a batch, in so many seconds, and return at once; errors as `opened`."""
        fetch = BatchFetch(self._core, request, self._came, self._on_payload)
        with self.opened():
            self._running.add(fetch)
            self._core.reactor.submit(partial(fetch.start, after_s))
        return fetch

    def wait(self, fetch: BatchFetch, timeout_s: float | None = None) -> bool:
        """Wait for its outcome; whether there is one. Errors as `opened`."""
        until_s = math.inf if timeout_s is None else time.monotonic() + timeout_s
        with self.opened():
            while fetch.outcome is None and not fetch.is_dropped and (left_s := until_s - time.monotonic()) > 0:
                self.changed.wait(None if timeout_s is None else left_s)
                self._require_open()
            return fetch.outcome is not None

    def result(self, fetch: BatchFetch) -> Batch:
        """The batch, waited for, or what ended its fetch is raised; interrupted, or closed meanwhile, it is dropped."""
        try:
            if fetch.outcome is None:
                self.wait(fetch)
        except BaseException:
            self.drop(fetch)
            raise
        if isinstance(fetch.outcome, Batch):
            return fetch.outcome
        raise fetch.outcome if fetch.outcome is not None else ConfigError("the batch was cancelled")

    def drop(self, fetch: BatchFetch) -> None:
        """Fetch it no longer, and release what came of it. Idempotent."""
        with self.changed:
            fetch.is_dropped = True
            outcome, fetch.outcome = fetch.outcome, None
            if fetch in self._running:
                self._running.discard(fetch)
                self._core.reactor.submit(fetch.abandon)
        if isinstance(outcome, Batch):
            outcome.release()

    def discard(self, losses: Sequence[Loss]) -> None:
        """Have discarded what of these may still lie in its slot."""
        self._core.reactor.submit(partial(self._discard, losses))

    def statistics(self) -> ClientStatistics:
        """Counts of the client."""
        found: list[ClientStatistics] = []
        seen = threading.Event()

        def look() -> None:  # in the thread that has the link
            found.append(self._core.statistics())
            seen.set()

        self._core.reactor.submit(look)
        while self._thread.is_alive() and not seen.wait(_LOOK_S):
            pass
        return found[0] if found else self._core.statistics()

    def close(self) -> None:
        """Give up what is on its way, take leave of the servers, end the thread. Idempotent, bounded."""
        with self.changed:
            self.closed = True
            self.changed.notify_all()
        self._core.reactor.submit(self._stop)
        self._thread.join(_JOIN_TIMEOUT_S)

    def _require_open(self) -> None:
        if self.closed:
            raise ConfigError("the prefetcher is closed; make another")

    # --- in the thread itself -----------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._turn()
        except Exception as error:  # noqa: BLE001 - the edge of a thread: those who wait hear that it is closed
            _log.error("prefetcher_failed", reason=f"{type(error).__name__}: {error}")
        finally:
            self.closed = True
            self._each_running(BatchFetch.abandon)
            if self._uploader is not None:
                self._uploader.close()  # before the core, which frees the buffers that come back
            self._core.close()

    def _turn(self) -> None:
        try:
            self._core.reactor.run_once(math.inf)
        except Exception as error:
            if not self._each_running(partial(BatchFetch.fail, error=error)):
                raise

    def _stop(self) -> None:
        self._stopping = True

    def _each_running(self, end: Callable[[BatchFetch], None]) -> int:
        with self.changed:
            running = list(self._running)
            self._running.clear()
            self.changed.notify_all()
        for fetch in running:
            end(fetch)
        return len(running)

    def _came(self, fetch: BatchFetch, outcome: Batch | Exception) -> None:
        if isinstance(outcome, Batch):
            self._discard(outcome.losses)
        with self.changed:
            self._running.discard(fetch)
            if not fetch.is_dropped and not self.closed:
                fetch.outcome = outcome
                self.changed.notify_all()
                return
        if isinstance(outcome, Batch):
            outcome.release()  # whose episodes were counted as lost

    def _discard(self, losses: Sequence[Loss]) -> None:
        refs = discardable_of(losses, discard_lost=self._discard_lost)
        if refs:
            try:
                self._core.begin_discard(refs, self._discard_deadline_s)
            except TransportError as error:
                _log.warning("discard_failed", reason=f"{type(error).__name__}: {error}")
