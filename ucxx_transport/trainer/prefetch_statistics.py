"""What a prefetcher has done: counts, each loss with its reason."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ucxx_transport.trainer.triage import Loss, LossReason

if TYPE_CHECKING:
    from ucxx_transport.trainer.batch import Batch


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefetchStatistics:
    """What a prefetcher has handed out.

    Attributes:
        batches: collected or fetched. episodes: their payloads. nbytes: their bytes.
        fetch_s: seconds that fetching them took, added up; what was fetched ahead nobody had to wait for.
        retried: episodes asked for again, in a later round of their batch.
        losses: episodes that are in no batch, by the reason's word.
        given_up: batches that did not come in time; their episodes are lost by "timeout".
    """

    batches: int
    episodes: int
    nbytes: int
    fetch_s: float
    retried: int
    losses: Mapping[str, int]
    given_up: int


class PrefetchCounters:
    """The running counts behind `PrefetchStatistics`. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._batches = self._episodes = self._nbytes = self._retried = self._given_up = 0
        self._fetch_s = 0.0
        self._losses: Counter[str] = Counter()

    def handed_out(self, batch: Batch) -> None:
        """Count a batch that the trainer has taken; its losses are counted by `lost`."""
        with self._lock:
            self._batches += 1
            self._episodes += len(batch.payloads)
            self._nbytes += sum(payload.nbytes for payload in batch.payloads.values())
            self._retried += batch.retried
            self._fetch_s += batch.took_s

    def lost(self, losses: Sequence[Loss]) -> None:
        """Count episodes by why they are in no batch."""
        with self._lock:
            self._losses.update(loss.reason.value for loss in losses)

    def left(self, count: int) -> int:
        """Count episodes that were asked for and will not be taken; returns how many there have been."""
        with self._lock:
            if count:
                self._losses[LossReason.CLOSED.value] += count
            return self._losses[LossReason.CLOSED.value]

    def gave_up(self) -> None:
        """Count a batch that did not come in time."""
        with self._lock:
            self._given_up += 1

    def snapshot(self) -> PrefetchStatistics:
        """The counts now."""
        with self._lock:
            return PrefetchStatistics(
                batches=self._batches,
                episodes=self._episodes,
                nbytes=self._nbytes,
                fetch_s=self._fetch_s,
                retried=self._retried,
                losses=dict(self._losses),
                given_up=self._given_up,
            )
