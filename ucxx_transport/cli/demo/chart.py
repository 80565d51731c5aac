"""A curve in block characters, for the live view."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

__all__ = ["block_chart", "bucket_means"]

_EIGHTHS = " ▁▂▃▄▅▆▇█"


def bucket_means(values: Sequence[float], buckets: int) -> list[float]:
    """At most `buckets` means of successive, nearly equal shares of `values`."""
    count = min(len(values), buckets)
    bounds = [index * len(values) // count for index in range(count + 1)] if count else []
    return [sum(values[low:high]) / (high - low) for low, high in pairwise(bounds)]


def block_chart(values: Sequence[float], *, height: int, low: float, high: float) -> list[str]:
    """Rows of a column chart, the top one first; one character a value, each of `height` rows an eighth fine.

    Args:
        values: what to draw; outside [low, high] it is drawn at the edge.
        height: rows.
        low: value of the base line.
        high: value of the top.
    """
    span = max(high - low, 1e-12)
    eighths = [round(8 * height * min(1.0, max(0.0, (value - low) / span))) for value in values]
    return ["".join(_EIGHTHS[min(8, max(0, each - 8 * row))] for each in eighths) for row in range(height - 1, -1, -1)]
