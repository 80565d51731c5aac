"""Where a publisher is, and what it has done: written by its thread, read and waited for by any.

```
            start            visible             bound
 NEW ──────► PUBLISHING ──────► STARTING ──────► LIVE ⇄ UNWELL
                ▲  │ refused, a double,            │
                │  └────────► FAILED               │ lease lost, store wiped, record gone
                └──────────────────────────────────┘
 stop, from anywhere: STOPPED
```
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from ucxx_transport.errors import ConfigError, DeadlineExceededError, TransportError


class PublisherState(Enum):
    """Where a publisher is. See the module's picture."""

    NEW = "new"
    PUBLISHING = "publishing"
    STARTING = "starting"
    LIVE = "live"
    UNWELL = "unwell"
    FAILED = "failed"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True, kw_only=True)
class PublisherStatistics:
    """What a publisher has done.

    Attributes:
        state: now. epoch: the last one, 0 before the first. attempts: to publish. publications: that succeeded.
        losses: publications that ended unasked. outages: times that the store stopped answering.
        keeper_restarts: of the process that keeps the lease. keeper_keeps: whether it does; its start takes a second,
            and so long the publisher's thread renews.
    """

    state: PublisherState
    epoch: int
    attempts: int
    publications: int
    losses: int
    outages: int
    keeper_restarts: int
    keeper_keeps: bool


class PublisherBoard:
    """Shared by a publisher and its thread.

    Attributes:
        state: now. error: why it has FAILED, or what the store said last. epoch: the last one.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._changed = threading.Condition()
        self._counts = dict.fromkeys(("attempts", "publications", "losses", "outages"), 0)
        self.state = PublisherState.NEW
        self.error: TransportError | None = None
        self.epoch = 0

    def enter(self, state: PublisherState, error: TransportError | None = None) -> None:
        """Another state; whoever waits looks again. A publisher that has stopped stays so."""
        with self._changed:
            if self.state is not PublisherState.STOPPED:
                self.state, self.error = state, error
            self._changed.notify_all()

    def note(self, error: TransportError) -> None:
        """What keeps it from its next state just now."""
        with self._changed:
            self.error = error

    def count(self, name: str) -> None:
        """One more of a field of `PublisherStatistics`."""
        with self._changed:
            self._counts[name] += 1

    def wait_live(self, timeout_s: float, store: str) -> int:
        """See `HeartbeatPublisher.wait_published`."""
        until_s = self._clock() + timeout_s
        with self._changed:
            while self.state is not PublisherState.LIVE:
                if self.state is PublisherState.FAILED and self.error is not None:
                    raise self.error
                if self.state in {PublisherState.NEW, PublisherState.STOPPED}:
                    raise ConfigError(f"the publisher is {self.state.value}")
                left_s = until_s - self._clock()
                if left_s <= 0:
                    message = "the source was not published in time"
                    raise DeadlineExceededError(message, store=store, reason=str(self.error))
                self._changed.wait(left_s)
            return self.epoch

    def statistics(self, *, keeper_restarts: int, keeper_keeps: bool) -> PublisherStatistics:
        """Counts since it was made."""
        with self._changed:
            return PublisherStatistics(
                state=self.state,
                epoch=self.epoch,
                keeper_restarts=keeper_restarts,
                keeper_keeps=keeper_keeps,
                **self._counts,
            )
