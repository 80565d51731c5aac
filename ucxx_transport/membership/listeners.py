"""Listeners: callbacks of the application, each with a queue of its own, called under no lock of ours.

| what happens               | what follows                                                                        |
|----------------------------|-------------------------------------------------------------------------------------|
| news                       | goes into the queue of each listener of its kind; who brings it never waits         |
| a queue is no longer empty | a daemon thread calls back, in order, one at a time, and ends when it is empty      |
| a listener subscribes      | it is called for what is known, in the subscriber's thread, before it has returned  |
| a callback raises          | logged and counted; the next one is called                                          |
| a thread cannot be started | logged; tried again with the next news, and at each `retry`                         |
| a queue is full            | what came and went meanwhile is left out of it, and each source's last news stay,   |
|                            | so nothing that lasts is missed; logged and counted                                 |
| a subscription is ended    | no further callback begins; one under way is not waited for                         |
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import product
from typing import Any, Final, Generic, Protocol, TypeVar

from ucxx_transport.errors import BusyError, ConfigError, TransportError
from ucxx_transport.logs import get_logger
from ucxx_transport.machine import start_thread
from ucxx_transport.teardown import Closing, not_in_forks, refuse_forked

_log = get_logger(__name__)

T = TypeVar("T")

QUEUE_LIMIT: Final = 4096
"""News that wait for one listener, 16 bytes each beside the records: four changes of each of a thousand sources."""

STOP_S: Final = 1.0
"""How long a stop waits for callbacks under way; one that blocks for ever is left to its daemon thread."""

ADD: Final = "add"
UPDATE: Final = "update"
REMOVE: Final = "remove"
_STATE: Final = frozenset((ADD, UPDATE, REMOVE))

Callbacks = Mapping[str, Callable[..., object] | None]


def name_of(replica: Any) -> Hashable:
    """The name of a worker, or a rank."""
    name: Hashable = replica.worker_id if hasattr(replica, "worker_id") else replica.rank
    return name


def identity_of(replica: Any) -> tuple[Hashable, Hashable]:
    """The name, and the life, in which two records of that name may differ."""
    return name_of(replica), replica.life if hasattr(replica, "life") else replica.incarnation


class _Subscription(Generic[T]):
    """One listener: its callbacks, and its news. All but `callbacks` under the lock of the owner."""

    def __init__(self, callbacks: Callbacks, limit: int) -> None:
        self.callbacks, self.limit = callbacks, limit
        wanted = {kind for kind, callback in callbacks.items() if callback is not None}
        self.kinds = wanted | _STATE if wanted & _STATE else wanted  # all changes of a state, of which some are merged
        self.queue: deque[tuple[str, T]] = deque()
        self.is_called = True  # first by who subscribes; then by a thread, or one is being started
        self.is_waiting = False  # for a thread, which could not be started


class Listeners(Generic[T]):
    """All listeners of one feed. Thread-safe; see the module.

    Args:
        changed: the feed's own condition: what is `known` changes under it.
        known: all records there are now, in order.
        count: called with "errors" or "overflows" at each of them.
    """

    def __init__(
        self,
        changed: threading.Condition,
        known: Callable[[], Iterable[T]],
        count: Callable[[str], object],
        *,
        keys: Mapping[str, object],
        limit: int = QUEUE_LIMIT,
    ) -> None:
        self._lock, self._known = changed, known
        self._count, self._keys, self._limit = count, keys, limit
        self._subscriptions: tuple[_Subscription[T], ...] = ()
        self._callers: list[int] = []  # threads inside a callback, as often as they are

    def subscribe(self, callbacks: Callbacks) -> Callable[[], None]:
        """Call these from now on, by kind of news; "add" for what is known, before this returns what ends it."""
        for kind, callback in callbacks.items():
            if callback is not None and not callable(callback):
                raise ConfigError(f"on_{kind} must be a function, not {callback!r}", field=f"on_{kind}")
        subscription = _Subscription[T](callbacks, self._limit)

        @not_in_forks
        def end() -> None:
            with self._lock:
                subscription.queue.clear()
                self._subscriptions = tuple(one for one in self._subscriptions if one is not subscription)
                self._lock.notify_all()

        try:
            with self._lock:
                known = list(self._known())
                subscription.queue.extend((ADD, record) for record in known)
                self._subscriptions += (subscription,)
            for _ in known:
                self._step(subscription)
            self._hand_over(subscription)
        except BaseException:  # an interrupt: who does not get its subscription must not be called
            end()
            raise
        return end

    def put(self, news: Iterable[tuple[str, T]]) -> None:
        """Give listeners the news of their kinds, as one change; in the lock under which what is known has changed."""
        overflows: list[int] = []
        with self._lock:
            for one, (kind, record) in product(self._subscriptions, news):
                if kind not in one.kinds:
                    continue
                if len(one.queue) >= one.limit:
                    overflows.append(one.limit)
                    one.queue = deque(self._shortened(one.queue))
                    one.limit = max(self._limit, 2 * len(one.queue))
                one.queue.append((kind, record))
        for limit in overflows:
            self._count("overflows")
            _log.warning("listener_behind", limit=limit, **self._keys)
        for one in self._subscriptions:
            self._start(one)

    def retry(self) -> bool:
        """Call back where no thread could be started before; to be called regularly. Whether a listener still waits."""
        self.put(())
        return any(one.queue and not one.is_called for one in self._subscriptions)

    @contextmanager
    def calling_back(self) -> Iterator[None]:
        """This thread is inside a callback."""
        self._callers.append(threading.get_ident())
        try:
            yield
        finally:
            self._callers.remove(threading.get_ident())

    def is_calling_back(self) -> bool:
        """Whether the caller is inside a callback: it must not wait there for what others are to bring."""
        return threading.get_ident() in self._callers

    def refuse_in_callback(self, what: str) -> None:
        """Raise a ConfigError when the caller is inside a callback."""
        if self.is_calling_back():
            raise ConfigError(
                f"{what} waits, which a callback must not: note what is to be done, for instance in a queue.Queue, and "
                "wait in a thread of your own",
                field=what,
            )

    def wait_idle(self, timeout_s: float = STOP_S) -> None:
        """Wait until all news have been heard; bounded, and not at all inside a callback. Logs what is not back."""
        until_s = time.monotonic() + timeout_s
        self.retry()
        with self._lock:
            while True:
                busy = [one for one in self._subscriptions if one.is_called or one.queue]
                left_s = until_s - time.monotonic()
                if not busy or left_s <= 0 or self.is_calling_back():
                    break
                self._lock.wait(left_s)
        if busy and not self.is_calling_back():
            _log.warning("listener_hung", listeners=len(busy), ms=round(timeout_s * 1000), **self._keys)

    def close(self, timeout_s: float = STOP_S) -> None:
        """`wait_idle`, then end all subscriptions."""
        self.wait_idle(timeout_s)
        with self._lock:
            for one in self._subscriptions:
                one.queue.clear()
            self._subscriptions = ()

    def _start(self, subscription: _Subscription[T]) -> None:
        """Begin to call back, unless it has begun."""
        with self._lock:
            if subscription.is_called or not subscription.queue:
                return
            subscription.is_called = True
        try:
            start_thread(self._run, subscription, name="ucxx-listener")
        except TransportError as error:
            with self._lock:
                subscription.is_called = False
                is_new = isinstance(error, BusyError) and not subscription.is_waiting  # else the interpreter exits
                subscription.is_waiting = True
            if is_new:
                _log.warning("listener_waits", reason=str(error), **self._keys)
        else:
            subscription.is_waiting = False

    def _run(self, subscription: _Subscription[T]) -> None:
        try:
            while self._step(subscription):
                pass
        finally:
            self._hand_over(subscription)

    def _hand_over(self, subscription: _Subscription[T]) -> None:
        """This thread calls back no longer; what has come since the last step is another's."""
        with self._lock:
            subscription.is_called = False
            self._lock.notify_all()
        self._start(subscription)

    def _step(self, subscription: _Subscription[T]) -> bool:
        """Call back once; False when there is nothing."""
        with self._lock:
            if not subscription.queue:
                return False
            kind, record = subscription.queue.popleft()
        if (callback := subscription.callbacks.get(kind)) is not None:
            try:
                with self.calling_back():
                    callback(record)
            except Exception:  # noqa: BLE001 - a listener's failure is the application's: the feed goes on
                self.failed(kind, record)
        return True

    def failed(self, kind: str, record: T) -> None:
        """Count and log the exception under way, which a callback for these news has raised."""
        self._count("errors")
        name = name_of(record) if kind in _STATE else None
        _log.exception("listener_failed", event_kind=kind, source=name, **self._keys)

    def _shortened(self, queue: Iterable[tuple[str, T]]) -> Iterator[tuple[str, T]]:
        """News that end where these do: of each name a removal and an addition, or an update, at most."""
        changes: dict[Hashable, tuple[T | None, T | None]] = {}  # what the listener has heard of, and what is there
        for kind, record in queue:
            if kind not in _STATE:
                yield kind, record
                continue
            name = name_of(record)
            heard, _ = changes.get(name, (None if kind == ADD else record, None))
            changes[name] = (heard, None if kind == REMOVE else record)
        for heard, known in changes.values():
            is_same = heard is not None and known is not None and identity_of(heard) == identity_of(known)
            if heard is not None and not is_same:
                yield REMOVE, heard
            if known is not None:
                yield UPDATE if is_same else ADD, known


