"""Exponential backoff: how long to pause between two tries of the same thing."""

from __future__ import annotations

import random


def pause_s(attempt: int, *, first_s: float, longest_s: float) -> float:
    """The pause after failed try number `attempt` (from 1): doubled with every try, up to a bound."""
    return min(longest_s, first_s * 2.0 ** min(attempt - 1, 60))


def random_pause_s(attempt: int, *, first_s: float, longest_s: float) -> float:
    """Between half of that and all of it, so that a thousand workers do not come at the same time.

    It is the "equal jitter" of M. Brooker, AWS Architecture Blog, 2015.
    """
    return pause_s(attempt, first_s=first_s, longest_s=longest_s) * random.uniform(0.5, 1.0)  # noqa: S311 - no secret
