"""The retry policy: whether a failed attempt is tried again, and how much of the deadline it may use. No I/O.

| failure                                  | port layer            | slot layer          |
|------------------------------------------|-----------------------|---------------------|
| `PeerLostError`, attempt timed out       | quarantine, next port | fresh call          |
| `BusyError`                              | next port             | fresh call, backoff |
| `NotReadyError`                          | propagate             | fresh calls, as many as the deadline allows |
| `ChecksumError`                          | propagate             | fresh call          |
| `StaleSlotError`, protocol, token, config| propagate             | propagate           |
| the caller's deadline passed             | propagate             | propagate           |
"""

from __future__ import annotations

from enum import Enum

from ucxx_transport.backoff import pause_s
from ucxx_transport.errors import BusyError, DeadlineExceededError, NotReadyError, PeerLostError, TransportError

BACKOFF_BASE_S = 0.01
BACKOFF_LIMIT_S = 0.5
# What is left is worth a try only if a round trip may fit into it.
SHORTEST_ATTEMPT_S = 0.001


class PortVerdict(Enum):
    """What the port layer does with a failure."""

    ROTATE_AND_QUARANTINE = "rotate_and_quarantine"
    ROTATE = "rotate"
    PROPAGATE = "propagate"


def judge_port(error: TransportError) -> PortVerdict:
    """What a failure says about the port it came through."""
    if isinstance(error, PeerLostError | DeadlineExceededError):
        return PortVerdict.ROTATE_AND_QUARANTINE
    if isinstance(error, BusyError):
        return PortVerdict.ROTATE
    return PortVerdict.PROPAGATE


def backoff_s(error: TransportError, attempt: int) -> float:
    """Seconds to wait before fresh call number `attempt` (1 is the first repetition)."""
    if isinstance(error, BusyError | NotReadyError):
        return pause_s(attempt, first_s=BACKOFF_BASE_S, longest_s=BACKOFF_LIMIT_S)
    return 0.0


def retries_slot(error: TransportError, *, attempt: int, read_attempts: int, remaining_s: float) -> bool:
    """Whether the slot layer makes another fresh call after attempt number `attempt` (from 1).

    A source that is not bound yet says so itself and asks to come again: that is no failure to give up on.
    """
    if not error.retryable or (attempt >= read_attempts and not isinstance(error, NotReadyError)):
        return False
    return remaining_s - backoff_s(error, attempt) > SHORTEST_ATTEMPT_S


def attempt_budget_s(remaining_s: float, tries_left: int) -> float:
    """How much of the remaining deadline one try may use, of `tries_left`, itself included.

    Half of what is left while other tries may follow, all of it on the last: a silent port can cost half the
    deadline, never all of it, and a slow link still gets the longest possible time.
    """
    return remaining_s if tries_left <= 1 else remaining_s / 2
