"""The watcher: which sources there are, kept up to date by a thread.

| what happens to the store            | what the watcher does                                                        |
|--------------------------------------|------------------------------------------------------------------------------|
| it cannot be reached                 | keeps what it knows: a store that is away is no dead source; retries         |
| the stream breaks                    | watches again after the last whole batch                                     |
| the changes since then are compacted | takes a snapshot and notifies of the difference                              |
| it was reset: wiped, or another one  | takes a snapshot; those missing have `reset_grace_s` to be published again   |
| it refuses the user                  | reports it (`error`), retries in case that the rights are mended             |
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Final

from ucxx_transport import errors
from ucxx_transport.backoff import random_pause_s
from ucxx_transport.config import checked_seconds
from ucxx_transport.logs import get_logger
from ucxx_transport.machine import LOOK_S, start_thread
from ucxx_transport.membership.entries import SOURCES
from ucxx_transport.membership.listeners import Listeners
from ucxx_transport.membership.sources import SourceChange, SourceRecord, SourceStatus, SourceView
from ucxx_transport.membership.store import Store, Watch
from ucxx_transport.membership.store_url import open_store
from ucxx_transport.settings import check_can
from ucxx_transport.teardown import Running, may_end, refuse_forked

_log = get_logger(__name__)

RESET_GRACE_S: Final = 10.0
"""A wiped store's sources notice it with their next renewal, 2 s, and publish themselves again: five times that."""
_TURN_S: Final = 0.5
"""How long one look at the watch takes at most: a stop is noticed after that even if the store's client is stuck."""
_FIRST_PAUSE_S: Final = 0.05
_MOST_PAUSE_S: Final = 2.0

