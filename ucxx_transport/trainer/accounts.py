"""What a prefetcher has handed out and lost: counted, logged, reported."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Final

from ucxx_transport.logs import get_logger
from ucxx_transport.trainer.batch import Alone, Batch, BatchFetch
from ucxx_transport.trainer.loss_policy import Loss, LossReason, Sources, hint_for, remember

_log = get_logger(__name__)

FIRST_PAUSE_S: Final = 10.0
LONGEST_PAUSE_S: Final = 600.0
"""A reason is logged at once, then after pauses that double; after so long without it, at once again."""

MOST_SEQUENCES: Final = 8
"""Of one log line."""

MOST_LOST: Final = 1024
"""Losses that are remembered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefetchStatistics:
    """What a prefetcher has handed out.

    Attributes:
        batches: collected or fetched.
        episodes: their payloads.
        nbytes: their bytes.
        fetch_s: seconds that fetching them took, added up; the trainer did not wait for what was fetched ahead.
        retried: episodes asked for again, in a later round of their batch.
        losses: episodes that are in no batch, by the reason's word.
        given_up: batches that did not come in time, or whose fetch failed; their episodes are lost.
        unlocked_rings: rings of this host that could not be page-locked for a GPU: their payloads go through a buffer.
    """

    batches: int = 0
    episodes: int = 0
    nbytes: int = 0
    fetch_s: float = 0.0
    retried: int = 0
    losses: Mapping[str, int] = field(default_factory=dict)
    given_up: int = 0
    unlocked_rings: int = 0


@dataclass(slots=True)
class _Lasting:
    due_s: float
    pause_s: float = FIRST_PAUSE_S
    unsaid: int = 0


class Accounts:
    """Thread-safe. `sources` say when a batch's losses are a reason to stop; `on_loss` is called with each."""

    def __init__(
        self, sources: Sources, *, on_loss: Callable[[Loss], None] | None, host_id: str, clock: Callable[[], float]
    ) -> None:
        self._sources = sources
        self._on_loss = on_loss
        self._host_id = host_id
        self._clock = clock
        self._lock = threading.RLock()  # of what follows, and of `sources`
        self._lasting: dict[LossReason, _Lasting] = {}
        self._now = PrefetchStatistics()
        self._lost: dict[Hashable, tuple[LossReason, object]] = {}

    def statistics(self, unlocked_rings: int) -> PrefetchStatistics:
        """Counts since this was made."""
        now = self._now
        return replace(now, losses=dict(now.losses), unlocked_rings=unlocked_rings)

    def count(self, fetch: BatchFetch, batch: Batch, failure: Exception | None = None) -> None:
        """Count a batch, once, and log its losses.

        An episode that was asked for by itself may be known to be lost. That was counted, which holds if it is lost
        again, and not if it came. `failure` is what ended the fetch.
        """
        losses, host_id, problem, alone = batch.losses, self._host_id, failure, fetch.alone
        with self._lock:
            if fetch.is_counted:
                return
            sources = copy(self._sources)
            if batch.in_time:
                problem = sources.problem_in(fetch.records, batch.payloads, losses, host_id, alone=bool(alone))
            lost_by, _ = (None, None) if alone is None else self._lost.get(alone.key, (None, None))
            before, lost = self._now, Counter(self._now.losses)
            if lost_by is not None:
                losses = ()
                lost[lost_by.value] -= len(batch.payloads)
            lost.update(loss.reason.value for loss in losses)
            now = replace(
                before,
                batches=before.batches + batch.in_time,
                given_up=before.given_up + (not batch.in_time),
                episodes=before.episodes + len(batch.payloads),
                nbytes=before.nbytes + batch.nbytes,
                fetch_s=before.fetch_s + batch.took_s,
                retried=before.retried + batch.retried,
                losses=+lost,  # without what is 0
            )
            due = self._due(losses)
            # all of it or nothing, wherever an interrupt comes
            fetch.unreported, fetch.problem, fetch.batch = iter(losses), problem, batch
            self._now, self._sources, fetch.is_counted = now, sources, True
            if alone is not None:
                self._lost.pop(alone.key, None)
                for loss in batch.losses:
                    self.remember(alone, lost_by or loss.reason)
        for alike, since in due:
            first = alike[0]
            sequences = [loss.sequence for loss in alike if loss.worker == first.worker]
            _log.warning(
                "episodes_lost",
                lost=len(alike),
                of=len(fetch.records),
                reason=first.reason.value,
                worker=first.worker,
                sequences=tuple(sequences[:MOST_SEQUENCES]),
                workers=len({loss.worker for loss in alike}),
                host=first.host,
                error=None if first.error is None else str(first.error),
                hint=hint_for(first, host_id),
                since=since,
            )

    def remember(self, episode: Alone, reason: LossReason) -> None:
        """Keep that an episode has been counted as lost."""
        with self._lock:
            remember(self._lost, episode.key, (reason, episode.output), MOST_LOST)

    def _due(self, losses: Sequence[Loss]) -> list[tuple[list[Loss], int]]:
        """Losses of one reason that are to be logged now, and how many more there were since the last time."""
        by_reason: dict[LossReason, list[Loss]] = {}
        for loss in losses:
            by_reason.setdefault(loss.reason, []).append(loss)
        due, now = [], self._clock()
        for reason, lost in by_reason.items():
            lasting = self._lasting.setdefault(reason, _Lasting(now))
            if now < lasting.due_s:
                lasting.unsaid += len(lost)
                continue
            if now - lasting.due_s > LONGEST_PAUSE_S:
                lasting.pause_s = FIRST_PAUSE_S
            due.append((lost, lasting.unsaid))
            lasting.due_s, lasting.unsaid = now + lasting.pause_s, 0
            lasting.pause_s = min(2 * lasting.pause_s, LONGEST_PAUSE_S)
        return due

    def count_closed(self, episodes: int, losses: Sequence[Loss] = (), *, fetch: BatchFetch | None = None) -> None:
        """Count what was asked for and is not taken, of a fetch that is not counted yet."""
        with self._lock:
            if fetch is not None and fetch.is_counted:
                return
            lost = Counter(self._now.losses) + Counter(loss.reason.value for loss in losses)
            self._now = replace(self._now, losses=lost + Counter({LossReason.CLOSED.value: episodes}))

    def report(self, fetch: BatchFetch) -> None:
        """Call the hook with each loss, whatever it raises; then raise the problem, or what it raised first.

        No loss is reported twice, or passed over, where an interrupt comes in between: report them again.
        """
        failed, hook = fetch.problem, self._on_loss
        for loss in fetch.unreported:
            try:
                if hook is not None:
                    hook(loss)
            except Exception as error:  # noqa: BLE001 - raised below, or logged
                if failed is None:
                    failed = error
                else:
                    _log.exception("loss_hook_failed", worker=loss.worker, sequence=loss.sequence)
        fetch.problem = None
        if failed is not None:
            raise failed
