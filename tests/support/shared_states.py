"""A `SharedState` for tests of a group's parts, with a clock that they move."""

from __future__ import annotations

from collections.abc import Callable

from ucxx_transport.config import PublisherConfig
from ucxx_transport.groups.state import SharedState
from ucxx_transport.membership.store import Store

__all__ = ["shared_state"]


def shared_state(
    store: Store,
    rank: int,
    *,
    clock: Callable[[], float],
    group: str = "g",
    ack_timeout_s: float = 10.0,
    backoff_s: float = 1e-6,
    max_backoff_s: float = 1e-6,
) -> SharedState:
    """One whose pauses are short, and whose lease is renewed by a thread."""
    config = PublisherConfig(keeper="thread", backoff_s=backoff_s, max_backoff_s=max_backoff_s)
    return SharedState(store, group, rank, config=config, ack_timeout_s=ack_timeout_s, clock=clock)
