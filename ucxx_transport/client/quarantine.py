"""Which (address, port) pairs have just failed. A decision: `now` comes in, nothing waits."""

from __future__ import annotations

from collections.abc import Iterable

PortKey = tuple[str, int]


class Quarantine:
    """Ports to avoid for a while after a transport-class failure.

    Args:
        duration_s: how long a port is avoided after its last failure, in seconds.
    """

    def __init__(self, duration_s: float) -> None:
        self._duration_s = duration_s
        self._until_s: dict[PortKey, float] = {}

    def add(self, key: PortKey, now: float) -> None:
        """Avoid `key` until `duration_s` from now."""
        self._until_s[key] = now + self._duration_s

    def forgive(self, key: PortKey) -> None:
        """`key` has just served a read: it is healthy."""
        self._until_s.pop(key, None)

    def holds(self, key: PortKey, now: float) -> bool:
        """Whether `key` is to be avoided now."""
        until_s = self._until_s.get(key)
        if until_s is None:
            return False
        if now < until_s:
            return True
        del self._until_s[key]
        return False

    def held(self, keys: Iterable[PortKey], now: float) -> int:
        """How many of `keys` are avoided now."""
        return sum(self.holds(key, now) for key in keys)

    def prune(self, now: float) -> None:
        """Forget what has expired, so that sources long gone cost nothing."""
        self._until_s = {key: until_s for key, until_s in self._until_s.items() if now < until_s}

    def __len__(self) -> int:
        """Ports on the list, expired ones included until they are looked at."""
        return len(self._until_s)
