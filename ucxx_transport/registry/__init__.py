"""Membership: who serves which ring, kept in a store under leases, and who belongs to a group.

Each name is imported when it is first used: the process that keeps a lease must be there in no time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ucxx_transport.late_names import late_names

if TYPE_CHECKING:
    from ucxx_transport.registry.groups.group import RankGroup
    from ucxx_transport.registry.groups.group_state import GroupState, GroupStatistics, Member
    from ucxx_transport.registry.groups.group_view import GroupView
    from ucxx_transport.registry.groups.rank_states import RankState
    from ucxx_transport.registry.opening import open_store
    from ucxx_transport.registry.publishable import Offer, Publishable
    from ucxx_transport.registry.publisher import HeartbeatPublisher
    from ucxx_transport.registry.publisher_board import PublisherState, PublisherStatistics
    from ucxx_transport.registry.replica_monitor import ReplicaMonitor
    from ucxx_transport.registry.signals import exit_on_sigterm
    from ucxx_transport.registry.source_record import SourceRecord, SourceStatus
    from ucxx_transport.registry.store import Batch, Entry, Event, Lease, Snapshot, Store, Watch
    from ucxx_transport.registry.watcher import SourceWatcher
    from ucxx_transport.registry.watcher_statistics import WatcherStatistics

_HOMES = {
    "groups.group": ("RankGroup",),
    "groups.group_state": ("GroupState", "GroupStatistics", "Member"),
    "groups.group_view": ("GroupView",),
    "opening": ("open_store",),
    "publishable": ("Offer", "Publishable"),
    "publisher": ("HeartbeatPublisher",),
    "publisher_board": ("PublisherState", "PublisherStatistics"),
    "groups.rank_states": ("RankState",),
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
    "GroupState",
    "GroupStatistics",
    "GroupView",
    "HeartbeatPublisher",
    "Lease",
    "Member",
    "Offer",
    "Publishable",
    "PublisherState",
    "PublisherStatistics",
    "RankGroup",
    "RankState",
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
