"""Listeners: callbacks of the application, each with a queue of its own, called under no lock of ours.

| what happens               | what follows                                                                        |
|----------------------------|-------------------------------------------------------------------------------------|
| news                       | goes into the queue of each listener; who brings it never waits                     |
| a queue is no longer empty | a daemon thread calls back, in order, one at a time, and ends when it is empty      |
| a listener subscribes      | it is called for what is known, in the subscriber's thread, before it has returned  |
| a callback raises          | logged and counted; the next one is called                                          |
| a queue is full            | it is discarded; the listener then gets the difference between what it has heard and |
|                            | what is known, so nothing that lasts is missed; logged and counted                  |
| a subscription is ended    | no further callback begins; one under way is not waited for                         |
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Final, Generic, TypeVar

from ucxx_transport.errors import ConfigError
from ucxx_transport.logs import get_logger

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


class _Subscription(Generic[T]):
    """One listener: its callbacks, its news, and what it has heard. All but `callbacks` under the lock of the owner."""

    def __init__(self, callbacks: Callbacks, news: Iterable[tuple[str, T]]) -> None:
        self.callbacks = callbacks
        self.follows_state = any(callbacks.get(kind) for kind in _STATE)
        self.queue: deque[tuple[str, T]] = deque(news)
        self.heard: dict[Hashable, T] = {}
        self.caller: int | None = None  # the thread that calls back
        self.is_behind = self.is_ended = False

    @property
    def has_news(self) -> bool:
        return not self.is_ended and bool(self.queue or self.is_behind)

    def takes_too_much(self, kind: str, news: T, limit: int) -> bool:
        """Queue news that concern this one; whether the queue was full, and is discarded."""
        if not (self.follows_state and not self.is_behind if kind in _STATE else self.callbacks.get(kind)):
            return False
        is_full = len(self.queue) >= limit
        if is_full:
            self.queue.clear()
            self.is_behind = self.follows_state
        if not self.is_behind or kind not in _STATE:
            self.queue.append((kind, news))
        return is_full


class Listeners(Generic[T]):
    """All listeners of one feed, and what is known of it by its changes. Thread-safe; see the module.

    Args:
        identify: of a record: its name, and its life, in which two records of that name may differ.
        count: called with "errors" or "overflows" at each of them.
        keys: further keys of every log event.
        limit: news that one listener's queue takes.
    """

    def __init__(
        self,
        identify: Callable[[T], tuple[Hashable, Hashable]],
        count: Callable[[str], object],
        *,
        keys: Mapping[str, object],
        limit: int = QUEUE_LIMIT,
    ) -> None:
        self._identify, self._count, self._keys, self._limit = identify, count, keys, limit
        self._lock = threading.Condition()
        self._known: dict[Hashable, T] = {}
        self._subscriptions: tuple[_Subscription[T], ...] = ()
        self._callers: dict[int, int] = {}  # threads inside a callback, and how deep

    def subscribe(self, callbacks: Callbacks) -> Callable[[], None]:
        """Call these from now on, by kind of news; "add" for what is known already, before this returns.

        Returns:
            What ends it.
        """
        with self._lock:
            known = sorted(self._known.items(), key=lambda item: item[0])  # type: ignore[arg-type,return-value]  # names of one kind
            subscription = _Subscription(callbacks, [(ADD, record) for _, record in known])
            subscription.caller = threading.get_ident()
            self._subscriptions += (subscription,)

        def end() -> None:
            with self._lock:
                subscription.is_ended = True
                subscription.queue.clear()
                self._subscriptions = tuple(one for one in self._subscriptions if one is not subscription)
                self._lock.notify_all()

        is_called = False
        try:
            for _ in known:
                self._step(subscription)
            is_called = True
        finally:
            if not is_called:  # an interrupt: who does not get its subscription must not be called
                end()
            self._hand_over(subscription)
        return end

    def put(self, news: Iterable[tuple[str, T]]) -> None:
        """Give news to all listeners, who see them as one change: a new one is called for what is known after it."""
        overflows = 0
        with self._lock:
            for kind, record in news:
                name, _ = self._identify(record) if kind in _STATE else (None, None)
                if kind == REMOVE:
                    self._known.pop(name, None)
                elif kind in _STATE:
                    self._known[name] = record
                overflows += sum(one.takes_too_much(kind, record, self._limit) for one in self._subscriptions)
            idle = [one for one in self._subscriptions if one.caller is None and one.has_news]
        for _ in range(overflows):
            self._count("overflows")
            _log.warning("listener_behind", limit=self._limit, **self._keys)
        for one in idle:
            self._start(one)

    @contextmanager
    def calling_back(self) -> Iterator[None]:
        """This thread is inside a callback."""
        own = threading.get_ident()
        self._callers[own] = self._callers.get(own, 0) + 1
        try:
            yield
        finally:
            self._callers[own] -= 1
            if not self._callers[own]:
                del self._callers[own]

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
        with self._lock:
            while busy := [one for one in self._subscriptions if one.caller is not None or one.has_news]:
                left_s = until_s - time.monotonic()
                if left_s <= 0 or self.is_calling_back():
                    break
                self._lock.wait(left_s)
        if busy and not self.is_calling_back():
            _log.warning("listener_hung", listeners=len(busy), ms=round(timeout_s * 1000), **self._keys)

    def close(self, timeout_s: float = STOP_S) -> None:
        """`wait_idle`, then end all subscriptions."""
        self.wait_idle(timeout_s)
        with self._lock:
            for one in self._subscriptions:
                one.is_ended = True
                one.queue.clear()
            self._subscriptions = ()

    def _start(self, subscription: _Subscription[T]) -> None:
        """Begin to call back, unless it has begun."""
        thread = threading.Thread(target=self._run, args=(subscription,), name="ucxx-listener", daemon=True)
        with self._lock:
            if subscription.caller is not None or not subscription.has_news:
                return
            subscription.caller = 0  # until the thread has its identity
        try:
            thread.start()
        except RuntimeError:  # too many threads: the next news tries again; or the interpreter exits
            with self._lock:
                subscription.caller = None
            _log.debug("listener_waits", **self._keys)

    def _run(self, subscription: _Subscription[T]) -> None:
        with self._lock:
            subscription.caller = threading.get_ident()
        try:
            while self._step(subscription):
                pass
        finally:
            self._hand_over(subscription)

    def _hand_over(self, subscription: _Subscription[T]) -> None:
        """This thread calls back no longer; what has come since the last step is another's."""
        with self._lock:
            if subscription.caller == threading.get_ident():
                subscription.caller = None
            self._lock.notify_all()
        self._start(subscription)

    def _step(self, subscription: _Subscription[T]) -> bool:
        """Call back once; False when there is nothing."""
        with self._lock:
            if subscription.is_behind:
                subscription.is_behind = False
                subscription.queue.extendleft(reversed(self._difference(subscription.heard)))
            if not subscription.queue:
                return False
            kind, record = subscription.queue.popleft()
            name: Hashable = None
            if kind in _STATE:
                name, _ = self._identify(record)
                if kind == REMOVE:
                    subscription.heard.pop(name, None)
                else:
                    subscription.heard[name] = record
        if (callback := subscription.callbacks.get(kind)) is not None:
            try:
                with self.calling_back():
                    callback(record)
            except Exception:  # noqa: BLE001 - a listener's failure is the application's: the feed goes on
                self._count("errors")
                _log.exception("listener_failed", event_kind=kind, source=name, **self._keys)
        return True

    def _difference(self, heard: Mapping[Hashable, T]) -> list[tuple[str, T]]:
        """The news that lead from what was heard to what is known."""
        news: list[tuple[str, T]] = []
        for name, record in heard.items():
            now = self._known.get(name)
            if now is None or self._identify(now) != self._identify(record):
                news.append((REMOVE, record))
        for name, record in self._known.items():
            before = heard.get(name)
            if before is None or self._identify(before) != self._identify(record):
                news.append((ADD, record))
            elif before != record:
                news.append((UPDATE, record))
        return news
