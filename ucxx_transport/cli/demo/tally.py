"""Counting reads: how many, how large, how long, by the transport really used."""

from __future__ import annotations

import numpy as np

__all__ = ["ReadTally"]

_KEPT = 1 << 17


class ReadTally:
    """Reads over one transport. Durations of the last 131,072 are kept for the percentiles."""

    def __init__(self) -> None:
        self._durations_s = np.empty(1024, np.float64)
        self._reads = 0
        self._bytes = 0
        self._busy_s = 0.0

    def add(self, nbytes: int, duration_s: float) -> None:
        """Count one delivered payload."""
        if self._reads == len(self._durations_s) < _KEPT:
            self._durations_s = np.concatenate([self._durations_s, np.empty_like(self._durations_s)])
        self._durations_s[self._reads % len(self._durations_s)] = duration_s
        self._reads += 1
        self._bytes += nbytes
        self._busy_s += duration_s

    def summary(self) -> dict[str, float]:
        """reads, bytes, busy_s, p50_us, p95_us, p99_us; at least one read must have been counted."""
        durations = self._durations_s[: min(self._reads, len(self._durations_s))]
        p50, p95, p99 = (float(each) * 1e6 for each in np.percentile(durations, (50, 95, 99)))
        return {
            "reads": self._reads,
            "bytes": self._bytes,
            "busy_s": self._busy_s,
            "p50_us": p50,
            "p95_us": p95,
            "p99_us": p99,
        }
