"""Patience: asks a store again until it answers, or a deadline passes."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Final, TypeVar

from ucxx_transport.errors import DeadlineExceededError, RegistryError, StoreUnavailableError

__all__ = ["Patience"]

T = TypeVar("T")

CALL_S: Final = 5.0
"""The bound of one call: a store that swallows a call is asked again while there is time."""


class Patience:
    """One deadline, and pauses that grow while a store does not answer.

    Args:
        deadline: by `clock`.
        clock: seconds.
        backoff_s, max_backoff_s: the first pause and the longest; it doubles, with jitter.
        given_up: set by who no longer wants what is being tried.
    """

    def __init__(
        self,
        *,
        deadline: float,
        clock: Callable[[], float],
        backoff_s: float,
        max_backoff_s: float,
        given_up: threading.Event,
    ) -> None:
        self.deadline = deadline
        self._clock = clock
        self._first_s, self._longest_s = backoff_s, max_backoff_s
        self._given_up = given_up

    @property
    def left_s(self) -> float:
        """What is left, never negative."""
        return max(0.0, self.deadline - self._clock())

    def until_answered(self, call: Callable[[float], T], *, phase: str) -> T:
        """The answer, or the error that is one.

        Args:
            call: takes the seconds that it may take.
            phase: what it is for, for the errors.

        Raises:
            DeadlineExceededError: the store did not answer until the deadline.
            RegistryError: it was given up, or the store answered by an error.
        """
        pause_s = self._first_s
        unanswered: StoreUnavailableError | None = None
        while self.left_s > 0:
            try:
                return call(min(self.left_s, CALL_S))
            except StoreUnavailableError as error:
                unanswered = error
            self.pause(pause_s, phase=phase)
            pause_s = min(2 * pause_s, self._longest_s)
        raise DeadlineExceededError(
            f"{phase}: the deadline passed before the store answered",
            phase=phase,
            waiting_for="store",
            reason=str(unanswered),
        ) from unanswered

    def pause(self, seconds: float, *, phase: str) -> None:
        """Wait a little, at most until the deadline.

        Raises:
            RegistryError: it was given up.
        """
        self._given_up.wait(min(seconds * random.uniform(0.5, 1.0), self.left_s))  # noqa: S311 - jitter
        self.check(phase)

    def check(self, phase: str) -> None:
        """Go on only if it is still wanted.

        Raises:
            RegistryError: it was given up.
        """
        if self._given_up.is_set():
            raise RegistryError(f"{phase}: given up by leave()", phase=phase)
