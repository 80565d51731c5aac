"""Exponential backoff: how long to pause between two tries of the same thing."""

from __future__ import annotations

import random


def pause_s(attempt: int, *, first_s: float, longest_s: float, jitter: float = 0.0) -> float:
    """The pause after failed try number `attempt` (from 1): doubled with every try, up to a bound.

    With a `jitter` of [0, 1), such as `random.random()`, it is between half of that and all of it ("equal jitter": M.
    Brooker, AWS Architecture Blog, 2015), so that a thousand workers do not come at the same time.
    """
    bound_s = min(longest_s, first_s * 2.0 ** min(attempt - 1, 60))
    return bound_s * (1.0 - 0.5 * jitter)


def random_pause_s(attempt: int, *, first_s: float, longest_s: float) -> float:
    """`pause_s` with a jitter of its own."""
    jitter = random.random()  # noqa: S311 - it spreads those who try, and protects nothing
    return pause_s(attempt, first_s=first_s, longest_s=longest_s, jitter=jitter)
