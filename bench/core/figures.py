"""What came out: a `Row` for each subject in each case, with a value a round of every figure.

| figure           | what it is                                                                                       |
|------------------|--------------------------------------------------------------------------------------------------|
| p50_us, p99_us   | of one read: from the call until its bytes are held; in a batch the batch's time over its reads  |
| first_us         | p50 of the first read behind a refill of the slots, which finds the caches full of payloads      |
| per_s            | reads a second, from the first call of a batch to the end of the last                            |
| gb_per_s         | payload bytes / 1e9 / second, over the same time                                                 |
| reader_cpu_us    | user + system µs of the reading process a read                                                   |
| source_cpu_us    | the same of the worker and its port processes, or of the peer's server                           |
| cpu_s_per_gb     | user + system seconds of both ends / 1e9 payload bytes                                           |
| foreign_cores    | cores that other processes used meanwhile, steal included                                        |
| call_ns          | what an empty function call took then: the yardstick of microseconds of Python                   |
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

__all__ = ["CALL_NS", "Figures", "Row", "SkippedError", "Spread", "percentile_us"]

CALL_NS: Final = 70.0
"""What an empty call takes where targets in microseconds hold; they are scaled by what it takes here."""


class SkippedError(Exception):
    """A question cannot be asked on this machine; the message says why."""


def percentile_us(latencies_ns: Sequence[int], fraction: float) -> float:
    """The smallest latency, in µs, that at least `fraction` of the reads did not exceed (nearest rank)."""
    ordered = sorted(latencies_ns)
    rank = max(1, -(-len(ordered) * fraction // 1))
    return ordered[int(rank) - 1] / 1e3


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """One figure over the rounds."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of at least one value."""
        return cls(median=statistics.median(values), min=min(values), max=max(values))


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One subject in one case.

    Attributes:
        question: the name of the question.
        case: "64 KiB", "4 clients, 4 ports"; empty for a question that has one.
        subject: what was measured, in words.
        figures: a value a round, in their order, so that figures of two rows can be paired.
        skipped: why there are none.
    """

    question: str
    case: str
    subject: str
    figures: Mapping[str, Sequence[float]] = field(default_factory=dict)
    skipped: str = ""

    def spread(self, figure: str) -> Spread:
        """One figure over the rounds."""
        return Spread.of(self.figures[figure])

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: the spread of each figure, and each round."""
        summary = {figure: asdict(self.spread(figure)) for figure in self.figures}
        return {**asdict(self), "summary": summary}


class Figures:
    """All rows of a run, found by question, subject and case.

    Args:
        rows: what came out.
        reasons: why a question has no rows.
    """

    def __init__(self, rows: Iterable[Row], reasons: Mapping[str, str]) -> None:
        self._rows = {(row.question, row.subject, row.case): row for row in rows}
        self._reasons = reasons

    def find(self, question: str, subject: str, case: str) -> Row:
        """The row; one that is not there says why."""
        why = self._reasons.get(question, "not part of this run")
        missing = Row(question=question, case=case, subject=subject, skipped=why)
        return self._rows.get((question, subject, case), missing)

    def ratio(self, above: Row, below: Row, figure: str) -> Spread:
        """One row's figure over another's, round by round, so that both of a pair met the same machine."""
        pairs = zip(above.figures[figure], below.figures[figure], strict=True)
        return Spread.of([dividend / divisor for dividend, divisor in pairs])

    def scaled(self, row: Row, figure: str) -> Spread:
        """A row's figure as it would be where a call takes 70 ns, round by round."""
        pairs = zip(row.figures[figure], row.figures["call_ns"], strict=True)
        return Spread.of([value * CALL_NS / call_ns for value, call_ns in pairs])
