"""Which ports one call tries, in which order. A decision: no I/O."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from ucxx_transport.client.quarantine import PortKey, Quarantine

# One rotation a call: the port that was due and, after a transport-class failure, the next one.
PORTS_PER_CALL = 2
# Sources whose position is remembered; beyond it the longest unused starts again at its first port.
REMEMBERED_SOURCES = 4096


class Rotation:
    """Round-robin over the healthy ports of each source."""

    def __init__(self) -> None:
        self._positions: OrderedDict[tuple[str, tuple[int, ...]], int] = OrderedDict()

    def ports_for_call(
        self, host: str, ports: Sequence[int], quarantine: Quarantine, now: float
    ) -> tuple[PortKey, ...]:
        """The one or two ports this call may use, best first.

        Args:
            host: the source's address.
            ports: its ports, at least one.
            quarantine: ports to avoid; when it holds all of them, all are candidates: never starve.
            now: the caller's clock, seconds.
        """
        source = (host, tuple(ports))
        position = self._positions.pop(source, 0)
        self._positions[source] = position + 1
        while len(self._positions) > REMEMBERED_SOURCES:
            self._positions.popitem(last=False)
        keys = [(host, port) for port in ports]
        # In turn among the candidates themselves: stepping over a sick port would give its share to the next one.
        candidates = [key for key in keys if not quarantine.holds(key, now)] or keys
        first = position % len(candidates)
        return tuple((candidates[first:] + candidates[:first])[:PORTS_PER_CALL])
