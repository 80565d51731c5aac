"""Lease arithmetic over `now`: when a lease is over, what it may ask for, and when to read again.

All times are seconds of one clock, the store's; nothing here reads it.
"""

from __future__ import annotations

import math
from typing import Final

from ucxx_transport.errors import ConfigError

MAX_TTL_S: Final = 1e9
"""Thirty years; etcd refuses more than 9e9 s."""


def checked_ttl_s(ttl_s: object) -> float:
    """A time to live that a store can grant; a ConfigError unless it is a number above 0 and up to `MAX_TTL_S`."""
    if isinstance(ttl_s, bool) or not isinstance(ttl_s, int | float) or not 0 < ttl_s <= MAX_TTL_S:
        raise ConfigError(
            f"ttl_s = {ttl_s!r}: a lease lives for more than 0 and at most {MAX_TTL_S:.0e} seconds", field="ttl_s"
        )
    return float(ttl_s)


def whole_seconds(ttl_s: float) -> int:
    """The least whole number of seconds that is not less than `ttl_s`, at least 1, for a store that counts in them."""
    return max(1, math.ceil(checked_ttl_s(ttl_s)))


def is_over(deadline: float | None, now: float) -> bool:
    """Whether a lease with this deadline has ended; None: there is no lease to end."""
    return deadline is not None and now >= deadline


def pause_s(*, now: float, until: float, first_deadline: float | None, poll_s: float) -> float:
    """How long a watcher may sleep, `poll_s` at most: never past its caller's time, nor past the end of a lease."""
    wanted = max(0.0, until - now)
    if first_deadline is not None and first_deadline > now:
        wanted = min(wanted, first_deadline - now)
    return min(wanted, poll_s)
