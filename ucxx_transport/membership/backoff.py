"""How long to pause between two tries: exponential with jitter, so that a thousand workers do not come at once.

Between half the bound and all of it ("equal jitter": M. Brooker, AWS Architecture Blog, 2015): never a try at once.
"""

from __future__ import annotations

from collections.abc import Callable


def pause_s(attempt: int, *, first_s: float, most_s: float, draw: Callable[[], float]) -> float:
    """The pause after a failed try.

    Args:
        attempt: which try failed, from 1.
        first_s: upper bound of the first pause; it doubles with every try.
        most_s: upper bound of any.
        draw: a number of [0, 1), for the jitter.
    """
    bound_s = min(most_s, first_s * 2.0 ** min(attempt - 1, 60))
    return bound_s * (0.5 + 0.5 * draw())
