"""The publisher: a worker in the store, for as long as it lives.

```
            start            visible             bound
 NEW ──────► PUBLISHING ──────► STARTING ──────► LIVE ⇄ UNWELL
                ▲  │ refused, a rival,             │
                │  └────────► FAILED               │ lease lost, store wiped, record gone
                └──────────────────────────────────┘
 stop, from anywhere: STOPPED
```
"""

from __future__ import annotations

import atexit
import os
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from enum import Enum
from typing import Any, Final

from ucxx_transport import errors
from ucxx_transport.backoff import random_pause_s
from ucxx_transport.config import PublisherConfig, StoreConfig, checked_seconds
from ucxx_transport.logs import get_logger
from ucxx_transport.machine import LOOK_S, start_thread
from ucxx_transport.membership.entries import source_key
from ucxx_transport.membership.renewal import RETRIES_AN_INTERVAL, Keeper
from ucxx_transport.membership.sources import Publication, RingSource, SourceRecord, SourceStatus, next_epoch
from ucxx_transport.membership.store import Store
from ucxx_transport.membership.store_url import open_store
from ucxx_transport.settings import check_can, made_of
from ucxx_transport.teardown import Running, may_end, refuse_forked

_log = get_logger(__name__)

LOOK_EVERY: Final = 5
"""Every so many intervals the record itself is looked for: a lease that lives does not prove it is there."""
HEALTHY_S: Final = 3.0  # at least: a port's loop shows once a second that it turns
_LOSSES: Final = (errors.LeaseLostError, errors.ConflictError, errors.StoreResetError)
_HOPELESS: Final = (errors.StorePermissionError, errors.DuplicateSourceError, errors.ConfigError, errors.ProtocolError)


class PublisherState(Enum):
    """Where a publisher is; see the module's picture."""

    NEW = "new"
    PUBLISHING = "publishing"
    STARTING = "starting"
    LIVE = "live"
    UNWELL = "unwell"
    FAILED = "failed"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True, kw_only=True)
class PublisherStatistics:
    """What a publisher has done, as of one moment.

    Attributes:
        epoch: the last one, 0 before the first.
        attempts: to publish, of which `publications` have succeeded.
        losses: publications that ended unasked.
        outages: times that the store stopped answering.
        keeper_restarts: of the process that renews the lease.
        keeper_keeps: whether it does; its start takes a second, and so long the publisher's thread renews.
    """

    state: PublisherState = PublisherState.NEW
    epoch: int = 0
    attempts: int = 0
    publications: int = 0
    losses: int = 0
    outages: int = 0
    keeper_restarts: int = 0
    keeper_keeps: bool = False


_PUBLIC: Final = {PublisherState.LIVE, PublisherState.UNWELL}


