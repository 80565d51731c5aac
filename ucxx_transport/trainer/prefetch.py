"""The double buffer: one batch is trained on while the next one is fetched, and batches are matched by id.

| call                  | nothing under way  | a batch is being fetched      | a batch has been fetched       |
|-----------------------|--------------------|-------------------------------|--------------------------------|
| `start(rollouts)`     | an order to fetch  | refused: collect or defer     | refused: collect or defer      |
| `defer(rollouts)`     | an order to fetch  | queued                        | queued                         |
| `finished(id, batch)` | late: not taken    | taken if the id is its own    | late: not taken                |
| `abandon(id)`         | nothing            | given up if the id is its own | nothing: it came in time       |
| `collect()`           | refused: start it  | refused: wait first           | the batch; the one before goes |
| `release()`           | the one in use goes | the one in use goes          | the one in use goes            |

Whatever is "not taken" or "goes" is the caller's to release. After `collect` and `abandon` the oldest deferred rollouts
are what is fetched next. No I/O, no clock, no lock: the caller brings them.
"""

from __future__ import annotations

import itertools
from collections import deque
from dataclasses import dataclass
from typing import Generic, TypeVar

from ucxx_transport.errors import ConfigError

RolloutsT = TypeVar("RolloutsT")
BatchT = TypeVar("BatchT")


@dataclass(frozen=True, slots=True)
class FetchOrder(Generic[RolloutsT]):
    """What to fetch next: the id to give with its result, and what was asked for."""

    batch_id: int
    rollouts: RolloutsT


@dataclass(frozen=True, slots=True)
class Collected(Generic[BatchT, RolloutsT]):
    """What a `collect` gave: the batch to train on, the one before it to be released, and what to fetch next."""

    batch: BatchT
    done: BatchT | None
    order: FetchOrder[RolloutsT] | None


@dataclass(frozen=True, slots=True)
class Closed(Generic[BatchT, RolloutsT]):
    """What a `close` found: the batch in use, the one not collected, both to be released, and what never had a turn."""

    done: BatchT | None
    unused: BatchT | None
    waiting: tuple[RolloutsT, ...]


class DoubleBuffer(Generic[RolloutsT, BatchT]):
    """Which batch is trained on, which one is on its way, and what waits behind it.

    Attributes:
        in_use: the batch that was collected last.
        fetching: id of the batch on its way.
    """

    __slots__ = ("_deferred", "_fetched", "_ids", "fetching", "in_use")

    def __init__(self) -> None:
        self._ids = itertools.count(1)
        self._deferred: deque[RolloutsT] = deque()
        self.fetching: int | None = None
        self._fetched: BatchT | None = None
        self.in_use: BatchT | None = None

    @property
    def is_cold_start(self) -> bool:
        """Whether there is nothing to collect and nothing on its way: the trainer has to wait for a whole fetch."""
        return self.fetching is None and self._fetched is None

    @property
    def fetched(self) -> bool:
        """Whether a batch waits to be collected."""
        return self._fetched is not None

    @property
    def deferred(self) -> int:
        """Batches that wait for their turn to be fetched."""
        return len(self._deferred)

    def start(self, rollouts: RolloutsT) -> FetchOrder[RolloutsT]:
        """Fetch these now; a ConfigError while a batch is on its way or waits to be collected."""
        if not self.is_cold_start:
            raise ConfigError(
                "a batch is on its way or waits to be collected; collect_prefetch() first, or defer_prefetch(rollouts)"
            )
        return self._order(rollouts)

    def defer(self, rollouts: RolloutsT) -> FetchOrder[RolloutsT] | None:
        """Fetch these as soon as the batches before them are out of the way; an order when that is now."""
        if self.is_cold_start:
            return self._order(rollouts)
        self._deferred.append(rollouts)
        return None

    def finished(self, batch_id: int, batch: BatchT) -> bool:
        """A fetch has ended. False: it is not the one that is waited for, and the batch is the caller's to release."""
        if batch_id != self.fetching:
            return False
        self.fetching = None
        self._fetched = batch
        return True

    def abandon(self, batch_id: int) -> FetchOrder[RolloutsT] | None:
        """Wait no longer for this batch: what still comes of it is late. What to fetch instead, if anything waits."""
        if batch_id != self.fetching:
            return None
        self.fetching = None
        return self._next()

    def collect(self) -> Collected[BatchT, RolloutsT]:
        """Take the fetched batch into use; a ConfigError where there is none (yet)."""
        if self._fetched is None:
            raise ConfigError(
                "the batch is still on its way: wait_prefetch() first"
                if self.fetching is not None
                else "nothing was prefetched: start_prefetch(rollouts) first"
            )
        done, self.in_use, self._fetched = self.in_use, self._fetched, None
        return Collected(self.in_use, done, self._next())

    def release(self) -> BatchT | None:
        """Use the batch in use no longer; it, to be released."""
        done, self.in_use = self.in_use, None
        return done

    def close(self) -> Closed[BatchT, RolloutsT]:
        """Forget everything. What still comes is late."""
        closed = Closed(self.in_use, self._fetched, tuple(self._deferred))
        self.in_use = self._fetched = self.fetching = None
        self._deferred.clear()
        return closed

    def _next(self) -> FetchOrder[RolloutsT] | None:
        return self._order(self._deferred.popleft()) if self._deferred else None

    def _order(self, rollouts: RolloutsT) -> FetchOrder[RolloutsT]:
        self.fetching = next(self._ids)
        return FetchOrder(self.fetching, rollouts)
