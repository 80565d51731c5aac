"""What a prefetcher has handed out and lost: counted, logged, reported."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Final

from ucxx_transport.logs import get_logger
from ucxx_transport.trainer.batch import Batch, BatchFetch
from ucxx_transport.trainer.loss_policy import Loss, LossReason, Sources

_log = get_logger(__name__)

LOG_PAUSE_S: Final = 60.0
"""Between two log lines of one reason; the first comes at once."""

MOST_SEQUENCES: Final = 8
"""Of one log line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefetchStatistics:
    """What a prefetcher has handed out.

    Attributes:
        batches: collected or fetched; those that were given up, or whose fetch failed, are losses alone.
        episodes: their payloads.
        nbytes: their bytes.
        fetch_s: seconds that fetching them took, added up; the trainer did not wait for what was fetched ahead.
        retried: episodes asked for again, in a later round of their batch.
        losses: episodes that are in no batch, by the reason's word.
    """

    batches: int = 0
    episodes: int = 0
    nbytes: int = 0
    fetch_s: float = 0.0
    retried: int = 0
    losses: Mapping[str, int] = field(default_factory=dict)


class Accounts:
    """Thread-safe. `sources` say when a batch's losses are a reason to stop; `on_loss` is called with each."""

    def __init__(self, sources: Sources, *, on_loss: Callable[[Loss], None] | None, clock: Callable[[], float]) -> None:
        self._sources = sources
        self._on_loss = on_loss
        self._clock = clock
        self._lock = threading.RLock()  # of what follows, and of `sources`
        self._logged: dict[LossReason, tuple[float, int]] = {}  # when it is due again, and how many came since
        self._now = PrefetchStatistics()

    def statistics(self) -> PrefetchStatistics:
        """Counts since this was made."""
        now = self._now
        return replace(now, losses=dict(now.losses))

    def count(self, fetch: BatchFetch, batch: Batch, failure: Exception | None = None) -> None:
        """Count a batch, once, and log its losses; `failure` is what ended the fetch."""
        losses, problem = batch.losses, failure
        with self._lock:
            if fetch.is_counted:
                return
            sources, before = copy(self._sources), self._now
            if batch.in_time:
                came = [fetch.records[place] for place in batch.payloads]
                problem = sources.problem_in(came, losses, alone=fetch.alone)
            now = replace(
                before,
                batches=before.batches + batch.in_time,
                episodes=before.episodes + len(batch.payloads),
                nbytes=before.nbytes + sum(payload.nbytes for payload in batch.payloads.values()),
                fetch_s=before.fetch_s + batch.took_s,
                retried=before.retried + batch.retried,
                losses=Counter(before.losses) + Counter(loss.reason.value for loss in losses),
            )
            due = self._due(losses)
            # all of it or nothing, wherever an interrupt comes
            fetch.unreported, fetch.problem, fetch.batch = iter(losses), problem, batch
            self._now, self._sources, fetch.is_counted = now, sources, True
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
                hint=sources.hint_for(first),
                since=since,
            )

    def _due(self, losses: Sequence[Loss]) -> list[tuple[list[Loss], int]]:
        """Losses of one reason that are to be logged now, and how many more there were since the last time."""
        by_reason: dict[LossReason, list[Loss]] = {}
        for loss in losses:
            by_reason.setdefault(loss.reason, []).append(loss)
        due, now = [], self._clock()
        for reason, lost in by_reason.items():
            due_s, since = self._logged.get(reason, (now, 0))
            if now < due_s:
                self._logged[reason] = due_s, since + len(lost)
            else:
                due.append((lost, since))
                self._logged[reason] = now + LOG_PAUSE_S, 0
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
