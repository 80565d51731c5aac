"""The replica monitor: calls back once for each replica's death, and when none is left."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Protocol, Self

from ucxx_transport.logs import get_logger

_log = get_logger(__name__)


class ReplicaFeed(Protocol):
    """What reports arrivals and departures: a `SourceWatcher`, a `RankGroup`; `Any` is a record of the one's kind."""

    def subscribe(self, *, on_add: Callable[[Any], None], on_remove: Callable[[Any], None]) -> Callable[[], None]: ...


class ReplicaMonitor:
    """Calls back when a replica is gone, and when all are. Thread-safe.

    A replica that was never there is never gone: before the first has registered nothing fires. One that registers
    again is alive again, and its next death is another one.

    The callbacks run one at a time, in order, under no lock. With a `feed` they run in a thread of their own, and a
    slow one delays nobody else. Fed by hand they run in the thread that brings the news, or in that of another which is
    just calling back; a name that dies again before its death was reported is reported once. An exception is logged and
    goes no further.

    Args:
        on_dead: called with the name of each replica that is gone.
        on_all_gone: called, after that, when none is left.
        feed: a `SourceWatcher`, whose replicas are worker ids, or a `RankGroup`, whose are ranks: followed from now on
            until `close`. None: `added` and `removed` are called by hand.
    """

    def __init__(
        self,
        *,
        on_dead: Callable[[Hashable], object] = lambda _: None,
        on_all_gone: Callable[[], object] = lambda: None,
        feed: ReplicaFeed | None = None,
    ) -> None:
        self._on_dead, self._on_all_gone = on_dead, on_all_gone
        self._lock = threading.Lock()
        self._alive: set[Hashable] = set()
        self._due: OrderedDict[tuple[Hashable, ...], None] = OrderedDict()  # deaths as (name,), "all are gone" as ()
        self._is_calling = False
        self._unsubscribe: Callable[[], None] = lambda: None
        if feed is not None:
            self._unsubscribe = feed.subscribe(
                on_add=lambda replica: self.added(_name_of(replica)),
                on_remove=lambda replica: self.removed(_name_of(replica)),
            )

    @property
    def alive(self) -> frozenset[Hashable]:
        """The names of those that are there."""
        with self._lock:
            return frozenset(self._alive)

    def added(self, name: Hashable) -> None:
        """A replica has registered, or again."""
        with self._lock:
            self._alive.add(name)

    def removed(self, name: Hashable) -> None:
        """A replica is gone; one that is not there is none."""
        with self._lock:
            if name not in self._alive:
                return
            self._alive.remove(name)
            self._due[name,] = None
            if not self._alive:
                self._due[()] = None
                self._due.move_to_end(())  # after the deaths
            if self._is_calling:
                return  # the thread that is calling back sees to these too
            self._is_calling = True
        self._call_back()

    def _call_back(self) -> None:
        while True:
            with self._lock:
                if not self._due:
                    self._is_calling = False
                    return
                due, _ = self._due.popitem(last=False)
            try:
                if due:
                    self._on_dead(due[0])
                elif not self.alive:  # else one has come back before this could be reported
                    self._on_all_gone()
            except Exception:  # noqa: BLE001 - the application's trouble: the next death is reported all the same
                _log.exception("replica_callback_failed")

    def close(self) -> None:
        """Follow the feed no longer. Idempotent."""
        self._unsubscribe()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _name_of(replica: Any) -> Hashable:
    name: Hashable = getattr(replica, "worker_id", None) or replica.rank
    return name
