"""What a client has done: counts, each loss with its reason."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, fields, replace


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientStatistics:
    """A snapshot of a client's counts since it was made.

    Attributes:
        reads: delivered payloads. views, copies, ucx: of those, by way of transport. bytes_read: their bytes.
        failed: reads that raised. stale: payloads gone before they were read. duplicates: dropped by name.
        deadlines: reads whose deadline passed. timeouts, peers_lost, busy, not_ready, protocol_errors, checksum_errors,
        unauthorized: failed attempts by reason; one read may count several.
        rotations: calls that went on at a second port. retries: fresh calls of the slot layer.
        quarantined: ports put into quarantine. discarded: payloads let go unread.
        connections: opened. aged_out: idle endpoints closed for their age.
        confirms: late acknowledgements sent again. fallbacks: local reads that went over UCX instead.
        parked_buffers: buffers that UCX never gave back. pooled_endpoints: idle now. lent_buffers: out now.
        idle_buffer_bytes: kept for reuse now. transports: what open UCX endpoints really use.
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
    parked_buffers: int = 0
    pooled_endpoints: int = 0
    lent_buffers: int = 0
    idle_buffer_bytes: int = 0
    transports: tuple[str, ...] = field(default=())


_COUNTERS = tuple(spec.name for spec in fields(ClientStatistics) if spec.name != "transports")


class ClientCounters:
    """The running counts behind `ClientStatistics`."""

    __slots__ = ("_counts", "_lock")

    def __init__(self) -> None:
        self._counts = dict.fromkeys(_COUNTERS, 0)
        self._lock = threading.Lock()

    def add(self, name: str, amount: int = 1) -> None:
        """Count `amount` more of `name`."""
        with self._lock:  # the sync client counts in its caller's threads and in its loop's
            self._counts[name] += amount

    def delivered(self, way: str, nbytes: int) -> None:
        """Count one delivered payload: `way` is "views", "copies" or "ucx"."""
        counts = self._counts
        with self._lock:
            counts["reads"] += 1
            counts[way] += 1
            counts["bytes_read"] += nbytes

    def snapshot(self, **gauges: object) -> ClientStatistics:
        """The counts now, with what is measured rather than counted filled in."""
        return replace(ClientStatistics(**self._counts), **gauges)  # type: ignore[arg-type]  # gauges are its own fields