Listener = Callable[[SourceRecord], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class WatcherStatistics:
    """What a watcher has seen, as of one moment: the sources known now, and how often some came, changed and went.

    Attributes:
        resyncs: snapshots taken.
        resets: stores found wiped.
        failures: calls and watches that the store did not answer.
        malformed: records that are none.
        listener_errors: exceptions of listeners, and of reports.
        listener_overflows: full queues of slow listeners, shortened to the changes that last.
        synced: whether what is known is up to date, as far as the store's last answer goes.
    """

    sources: int = 0
    adds: int = 0
    updates: int = 0
    removes: int = 0
    resyncs: int = 0
    resets: int = 0
    failures: int = 0
    malformed: int = 0
    listener_errors: int = 0
    listener_overflows: int = 0
    synced: bool = False


class SourceWatcher(Running):
    """Follows the sources of a store. Thread-safe; `start` it and `stop` it, or use `with` or `async with`.

    ```python
    with SourceWatcher("local://") as watcher:
        watcher.wait_for(2, timeout_s=60)
        for source in watcher.sources():
            print(source.worker_id, source.host, source.ports)
    ```

    Each listener is called in a thread of its own, in the order of the changes, under no lock: one that is slow, or
    blocks, delays neither the watcher nor another listener. One that raises is logged. It may call everything here but
    `wait_for`; a `stop` in it does not wait for it.

    Args:
        store: the store or its URL; None: `store.url`. One that is not given itself is opened and closed by the
            watcher.
        on_add: called with every source that appears, those there at the start too.
        on_update: called when a source's address or status changes.
        on_remove: called with every source that ends, and with the old epoch of one that came back with a new one.
        reset_grace_s: how long the sources of a wiped store count as known.
        clock: monotonic seconds.

    Attributes:
        error: what keeps the watcher from the store now; None while all is well.
    """

    def __init__(
        self,
        store: Store | str | None = None,
        *,
        on_add: Listener | None = None,
        on_update: Listener | None = None,
        on_remove: Listener | None = None,
        reset_grace_s: float | str = RESET_GRACE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._owns_store = store is None or isinstance(store, str)
        self._store = open_store(store) if store is None or isinstance(store, str) else store
        check_can(self._store, "grant", "store", "a store or its URL")
        self._reset_grace_s = checked_seconds(reset_grace_s, "reset_grace_s")
        self._clock = clock
        self._changed = threading.Condition()
        self._view = SourceView()
        self._listeners: Listeners[SourceRecord] = Listeners(
            self._changed, lambda: self._view.sources, self._count_listener, keys={"store": self._store.url}
        )
        self._reports: tuple[Callable[[SourceChange], object], ...] = ()
        self._counts: Counter[str] = Counter()
        self._revision: int | None = None
        self._identity, self._grace_s, self._failures = "", 0.0, 0
        self.error: errors.RegistryError | None = None
        self._stopping = threading.Event()
        self._watch: Watch | None = None
        self._thread: threading.Thread | None = None
        self._pid = os.getpid()
        if on_add or on_update or on_remove:
            self.subscribe(on_add=on_add, on_update=on_update, on_remove=on_remove)

    def start(self) -> None:
        """Begin to follow, and return at once; `wait_for` waits for sources.

        Raises:
            ConfigError: it was started before, or this is a forked child.
        """
        refuse_forked(self._pid, "SourceWatcher")
        with self._changed:
            if self._thread is not None:
                raise errors.ConfigError("this watcher was started before; make another")
            self._thread = start_thread(self._run, name="ucxx-watcher")

    def stop(self) -> None:
        """End. What is known stays readable. Idempotent, and bounded by the store's `timeout_s`.

        Listeners have a second for the news that they have not heard; one that blocks is left to its daemon thread, and
        called no more.
        """
        if not may_end(self._pid):
            return
        self._stopping.set()
        with self._changed:
            self._changed.notify_all()
        if self._watch is not None:
            self._watch.close()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        self._listeners.close()
        if self._owns_store:
            self._store.close()

    def subscribe(
        self, *, on_add: Listener | None = None, on_update: Listener | None = None, on_remove: Listener | None = None
    ) -> Callable[[], None]:
        """Call these on changes; `on_add` with the sources known already, in this thread, before this returns.

        Returns:
            What ends it: no callback begins after that; one under way is not waited for.
        """
        refuse_forked(self._pid, "SourceWatcher")
        return self._listeners.subscribe({"add": on_add, "update": on_update, "remove": on_remove})

    def report_to(self, report: Callable[[SourceChange], object]) -> Callable[[], None]:
        """Call this with every change, and now with the sources known, before any listener hears, and under a lock.

        For what must know no later than a listener, as a client must from which one reads: it never waits. What is
        returned ends it.
        """
        refuse_forked(self._pid, "SourceWatcher")

        def end() -> None:
            with self._changed:
                self._reports = tuple(one for one in self._reports if one is not report)

        with self._changed:
            for source in self._view.sources:
                report(SourceChange("add", source))
            self._reports += (report,)
        return end

    def sources(self, *, status: SourceStatus | None = SourceStatus.READY) -> tuple[SourceRecord, ...]:
        """The sources known now, by worker id: those of `status`, or all with None."""
        refuse_forked(self._pid, "SourceWatcher")
        with self._changed:
            return tuple(record for record in self._view.sources if status is None or record.status is status)

    def wait_for(self, n: int, timeout_s: float | str) -> tuple[SourceRecord, ...]:
        """Wait until at least `n` sources are ready.

        Returns:
            Those that are.

        Raises:
            DeadlineExceededError: fewer within `timeout_s`.
            ConfigError: the watcher is stopped or was not started, or a listener calls this; or `timeout_s` is no
                finite duration.
        """
        refuse_forked(self._pid, "SourceWatcher")
        self._listeners.refuse_in_callback("wait_for()")
        timeout_s = checked_seconds(timeout_s, "timeout_s")
        until_s = self._clock() + timeout_s
        with self._changed:
            if self._thread is None:
                raise errors.ConfigError("start() the watcher first")
            while True:
                if len(ready := self.sources()) >= n:
                    return ready
                if self._stopping.is_set():
                    raise errors.ConfigError("the watcher was stopped; make another")
                left_s = until_s - self._clock()
                if left_s <= 0:
                    raise errors.DeadlineExceededError(
                        f"{len(ready)} of {n} sources were ready in time; is each worker's publisher started, with "
                        "this store and namespace?",
                        store=self._store.url,
                        timeout_s=timeout_s,
                        store_error="none" if self.error is None else str(self.error),
                    )
                self._changed.wait(min(left_s, LOOK_S))

    def statistics(self) -> WatcherStatistics:
        """Counts since it was made."""
        refuse_forked(self._pid, "SourceWatcher")
        with self._changed:
            known, malformed = len(self._view.sources), self._view.malformed
            synced = self.error is None and self._counts["resyncs"] > 0
            return WatcherStatistics(sources=known, malformed=malformed, synced=synced, **self._counts)

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._listeners.retry()
            try:
                self._follow()
            except (errors.CompactedError, errors.StoreResetError) as error:
                self._revision = None
                is_reset = isinstance(error, errors.StoreResetError)
                self._grace_s = self._reset_grace_s if is_reset else self._grace_s
                self._note(error, resets=int(is_reset))
            except errors.TransportError as error:
                if self._stopping.is_set():
                    return  # its own watch, closed by `stop`
                self._failures += 1
                self._note(error, failures=1)
                self._stopping.wait(random_pause_s(self._failures, first_s=_FIRST_PAUSE_S, longest_s=_MOST_PAUSE_S))
            except Exception as error:  # noqa: BLE001 - the edge of a thread: a watcher that dies in silence hides every death
                _log.exception("watcher_failed", store=self._store.url)
                self._revision = None
                self._note(errors.RegistryError(f"{type(error).__name__}: {error}"), failures=1)
                self._stopping.wait(_MOST_PAUSE_S)

    def _follow(self) -> None:
        if self._revision is None:
            found = self._store.snapshot(SOURCES)
            self._apply(partial(self._view.take_snapshot, found, now=self._clock(), grace_s=self._grace_s), resyncs=1)
            self._revision, self._identity, self._grace_s = found.revision, found.identity, 0.0
        with self._store.watch(SOURCES, after=self._revision, identity=self._identity) as self._watch:
            while not self._stopping.is_set():
                batch = self._watch.next(_TURN_S)
                self._apply(partial(self._view.expire, self._clock()))
                if batch is not None:
                    self._apply(partial(self._view.take_batch, batch))
                    self._revision = batch.revision
                self._failures = 0
                self._listeners.retry()

    def _apply(self, change: Callable[[], list[SourceChange]], **counts: int) -> None:
        """Change what is known, its counts and what the listeners are to hear at once."""
        with self._changed:
            changes = change()
            self._counts.update(counts)
            self._counts.update(f"{one.kind}s" for one in changes)
            self.error = None
            for one, report in product(changes, self._reports):
                try:
                    report(one)
                except Exception:  # noqa: BLE001 - what is known has changed: all others are to hear of it
                    self._listeners.failed(one.kind, one.record)
            self._listeners.put(changes)
            self._changed.notify_all()

    def _count_listener(self, what: str) -> None:
        with self._changed:
            self._counts[f"listener_{what}"] += 1

    def _note(self, error: errors.TransportError, **counts: int) -> None:
        new = error if isinstance(error, errors.RegistryError) else errors.RegistryError(str(error))
        with self._changed:
            known, self.error = self.error, new
            self._counts.update(counts)
        if type(known) is not type(new):
            _log.warning("store_not_followed", store=self._store.url, reason=str(error))
