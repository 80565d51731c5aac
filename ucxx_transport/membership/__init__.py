"""Membership: who serves which ring, kept in a store under leases.

Each name is imported when it is first used: the process that keeps a lease must be there in no time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ucxx_transport.late_names import late_names

if TYPE_CHECKING:
    from ucxx_transport.membership.opening import open_store
    from ucxx_transport.membership.publishable import Offer, Publishable
    from ucxx_transport.membership.publisher import HeartbeatPublisher
    from ucxx_transport.membership.publisher_board import PublisherState, PublisherStatistics
    from ucxx_transport.membership.replica_monitor import ReplicaMonitor
    from ucxx_transport.membership.signals import exit_on_sigterm
    from ucxx_transport.membership.source_record import SourceRecord, SourceStatus
    from ucxx_transport.membership.store import Batch, Entry, Event, Lease, Snapshot, Store, Watch
    from ucxx_transport.membership.watcher import SourceWatcher
    from ucxx_transport.membership.watcher_statistics import WatcherStatistics

_HOMES = {
    "opening": ("open_store",),
    "publishable": ("Offer", "Publishable"),
    "publisher": ("HeartbeatPublisher",),
    "publisher_board": ("PublisherState", "PublisherStatistics"),
    "replica_monitor": ("ReplicaMonitor",),
    "signals": ("exit_on_sigterm",),
    "source_record": ("SourceRecord", "SourceStatus"),
    "store": ("Batch", "Entry", "Event", "Lease", "Snapshot", "Store", "Watch"),
    "watcher": ("SourceWatcher",),
    "watcher_statistics": ("WatcherStatistics",),
}

__all__ = [
    "Batch",
    "Entry",
    "Event",
    "HeartbeatPublisher",
    "Lease",
    "Offer",
    "Publishable",
    "PublisherState",
    "PublisherStatistics",
    "ReplicaMonitor",
    "Snapshot",
    "SourceRecord",
    "SourceStatus",
    "SourceWatcher",
    "Store",
    "Watch",
    "WatcherStatistics",
    "exit_on_sigterm",
    "open_store",
]

if not TYPE_CHECKING:  # a type checker would take any name for one of this module
    __getattr__, __dir__ = late_names(__name__, globals(), _HOMES)