class HeartbeatPublisher(Running):
    """Publishes a worker under a lease and keeps it there. Start it, stop it; or use `with` or `async with`.

    A read that comes before the worker has its epoch is answered NOT_READY. When the lease is lost, since the worker
    was stopped or the store wiped, it publishes again under a larger epoch, and what was written under the old one is
    discarded: trainers were notified that it is gone.

    ```python
    with UCXXServer(ring) as server, HeartbeatPublisher("local://", "worker-0", server) as publisher:
        publisher.wait_published(timeout_s=30)
        ...
    ```

    Args:
        store: the store or its URL; None: `store.url`. One that is not given itself is opened and closed by the
            publisher.
        worker_id: this worker's name in the job, 1 to 128 printable characters.
        source: what is published: a `UCXXServer`, or a `RingSource` without one.
        config: settings, a dict or a `PublisherConfig`.
        store_config: settings of a store that is opened here, a dict or a `StoreConfig`.
        meta: what else the record holds, JSON values.
        clock: monotonic seconds.

    Attributes:
        worker_id: this worker's name in the job.
        error: why it has FAILED, or the store's last answer while that cannot be published to.

    Raises:
        ConfigError: the worker id, the URL, a setting or `meta` is wrong.
    """

    def __init__(
        self,
        store: Store | str | None,
        worker_id: str,
        source: RingSource,
        config: PublisherConfig | Mapping[str, object] | None = None,
        *,
        store_config: StoreConfig | Mapping[str, object] | None = None,
        meta: Mapping[str, object] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = made_of(PublisherConfig, config, "config")
        settings = made_of(StoreConfig, store_config, "store_config")
        self.worker_id = worker_id
        check_can(source, "offer", "source", "a UCXXServer")
        self._source = source
        self._clock = clock
        session, first = secrets.token_hex(16), SourceStatus.STARTING
        self._record = SourceRecord(
            worker_id=worker_id, epoch=1, session=session, status=first, meta=meta or {}, **asdict(source.offer())
        )
        self._record.to_bytes()  # refused here rather than in the thread
        self._owns_store = store is None or isinstance(store, str)
        self._store = open_store(store, settings) if store is None or isinstance(store, str) else store
        check_can(self._store, "grant", "store", "a store or its URL")
        self._rival: dict[int | None, float] = {}  # another's lease, and since when it is seen
        self._publication: Publication | None = None
        self._keeper = Keeper(self._store, self._config)
        # Both reentrant: a signal handler may stop what is just being stopped.
        self._changed, self._stop_lock = threading.Condition(threading.RLock()), threading.RLock()
        self._now = PublisherStatistics()
        self.error: errors.TransportError | None = None
        self._stopping = self._is_away = False
        self._turn, self._late_s = 0, 0.0  # of this try to publish: counted, and when it is overdue
        self._thread: threading.Thread | None = None
        self._pid = os.getpid()

    @property
    def state(self) -> PublisherState:
        """Where it is now."""
        return self.statistics().state

    @property
    def epoch(self) -> int:
        """The epoch published last; 0 before the first."""
        return self.statistics().epoch

    def start(self) -> None:
        """Hold back the source until it has its epoch, and publish it from a thread; returns at once.

        Raises:
            ConfigError: it was started before, or the interpreter is exiting.
        """
        refuse_forked(self._pid, "HeartbeatPublisher")
        if self.state is not PublisherState.NEW:
            raise errors.ConfigError("this publisher was started before; make another")
        try:
            self._keeper.start(self._source.sidecar)
            self._source.hold()
            self._change(PublisherState.PUBLISHING)
            self._thread = start_thread(self._run, name="ucxx-publisher")
        except BaseException:
            self.stop()
            raise
        atexit.register(self.stop)

    def wait_published(self, timeout_s: float | str) -> int:
        """Wait until the source is published and serves; returns its epoch.

        Raises:
            DeadlineExceededError: not within `timeout_s`; its facts have the store's answer.
            TransportError: the publisher has failed for good, and why.
            ConfigError: it was stopped, or not started; or `timeout_s` is no finite duration.
        """
        refuse_forked(self._pid, "HeartbeatPublisher")
        until_s = self._clock() + checked_seconds(timeout_s, "timeout_s")
        with self._changed:
            while True:
                if self.state is PublisherState.LIVE:
                    return self.epoch
                if self.state is PublisherState.FAILED and self.error is not None:
                    raise self.error
                if self.state in {PublisherState.NEW, PublisherState.STOPPED}:
                    raise errors.ConfigError(f"the publisher is {self.state.value}; start() it, or a new one")
                left_s = until_s - self._clock()
                if left_s <= 0:
                    message = "the source was not published in time"
                    raise errors.DeadlineExceededError(message, store=self._store.url, reason=str(self.error))
                self._changed.wait(min(left_s, LOOK_S))

    def stop(self) -> None:
        """Take the source out of the store. Bounded by `stop_timeout_s`; idempotent.

        First nothing is published any more, then the record is "stale", then it goes. Stop the server after this. While
        the store does not answer, the publisher's thread goes on with that; the lease ends it at the latest.
        """
        if not may_end(self._pid):
            return
        with self._stop_lock:
            if self.state is PublisherState.STOPPED:
                return
            atexit.unregister(self.stop)
            with self._changed:
                self._stopping = True
                self._changed.notify_all()
            if self._thread is None:
                self._close()
            else:
                self._thread.join(self._config.stop_timeout_s)
                if self._thread.is_alive():
                    _log.warning("record_not_withdrawn", worker=self.worker_id, reason="the store does not answer")
            self._source.release()
            self._change(PublisherState.STOPPED)

    def statistics(self) -> PublisherStatistics:
        """Counts since it was made."""
        refuse_forked(self._pid, "HeartbeatPublisher")
        return replace(self._now, keeper_restarts=self._keeper.host.restarts, keeper_keeps=self._keeper.keeps)

    def _change(
        self, state: PublisherState | None = None, error: errors.TransportError | None = None, **values: Any
    ) -> None:
        """Another state, error and counts, all at once. A publisher that has stopped stays so."""
        with self._changed:
            if state is not None and self.state is not PublisherState.STOPPED:
                values["state"] = state
            if state is not None or error is not None:
                self.error = error
            self._now = replace(self._now, **values)
            self._changed.notify_all()

    def _stops_within(self, seconds: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self._stopping, seconds)

    # the thread: a turn tries to publish the record, or renews what is published

    def _run(self) -> None:
        pause_s, self._late_s = 0.0, self._clock() + self._config.publish_timeout_s
        try:
            while not self._stops_within(pause_s):
                self._turn += 1
                try:
                    if self.state in _PUBLIC:
                        self._attend()
                    else:
                        self._publish()
                    pause_s, self._is_away = self._config.interval_s, False
                except errors.TransportError as error:
                    pause_s = self._take_failure(error)
        except Exception as error:  # noqa: BLE001 - the edge of a thread: those who wait must hear of it
            reason = error
            if not isinstance(reason, errors.TransportError):
                _log.exception("publisher_died", worker=self.worker_id)
                reason = errors.TransportError(f"{type(error).__name__}: {error}")
            _log.error("publisher_failed", worker=self.worker_id, store=self._store.url, reason=str(reason))
            self._revoke()
            self._change(PublisherState.FAILED, reason)
        if (publication := self._publication) is not None:
            try:
                publication.withdraw(self._config.stop_timeout_s)
            except errors.TransportError as error:
                _log.warning("record_not_withdrawn", worker=self.worker_id, reason=str(error))
        self._close()
        if self.state is PublisherState.STOPPED:  # the stop has not waited, and this thread has held the source since
            self._source.release()

    def _close(self) -> None:
        self._keeper.close()
        if self._owns_store:
            self._store.close()

    def _publish(self) -> None:
        """Make the record visible, and have the source serve."""
        self._change(attempts=self._now.attempts + 1)
        publication = self._visible()
        if not self._stopping:
            self._source.bind()
            publication.update(SourceStatus.READY, self._source.offer())
            self._change(PublisherState.LIVE, publications=self._now.publications + 1)

    def _attend(self) -> None:
        """Renew the lease, and see that the record says what is so."""
        publication = self._visible()
        if is_healthy := self._source.is_healthy(max(2 * self._config.interval_s, HEALTHY_S)):
            state, is_new = PublisherState.LIVE, publication.update(SourceStatus.READY, self._source.offer())
        else:  # it may be closed, and offer nothing
            state, is_new = PublisherState.UNWELL, publication.update(SourceStatus.STALE)
        if is_new and state is not self.state:
            _log.warning("source_health_changed", worker=self.worker_id, is_healthy=is_healthy)
            self._change(state)
        self._source.discard_old()
        if self._turn % LOOK_EVERY == 0:
            publication.require_there()

    def _take_failure(self, error: errors.TransportError) -> float:
        """What follows from a turn that has failed: the pause before the next; raises what none can heal."""
        config = self._config
        if self._stopping:
            return 0.0
        if self._publication is not None and isinstance(error, _LOSSES):
            self._source.hold()
            self._change(PublisherState.PUBLISHING, error, losses=self._now.losses + 1)
            _log.warning("lease_lost", worker=self.worker_id, epoch=self.epoch, reason=str(error))
            self._revoke()
            self._turn, self._late_s = 0, self._clock() + config.publish_timeout_s
            return random_pause_s(1, first_s=config.backoff_s, longest_s=config.max_backoff_s)
        if self.state in _PUBLIC:
            if not self._is_away:
                self._change(outages=self._now.outages + 1)
                _log.warning("store_unreachable", worker=self.worker_id, reason=str(error))
            self._is_away = True
            return config.interval_s / RETRIES_AN_INTERVAL
        left_s = self._late_s - self._clock()
        if isinstance(error, _HOPELESS) or (left_s <= 0 and config.on_timeout == "stop"):
            raise error
        self._change(error=error)
        if left_s <= 0:
            _log.error("source_not_published", worker=self.worker_id, reason=str(error), attempt=self._turn)
        elif self._turn == 1:
            _log.warning("source_not_published", worker=self.worker_id, reason=str(error), attempt=self._turn)
        # a rival's record ends any moment
        longest_s = min(config.max_backoff_s, config.interval_s / 4) if self._rival else config.max_backoff_s
        pause_s = random_pause_s(self._turn, first_s=config.backoff_s, longest_s=longest_s)
        return min(pause_s, left_s) if left_s > 0 else pause_s

    def _visible(self) -> Publication:
        """The record under its lease, which is renewed, or granted where there is none."""
        if (publication := self._publication) is not None:
            publication.renew()
            return publication
        self._yield_to_rival()
        epoch = next_epoch(self._store, self.worker_id, known=self.epoch)
        record = replace(self._record, epoch=epoch, **asdict(self._source.offer()))
        # from here on there is something to withdraw, whatever happens
        self._publication = publication = Publication(self._store, record, ttl_s=self._config.ttl_s)
        self._change(PublisherState.STARTING, epoch=epoch)
        self._keeper.keep(publication.lease.lease_id)
        return publication

    def _yield_to_rival(self) -> None:
        """Raise a ConflictError while another worker has this id, a DuplicateSourceError once it cannot be dead."""
        key, ttl_s = source_key(self.worker_id), self._config.ttl_s
        rival, self._rival = self._rival, {}  # where the store does not answer, its lease may be given more time
        if (entry := self._store.get(key)) is None:
            return
        with suppress(errors.ProtocolError):
            found = SourceRecord.from_bytes(entry.value)
            ttl_s = max(ttl_s, found.ttl_s)
            if found.session == self._record.session:  # it was written, the answer lost
                self._store.delete(key, expected=entry.revision)
                return
        now = self._clock()
        self._rival = {entry.lease_id: rival.get(entry.lease_id, now)}
        if now - self._rival[entry.lease_id] > 2 * ttl_s + 1.0:
            text = f"another live worker is published as {self.worker_id!r}; give each worker an id of its own"
            raise errors.DuplicateSourceError(text, worker_id=self.worker_id)
        raise errors.ConflictError("a worker of this id is still in the store", worker_id=self.worker_id)

    def _revoke(self) -> None:
        self._keeper.keep(None)
        publication, self._publication = self._publication, None
        if publication is not None:
            with suppress(errors.TransportError):
                self._store.revoke(publication.lease.lease_id)
