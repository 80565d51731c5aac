"""A `RankContext` for tests of a group's parts, with a clock that they move."""

from __future__ import annotations

from collections.abc import Callable

from ucxx_transport.config import PublisherConfig
from ucxx_transport.groups.state import RankContext
from ucxx_transport.membership.store import Store

__all__ = ["rank_context"]


def rank_context(
    store: Store,
    rank: int,
    *,
    clock: Callable[[], float],
    group: str = "g",
    ack_timeout_s: float = 10.0,
    backoff_s: float = 1e-6,
    max_backoff_s: float = 1e-6,
) -> RankContext:
    """One whose pauses are short, and whose lease is renewed by a thread."""
    config = PublisherConfig(keeper="thread", backoff_s=backoff_s, max_backoff_s=max_backoff_s)
    return RankContext(
        store=store,
        group=group,
        rank=rank,
        config=config,
        ack_timeout_s=ack_timeout_s,
        clock=clock,
    )
