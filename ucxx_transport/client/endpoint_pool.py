"""Which idle connection serves a call, and which are too old to trust. Decisions; the caller opens and closes."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Generic, TypeVar

from ucxx_transport.client.ports import PortKey

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkout(Generic[T]):
    """What to do for one call.

    Attributes:
        endpoint: use this one, or open a new one when None.
        expired: close these: idle longer than the maximum age.
    """

    endpoint: T | None
    expired: tuple[T, ...]


class EndpointPool(Generic[T]):
    """Idle endpoints per (address, port); a checked-out endpoint has one user.

    Args:
        max_age_s: an endpoint idle longer than this is closed on checkout. Keep it below the server's idle
            eviction, so that a call never picks a connection the server has just dropped.
        max_idle: idle endpoints kept per (address, port); the longest idle makes room.
    """

    def __init__(self, *, max_age_s: float, max_idle: int) -> None:
        self._max_age_s = max_age_s
        self._max_idle = max_idle
        self._idle: dict[PortKey, deque[tuple[float, T]]] = {}

    def take(self, key: PortKey, now: float) -> T | None:
        """The most recently used endpoint of `key`, if none of its endpoints has expired; None: see `checkout`."""
        idle = self._idle.get(key)
        if not idle or now - idle[0][0] > self._max_age_s:
            return None
        return idle.pop()[1]

    def checkout(self, key: PortKey, now: float) -> Checkout[T]:
        """Take the most recently used endpoint of `key`, if one is young enough."""
        expired = self._expire(key, now)
        idle = self._idle.get(key)
        if not idle:
            self._idle.pop(key, None)
            return Checkout(endpoint=None, expired=expired)
        _, endpoint = idle.pop()
        return Checkout(endpoint=endpoint, expired=expired)

    def checkin(self, key: PortKey, endpoint: T, now: float) -> tuple[T, ...]:
        """Give an endpoint back; returns those to close to stay below `max_idle`."""
        idle = self._idle.get(key)
        if idle is None:
            idle = self._idle[key] = deque()
        idle.append((now, endpoint))
        if len(idle) <= self._max_idle:
            return ()
        return tuple(idle.popleft()[1] for _ in range(len(idle) - self._max_idle))

    def expired(self, now: float) -> tuple[T, ...]:
        """Every endpoint, of any port, idle longer than the maximum age; they leave the pool."""
        return tuple(endpoint for key in tuple(self._idle) for endpoint in self._expire(key, now))

    def evict(self, key: PortKey) -> tuple[T, ...]:
        """Everything idle at `key`, which has just proved unhealthy; they leave the pool."""
        return tuple(endpoint for _, endpoint in self._idle.pop(key, ()))

    def drain(self) -> tuple[T, ...]:
        """Everything, at the end."""
        keys = tuple(self._idle)
        return tuple(endpoint for key in keys for endpoint in self.evict(key))

    def __len__(self) -> int:
        """Idle endpoints of all ports."""
        return sum(len(idle) for idle in self._idle.values())

    def _expire(self, key: PortKey, now: float) -> tuple[T, ...]:
        idle = self._idle.get(key)
        expired = []
        while idle and now - idle[0][0] > self._max_age_s:
            expired.append(idle.popleft()[1])
        if idle is not None and not idle:
            del self._idle[key]
        return tuple(expired)
