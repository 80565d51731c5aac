"""What a prefetcher has handed out and lost: counted, logged, reported."""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from ucxx_transport.errors import TransportError
from ucxx_transport.logs import get_logger
from ucxx_transport.trainer.batch import Batch
from ucxx_transport.trainer.loss_policy import AskedFor, Loss, LossReason, Sources, hint_for

_log = get_logger(__name__)

FIRST_PAUSE_S: Final = 10.0
LONGEST_PAUSE_S: Final = 600.0
"""A reason is logged at once, then after pauses that double; after so long without it, at once again."""

MOST_SEQUENCES: Final = 8
"""Of one log line."""


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
        given_up: batches that did not come in time; their episodes are lost by "timeout".
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


@dataclass(frozen=True, slots=True, kw_only=True)
class LossLine:
    """What is logged of a batch's losses of one reason.

    Attributes:
        lost: how many.
        of: the batch's episodes.
        reason: the word of the reason.
        worker: of the first of them.
        sequences: of that worker's, some of them.
        workers: how many workers' episodes they are.
        host: of the first.
        error: of the first, in words.
        hint: what may be in the way.
        since: how many more were lost by this reason since the last line.
    """

    lost: int
    of: int
    reason: str
    worker: str | None
    sequences: tuple[int | None, ...]
    workers: int
    host: str | None
    error: str | None
    hint: str | None
    since: int


@dataclass(slots=True)
class _Lasting:
    due_s: float
    pause_s: float = FIRST_PAUSE_S
    unsaid: int = 0


class LossLines:
    """What to log of batches' losses: one line a batch and reason, ever more seldom while it lasts."""

    def __init__(self) -> None:
        self._lasting: dict[LossReason, _Lasting] = {}

    def of_batch(self, losses: Sequence[Loss], *, of: int, host_id: str, now: float) -> list[LossLine]:
        """What is to be logged now."""
        by_reason: dict[LossReason, list[Loss]] = {}
        for loss in losses:
            by_reason.setdefault(loss.reason, []).append(loss)
        lines = []
        for reason, lost in by_reason.items():
            lasting = self._lasting.setdefault(reason, _Lasting(now))
            if now < lasting.due_s:
                lasting.unsaid += len(lost)
                continue
            if now - lasting.due_s > LONGEST_PAUSE_S:
                lasting.pause_s = FIRST_PAUSE_S
            lines.append(_line(lost, of, lasting.unsaid, host_id))
            lasting.due_s, lasting.unsaid = now + lasting.pause_s, 0
            lasting.pause_s = min(2 * lasting.pause_s, LONGEST_PAUSE_S)
        return lines


def _line(lost: Sequence[Loss], of: int, since: int, host_id: str) -> LossLine:
    first = lost[0]
    sequences = [loss.sequence for loss in lost if loss.worker == first.worker]
    return LossLine(
        lost=len(lost),
        of=of,
        reason=first.reason.value,
        worker=first.worker,
        sequences=tuple(sequences[:MOST_SEQUENCES]),
        workers=len({loss.worker for loss in lost}),
        host=first.host,
        error=None if first.error is None else str(first.error),
        hint=hint_for(first, host_id),
        since=since,
    )


class Accounts:
    """Thread-safe.

    Args:
        sources: say when a batch's losses are a reason to stop.
        on_loss: called with each loss; None: nothing is.
        host_id: of this host.
        clock: seconds.
    """

    def __init__(
        self,
        sources: Sources,
        *,
        on_loss: Callable[[Loss], None] | None,
        host_id: str,
        clock: Callable[[], float],
    ) -> None:
        self._sources = sources
        self._on_loss = on_loss
        self._host_id = host_id
        self._clock = clock
        self._lock = threading.Lock()  # of what follows, and of `sources`
        self._lines = LossLines()
        self._counts: defaultdict[str, Any] = defaultdict(int)  # of `PrefetchStatistics`, by its names
        self._losses: Counter[str] = Counter()

    def statistics(self, unlocked_rings: int) -> PrefetchStatistics:
        """Counts since this was made."""
        with self._lock:
            return PrefetchStatistics(**self._counts, losses=dict(self._losses), unlocked_rings=unlocked_rings)

    def count(self, records: Sequence[AskedFor], batch: Batch, *, counts: bool) -> TransportError | None:
        """Count a batch and log its losses; what is to be raised for them.

        `counts`: whether a source that does not answer is held against it.
        """
        losses, host_id, problem = batch.losses, self._host_id, None
        with self._lock:
            found = self._counts
            found["batches" if batch.in_time else "given_up"] += 1
            found["episodes"] += len(batch.payloads)
            found["nbytes"] += batch.nbytes
            found["fetch_s"] += batch.took_s
            found["retried"] += batch.retried
            self._losses.update(loss.reason.value for loss in losses)
            if batch.in_time:
                problem = self._sources.problem_in(records, batch.payloads, losses, host_id=host_id, counts=counts)
            lines = self._lines.of_batch(losses, of=len(records), host_id=host_id, now=self._clock()) if losses else ()
        for line in lines:
            _log.warning(
                "episodes_lost",
                lost=line.lost,
                of=line.of,
                reason=line.reason,
                worker=line.worker,
                sequences=line.sequences,
                workers=line.workers,
                host=line.host,
                error=line.error,
                hint=line.hint,
                since=line.since,
            )
        return problem

    def count_closed(self, episodes: int, losses: Sequence[Loss] = ()) -> int:
        """Count what was asked for and is not taken; how many there are by now."""
        closed = LossReason.CLOSED.value
        with self._lock:
            self._losses.update({closed: episodes} if episodes else ())
            self._losses.update(loss.reason.value for loss in losses)
            return self._losses[closed]

    def report(self, losses: Iterable[Loss], problem: TransportError | None = None) -> None:
        """Call the hook with each loss, whatever it raises; then raise the problem, or what the hook raised first."""
        failed: Exception | None = problem
        hook = self._on_loss
        for loss in losses:
            try:
                if hook is not None:
                    hook(loss)
            except Exception as error:  # noqa: BLE001 - raised below, or logged
                if failed is None:
                    failed = error
                else:
                    _log.exception("loss_hook_failed", worker=loss.worker, sequence=loss.sequence)
        if failed is not None:
            raise failed
