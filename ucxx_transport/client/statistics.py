"""Statistics of a client: counts, each loss with its reason."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Final

import numpy as np

from ucxx_transport.client.payload import Transport
from ucxx_transport.errors import DeadlineExceededError, StaleSlotError, TransportError

KEPT_DURATIONS: Final = 4096
"""Reads of each way whose durations are kept for the percentiles."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WayStatistics:
    """Delivered payloads that came one way, since the client was made.

    Attributes:
        reads: how many.
        nbytes: their bytes.
        p50_s: median of the seconds from the call to the payload, over the last 4096 of them. Of payloads read
            together each counts from the common call.
        p95_s: the same for 95 %.
        p99_s: the same for 99 %.
    """

    reads: int
    nbytes: int
    p50_s: float
    p95_s: float
    p99_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientStatistics:
    """A snapshot of a client's counts since it was made.

    Attributes:
        reads: delivered payloads.
        views: of those, read in place.
        copies: of those, copied out of a ring of this host.
        ucx: of those, fetched over UCX.
        bytes_read: bytes of all of them.
        failed: reads that raised.
        stale: payloads gone before they were read.
        duplicates: dropped by name.
        deadlines: reads whose deadline passed.
        timeouts: attempts that ended by their time. Here and below one read may count several, and takes and discards
            count theirs.
        peers_lost: attempts whose connection failed.
        busy: attempts answered BUSY.
        not_ready: attempts answered NOT_READY.
        protocol_errors: attempts whose answer broke the protocol.
        checksum_errors: attempts whose bytes had changed.
        unauthorized: attempts with another token.
        rotations: calls that went on at a second port.
        retries: fresh calls of the slot layer.
        quarantined: ports put into quarantine.
        discarded: payloads discarded unread.
        connections: opened.
        aged_out: idle connections closed for their age.
        confirms: late acknowledgements sent again.
        fallbacks: local reads that went over UCX instead.
        leaked_buffers: buffers that UCX never gave back.
        pooled_endpoints: idle connections now.
        lent_buffers: in use now.
        idle_buffer_bytes: kept for reuse now.
        transports: what open UCX endpoints really use.
        ways: by "view", "copy" and "ucx", the transports that payloads have come by.
    """

    reads: int = 0
    views: int = 0
    copies: int = 0
    ucx: int = 0
    bytes_read: int = 0
    failed: int = 0
    stale: int = 0
    duplicates: int = 0
    deadlines: int = 0
    timeouts: int = 0
    peers_lost: int = 0
    busy: int = 0
    not_ready: int = 0
    protocol_errors: int = 0
    checksum_errors: int = 0
    unauthorized: int = 0
    rotations: int = 0
    retries: int = 0
    quarantined: int = 0
    discarded: int = 0
    connections: int = 0
    aged_out: int = 0
    confirms: int = 0
    fallbacks: int = 0
    leaked_buffers: int = 0
    pooled_endpoints: int = 0
    lent_buffers: int = 0
    idle_buffer_bytes: int = 0
    transports: tuple[str, ...] = field(default=())
    ways: Mapping[str, WayStatistics] = field(default_factory=dict)


_COUNTERS = tuple(spec.name for spec in fields(ClientStatistics) if spec.name not in ("transports", "ways"))
_COUNTED_AS: Final[dict[Transport, str]] = {"view": "views", "copy": "copies", "ucx": "ucx"}


class Way:
    """Delivered payloads that came one way; of the last of them, how long each took."""

    def __init__(self) -> None:
        self.reads = self.nbytes = 0
        self.recent_s: deque[float] = deque(maxlen=KEPT_DURATIONS)


class ClientCounters:
    """The running counts. Use `delivered`, not `ways`; but what UCX brings is counted by the reactor's one thread."""

    def __init__(self) -> None:
        self._counts = dict.fromkeys(_COUNTERS, 0)
        self.ways: dict[Transport, Way] = {name: Way() for name in _COUNTED_AS}
        self._lock = threading.Lock()

    def add(self, name: str, amount: int = 1) -> None:
        with self._lock:  # a client that several threads share counts in all of them
            self._counts[name] += amount

    def delivered(self, transport: Transport, nbytes: int, took_s: float) -> None:
        """Count one delivered payload; `took_s` is seconds from the call."""
        way = self.ways[transport]
        # Without the lock, which takes as long as six calls: nothing is called in between, so no other thread runs.
        way.reads += 1
        way.nbytes += nbytes
        way.recent_s.append(took_s)

    def failed(self, error: TransportError) -> None:
        """Count one read that has ended with an error."""
        self.add("failed")
        if isinstance(error, StaleSlotError):
            self.add("duplicates" if "delivered" in error.facts else "stale")
        elif isinstance(error, DeadlineExceededError):
            self.add("deadlines")

    def snapshot(self, **gauges: object) -> ClientStatistics:
        """The counts now, with what is measured rather than counted filled in."""
        ways: dict[str, WayStatistics] = {}
        with self._lock:
            counts = dict(self._counts)
            for name, way in self.ways.items():
                recent_s = way.recent_s.copy()  # in one step: it may be appended to meanwhile
                counts[_COUNTED_AS[name]] = way.reads
                counts["reads"] += way.reads
                counts["bytes_read"] += way.nbytes
                if recent_s:
                    p50_s, p95_s, p99_s = np.percentile(recent_s, (50, 95, 99)).tolist()
                    ways[name] = WayStatistics(
                        reads=way.reads, nbytes=way.nbytes, p50_s=p50_s, p95_s=p95_s, p99_s=p99_s
                    )
        return replace(ClientStatistics(**counts, ways=ways), **gauges)  # type: ignore[arg-type]  # gauges are its own fields
