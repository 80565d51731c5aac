"""What a program is told of its group: its state, its members, counts, and what changes from one view to the next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ucxx_transport.groups.group_picture import GroupPicture
from ucxx_transport.groups.group_view import GroupView, Seat
from ucxx_transport.groups.rank_states import RankState

__all__ = ["GroupState", "GroupStatistics", "Member", "arrived", "departed", "members_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A rank that is in the group.

    Attributes:
        rank: whose.
        state: JOINING, ACTIVE or INACTIVE.
        incarnation: which life of that rank: another one at each join.
        address: where it said that it can be reached; "" when it did not.
        meta: what else it said.
    """

    rank: int
    state: RankState
    incarnation: str
    address: str = ""
    meta: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupState:
    """A group as one of its ranks has it at one moment.

    Attributes:
        group: its name.
        rank: this process's.
        state: of this rank.
        epoch: of the view that was applied last; 0 before the first.
        active_ranks: those that take part, in order.
        members: by rank: all that are in the group, active or not, this rank too.
        policy_version: what the group trains; None: nobody has said.
    """

    group: str
    rank: int
    state: RankState
    epoch: int
    active_ranks: tuple[int, ...]
    members: Mapping[int, Member]
    policy_version: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupStatistics:
    """What a rank has seen of its group, over all its joins.

    Attributes:
        views: applied. written: those of them that this rank wrote.
        admitted: ranks given a seat, those that came back included. activated: ranks that became active.
        left, lost, dropped: ranks gone by themselves, by the end of their lease, for want of an acknowledgement.
        conflicts: writes that another member's had overtaken.
        outages: times that the store could not be reached.
        callback_errors: exceptions of callbacks.
    """

    views: int = 0
    written: int = 0
    admitted: int = 0
    activated: int = 0
    left: int = 0
    lost: int = 0
    dropped: int = 0
    conflicts: int = 0
    outages: int = 0
    callback_errors: int = 0


def members_of(view: GroupView | None, picture: GroupPicture | None) -> dict[int, Member]:
    """Who is in the group, with what each says of itself."""
    seats = [] if view is None else [seat for seat in view.seats if seat.state.is_seated]
    return {seat.rank: _member(seat, picture) for seat in seats}


def _member(seat: Seat, picture: GroupPicture | None) -> Member:
    record = None if picture is None else picture.members.get(seat.rank)
    if record is None or record.incarnation != seat.incarnation:
        return Member(rank=seat.rank, state=seat.state, incarnation=seat.incarnation)
    return Member(
        rank=seat.rank,
        state=seat.state,
        incarnation=seat.incarnation,
        address=record.address,
        meta=record.meta,
    )


def arrived(before: GroupView | None, after: GroupView) -> tuple[Seat, ...]:
    """The seats of incarnations that are in the group now and were not."""
    return tuple(
        seat
        for seat in after.seats
        if seat.state.is_seated and (before is None or not before.seats_incarnation(seat.rank, seat.incarnation))
    )


def departed(before: GroupView | None, after: GroupView) -> tuple[Seat, ...]:
    """The earlier seats of incarnations that were in the group and are not any more."""
    seats = () if before is None else before.seats
    return tuple(
        seat for seat in seats if seat.state.is_seated and not after.seats_incarnation(seat.rank, seat.incarnation)
    )
