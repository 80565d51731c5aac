"""How fast this machine runs Python at the moment: the yardstick for absolute microseconds of small reads.

Virtual machines are slowed by their neighbours without any sign of it in `/proc/stat`; the same loop then takes three
times as long, while large copies take no longer than before.
"""

from __future__ import annotations

import statistics
import time
from typing import Any, Final

__all__ = ["interpreter_speed"]

SAMPLES: Final = 200
LOOPS: Final = 1000


def interpreter_speed() -> dict[str, Any]:
    """CPU time of a trivial loop, sampled for some hundredths of a second: its best and its usual."""
    samples_us = []
    for _ in range(SAMPLES):
        began_ns = time.thread_time_ns()
        _loop()
        samples_us.append((time.thread_time_ns() - began_ns) / 1e3)
    return {
        "what": f"CPU time of {LOOPS} turns of a Python loop with one call in it",
        "best_us": min(samples_us),
        "median_us": statistics.median(samples_us),
    }


def _loop() -> int:
    total = 0
    for _ in range(LOOPS):
        total += len("abc")
    return total
