"""Groups of ranks: who belongs to one, who is about to join, and how all come to agree on it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ucxx_transport.late_names import late_names

if TYPE_CHECKING:
    from ucxx_transport.groups.group import RankGroup
    from ucxx_transport.groups.group_state import GroupState, GroupStatistics, Member
    from ucxx_transport.groups.group_view import GroupView
    from ucxx_transport.groups.rank_states import RankState

_HOMES = {
    "group": ("RankGroup",),
    "group_state": ("GroupState", "GroupStatistics", "Member"),
    "group_view": ("GroupView",),
    "rank_states": ("RankState",),
}

__all__ = ["GroupState", "GroupStatistics", "GroupView", "Member", "RankGroup", "RankState"]

if not TYPE_CHECKING:  # a type checker would take any name for one of this module
    __getattr__, __dir__ = late_names(__name__, globals(), _HOMES)
