"""What a watcher has seen, in numbers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class WatcherStatistics:
    """What a watcher has seen.

    Attributes:
        sources: known now. adds, updates, removes: told, ever. resyncs: snapshots taken. resets: stores found wiped.
        failures: calls and watches that the store did not answer. malformed: records that are none.
        listener_errors: exceptions of listeners.
        synced: whether what is known is up to date, as far as the store's last answer goes.
    """

    sources: int
    adds: int
    updates: int
    removes: int
    resyncs: int
    resets: int
    failures: int
    malformed: int
    listener_errors: int
    synced: bool
