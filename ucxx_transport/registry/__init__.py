"""Membership: who serves which ring, kept in a store under leases, and who belongs to a group.

Each name is imported when it is first used: who only opens a store does not load what a group needs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ucxx_transport.registry.group import RankGroup
    from ucxx_transport.registry.group_state import GroupState, GroupStatistics, Member
    from ucxx_transport.registry.group_view import GroupView
    from ucxx_transport.registry.opening import open_store
    from ucxx_transport.registry.rank_states import RankState
    from ucxx_transport.registry.replica_monitor import ReplicaMonitor
    from ucxx_transport.teardown import teardown, teardown_async

_HOME_OF = {
    "GroupState": "ucxx_transport.registry.group_state",
    "GroupStatistics": "ucxx_transport.registry.group_state",
    "GroupView": "ucxx_transport.registry.group_view",
    "Member": "ucxx_transport.registry.group_state",
    "RankGroup": "ucxx_transport.registry.group",
    "RankState": "ucxx_transport.registry.rank_states",
    "ReplicaMonitor": "ucxx_transport.registry.replica_monitor",
    "open_store": "ucxx_transport.registry.opening",
    "teardown": "ucxx_transport.teardown",
    "teardown_async": "ucxx_transport.teardown",
}

__all__ = [
    "GroupState",
    "GroupStatistics",
    "GroupView",
    "Member",
    "RankGroup",
    "RankState",
    "ReplicaMonitor",
    "open_store",
    "teardown",
    "teardown_async",
]


if not TYPE_CHECKING:  # a type checker would take any name for one of this module

    def __getattr__(name: str) -> object:
        """Import a public name on its first use (PEP 562)."""
        home = _HOME_OF.get(name)
        if home is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        value = globals()[name] = getattr(import_module(home), name)
        return value


def __dir__() -> list[str]:
    """The public names, loaded or not."""
    return sorted(set(globals()) | set(__all__))
