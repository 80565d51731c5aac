"""What came out: one `Round` a turn of a subject, summed up over the rounds as median, least and greatest."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

__all__ = ["FIGURES", "Result", "Round", "Spread", "paired_ratio", "percentile_us"]

BYTES_PER_GB: Final = 1e9
FIGURES: Final = (
    "gb_per_s",
    "p50_us",
    "p99_us",
    "reader_cpu_s_per_gb",
    "source_cpu_s_per_gb",
    "reader_cpu_us_per_read",
    "source_cpu_us_per_read",
    "foreign_cores",
)


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
class Round:
    """One turn of one subject at one size.

    Attributes:
        number: which round, from 0; rounds of the same number lie beside each other in time.
        reads: timed reads.
        verified: payloads compared byte for byte in the warm-up of this turn.
        gb_per_s: payload bytes (GB = 10⁹) over the time from the first read's start to the last one's end.
        p50_us: median latency of one read: from the call until its bytes were held and given back.
        p99_us: its 99th percentile.
        reader_cpu_s_per_gb: user and system time of the reading process.
        source_cpu_s_per_gb: the same of the worker and the server process under it.
        reader_cpu_us_per_read: the same by read, for views, which move no bytes.
        source_cpu_us_per_read: likewise.
        foreign_cores: cores that other processes used meanwhile; above a tenth or so, the turn compares nothing.
        transport: the way the bytes came, in the reader's own words.
    """

    number: int
    reads: int
    verified: int
    gb_per_s: float
    p50_us: float
    p99_us: float
    reader_cpu_s_per_gb: float
    source_cpu_s_per_gb: float
    reader_cpu_us_per_read: float
    source_cpu_us_per_read: float
    foreign_cores: float
    transport: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """All rounds of one subject at one size."""

    subject: str
    size_bytes: int
    rounds: tuple[Round, ...]

    def values(self, figure: str) -> list[float]:
        """One figure of every round, in their order."""
        return [float(getattr(entry, figure)) for entry in self.rounds]

    def spread(self, figure: str) -> Spread:
        """One figure over the rounds."""
        return Spread.of(self.values(figure))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: the rounds, and the spread of each figure over them."""
        return {
            "subject": self.subject,
            "size_bytes": self.size_bytes,
            "summary": {figure: asdict(self.spread(figure)) for figure in FIGURES},
            "rounds": [asdict(entry) for entry in self.rounds],
        }


def paired_ratio(above: Result, below: Result, figure: str) -> Spread:
    """One subject's figure over another's, round by round, so that both of a pair met the same machine."""
    pairs = zip(above.values(figure), below.values(figure), strict=True)
    return Spread.of([dividend / divisor for dividend, divisor in pairs])
