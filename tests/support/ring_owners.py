"""Handles on a ring that act for processes which live and die as a test says."""

from __future__ import annotations

from collections.abc import Callable

from ucxx_transport.machine import Owner, owner_alive
from ucxx_transport.ring import SharedRingBuffer


def acting_for(
    ring: SharedRingBuffer, owner: Owner, alive: Callable[[int, int], bool] = owner_alive
) -> SharedRingBuffer:
    """The same handle, whose holds are those of `owner`, and to which `alive` says what process lives."""
    ring.transitions.owner = lambda: owner
    ring.alive = alive
    return ring
