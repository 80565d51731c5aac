"""A curve in block characters, for the live view."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["block_chart", "means_over_time"]

_EIGHTHS = " ▁▂▃▄▅▆▇█"


def means_over_time(points: Sequence[tuple[float, float]], buckets: int) -> list[float]:
    """The means of (time, value) points in equal spans of time, from the first point to the last.

    Args:
        points: by ascending time.
        buckets: how many spans; one without a point repeats the mean before it.
    """
    if not points:
        return []
    first, last = points[0][0], points[-1][0]
    span = max((last - first) / buckets, 1e-12)
    sums, counts = [0.0] * buckets, [0] * buckets
    for time, value in points:
        bucket = min(buckets - 1, int((time - first) / span))
        sums[bucket] += value
        counts[bucket] += 1
    means: list[float] = []
    for total, count in zip(sums, counts, strict=True):
        means.append(total / count if count else means[-1])
    return means


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