class ReplicaFeed(Protocol):
    """What reports arrivals and departures: a `SourceWatcher`, a `RankGroup`; `Any` is a record of the one's kind."""

    def subscribe(self, *, on_add: Callable[[Any], None], on_remove: Callable[[Any], None]) -> Callable[[], None]: ...


class ReplicaMonitor(Closing):
    """Calls back when a replica is gone, and when all are.

    A replica that was never there is never gone: before the first has registered nothing fires. One that registers
    again is alive again, and its next death is another one.

    The callbacks are those of one listener of the feed: they run one at a time, in order, under no lock, in a thread of
    their own. An exception is logged, and keeps no other call from being made.

    Args:
        feed: a `SourceWatcher`, whose replicas are worker ids, or a `RankGroup`, whose are ranks: followed from now on
            until `close`.
        on_dead: called with the name of each replica that is gone.
        on_all_gone: called, after that, when none is left.
    """

    def __init__(
        self,
        *,
        feed: ReplicaFeed,
        on_dead: Callable[[Hashable], object] = lambda _: None,
        on_all_gone: Callable[[], object] = lambda: None,
    ) -> None:
        self._on_dead, self._on_all_gone = on_dead, on_all_gone
        self._pid = os.getpid()
        self._alive: frozenset[Hashable] = frozenset()
        self._unsubscribe = feed.subscribe(on_add=self._added, on_remove=self._removed)

    @property
    def alive(self) -> frozenset[Hashable]:
        """The names of those that are there."""
        refuse_forked(self._pid, "ReplicaMonitor")
        return self._alive

    def close(self) -> None:
        """Follow the feed no longer. Idempotent."""
        self._unsubscribe()

    def _added(self, replica: Any) -> None:
        self._alive |= {name_of(replica)}

    def _removed(self, replica: Any) -> None:
        name = name_of(replica)
        self._alive -= {name}
        try:
            self._on_dead(name)
        finally:
            if not self._alive:
                self._on_all_gone()
