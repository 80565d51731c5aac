"""HeartbeatPublisher: a worker in the store, for as long as it lives."""

from __future__ import annotations

import atexit
import os
import select
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Self

from ucxx_transport.config import PublisherConfig, StoreConfig
from ucxx_transport.errors import ConfigError, TransportError
from ucxx_transport.membership.publishable import Publishable
from ucxx_transport.membership.publisher_board import PublisherBoard, PublisherState, PublisherStatistics
from ucxx_transport.membership.publishing import Publishing
from ucxx_transport.membership.renewal import Renewal, renewal_of
from ucxx_transport.membership.store import Store
from ucxx_transport.membership.store_url import open_store


class HeartbeatPublisher:
    """Publishes a worker under a lease and keeps it there. Start it, stop it; or use `with`.

    A read that comes before the worker has its epoch is answered NOT_READY. When the lease is lost, since the worker
    was stopped or the store wiped, it publishes anew under a larger epoch, and what was written under the old one is
    discarded: trainers were told that it is gone.

    ```python
    with UCXXServer(ring) as server, HeartbeatPublisher("local://", "worker-0", server) as publisher:
        publisher.wait_published(timeout_s=30)
        ...
    ```

    Args:
        store: the store or its URL. One given as a URL is opened and closed by the publisher.
        worker_id: this worker's name in the job, 1 to 128 printable characters.
        source: what is published: a `UCXXServer`, or a `RingSource` without one.
        config: settings.
        store_config: settings of the store.
        meta: what else the record says, JSON values.
        clock: monotonic seconds.

    Raises:
        ConfigError: the worker id, the URL or `meta` is wrong.
    """

    def __init__(
        self,
        store: Store | str,
        worker_id: str,
        source: Publishable,
        config: PublisherConfig | None = None,
        *,
        store_config: StoreConfig | None = None,
        meta: Mapping[str, object] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config if config is not None else PublisherConfig()
        store_config = store_config if store_config is not None else StoreConfig()
        self._worker_id = worker_id
        self._source = source
        self._owns_store = isinstance(store, str)
        self._store: Store = open_store(store, store_config) if isinstance(store, str) else store
        self._board = PublisherBoard(clock)
        self._keeper: Renewal | None = None
        if self._config.keeper == "process":
            interval_s = self._config.interval_s
            self._keeper = renewal_of(self._store, store_config, interval_s, host=source.sidecar, on_news=self._wake_up)
        self._stopping = threading.Event()
        try:
            self._publishing = Publishing(
                self._store,
                worker_id,
                source,
                self._config,
                meta=meta or {},
                board=self._board,
                keeper=self._keeper,
                pause=self._pause,
                stopping=self._stopping.is_set,
                clock=clock,
            )
        except TransportError:
            if self._owns_store:
                self._store.close()
            raise
        self._wake: tuple[int, int] | None = None
        self._thread = threading.Thread(target=self._run, name="ucxx-publisher", daemon=True)
        # Reentrant: a signal handler may stop what is just being stopped.
        self._ending, self._stop_lock = threading.RLock(), threading.RLock()
        self._thread_has_ended = True
        self._pid = os.getpid()

    @property
    def worker_id(self) -> str:
        """This worker's name in the job."""
        return self._worker_id

    @property
    def state(self) -> PublisherState:
        """Where it is now."""
        return self._board.state

    @property
    def epoch(self) -> int:
        """The epoch published last; 0 before the first."""
        return self._board.epoch

    @property
    def error(self) -> TransportError | None:
        """Why it has FAILED, or what the store said last while it does not let itself be published to."""
        return self._board.error

    def start(self) -> None:
        """Hold back the source until it has its epoch, and publish it from a thread; returns at once.

        Raises:
            ConfigError: it was started before.
        """
        if self.state is not PublisherState.NEW:
            raise ConfigError("this publisher was started before; make another")
        if self._keeper is not None:
            self._keeper.start()
        self._source.hold()
        self._board.enter(PublisherState.PUBLISHING)
        self._wake = os.pipe()
        self._thread_has_ended = False
        self._thread.start()
        atexit.register(self.stop)

    def wait_published(self, timeout_s: float) -> int:
        """Wait until the source is published and serves; returns its epoch.

        Raises:
            DeadlineExceededError: not within `timeout_s`; says what the store answers.
            TransportError: the publisher has failed for good, and why.
            ConfigError: it was stopped, or not started.
        """
        return self._board.wait_live(timeout_s, self._store.url)

    def stop(self) -> None:
        """Take the source out of the store. Bounded by `stop_timeout_s`; idempotent.

        First no more is published, then the record says "stale", then it goes. Stop the server after this.
        """
        if os.getpid() != self._pid:
            return  # a forked child's copy: the record is its parent's
        with self._stop_lock:
            if self.state is not PublisherState.STOPPED:
                self._stop()

    def _stop(self) -> None:
        atexit.unregister(self.stop)
        until_s = time.monotonic() + self._config.stop_timeout_s
        self._stopping.set()
        if self._wake is not None:
            os.write(self._wake[1], b"s")
            self._thread.join(self._config.stop_timeout_s / 2)
        self._publishing.withdraw(max(0.1, until_s - time.monotonic()))
        with self._ending:
            self._source.release()
            self._board.enter(PublisherState.STOPPED)
            is_last = self._thread_has_ended
        if is_last:
            self._let_go()

    def statistics(self) -> PublisherStatistics:
        """Counts since it was made."""
        keeper = self._keeper
        return self._board.statistics(
            keeper_restarts=0 if keeper is None else keeper.restarts,
            keeper_keeps=keeper is not None and keeper.is_kept,
        )

    def __enter__(self) -> Self:
        """Start."""
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop."""
        self.stop()

    def _run(self) -> None:
        self._publishing.run()
        if self._keeper is not None and not self._stopping.is_set():
            self._keeper.close()  # it has failed: nothing is left to keep
        with self._ending:
            self._thread_has_ended = True
            is_last = self.state is PublisherState.STOPPED
        if is_last:  # it hung in the store, and what it has written there since is nobody's but its own
            self._publishing.withdraw(self._config.stop_timeout_s)
            self._source.release()
            self._let_go()

    def _let_go(self) -> None:
        """Close what `stop` and the thread need: whichever of them ends last."""
        if self._keeper is not None:
            self._keeper.close()
        wake, self._wake = self._wake, None
        for descriptor in wake or ():
            os.close(descriptor)
        if self._owns_store:
            self._store.close()

    def _pause(self, seconds: float) -> None:
        assert self._wake is not None
        watched = select.poll()
        watched.register(self._wake[0], select.POLLIN)
        if watched.poll(seconds * 1000) and not self._stopping.is_set():
            os.read(self._wake[0], 64)

    def _wake_up(self) -> None:
        with self._ending:
            if self._wake is not None:
                os.write(self._wake[1], b"w")
