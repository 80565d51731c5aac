"""Which endpoint of a cluster is asked next, and how much of a call's time it gets: decided without any I/O."""

from __future__ import annotations

from collections.abc import Iterator

__all__ = ["Endpoints", "share_s"]


class Endpoints:
    """The endpoints of a cluster, the one that answered last in front. Shared by threads: one word is written."""

    def __init__(self, endpoints: tuple[str, ...]) -> None:
        self._endpoints = endpoints
        self._good = 0

    def in_turn(self) -> Iterator[tuple[str, int]]:
        """Each endpoint once, with how many come after it."""
        good, count = self._good, len(self._endpoints)
        for step in range(count):
            yield self._endpoints[(good + step) % count], count - 1 - step

    def answered(self, endpoint: str) -> None:
        """Ask this one first from now on."""
        self._good = self._endpoints.index(endpoint)

    def failed(self, endpoint: str) -> None:
        """Ask another one first from now on."""
        if self._endpoints[self._good] == endpoint:
            self._good = (self._good + 1) % len(self._endpoints)


def share_s(left_s: float, others: int) -> float:
    """How long one endpoint may take of the time that is left, when so many others shall have their turn."""
    return max(0.0, left_s) / (others + 1)
