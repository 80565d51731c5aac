"""Decisions of a group, over values and `now`: which ranks are taken, admitted, activated or dropped.

Every live member takes them alone, from what it sees; the first view that is written by compare-and-swap wins, and the
others read it. So no coordinator is needed.

A rank that has published its record is admitted (JOINING) at a new epoch. It becomes ACTIVE at a later one, when every
ACTIVE member whose lease lives, and the rank itself, has acknowledged the former. A member that has not done so
`ack_timeout_s` after the former was first seen is dropped, and no longer waited for; one without a lease is gone at
once. A dropped incarnation's seat stays, GONE, so that it is not admitted again while its lease still lives.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Final

from ucxx_transport.groups.states import RankEvent, RankState
from ucxx_transport.groups.view import GroupView, MemberRecord, Seat

Members = Mapping[int, MemberRecord]

AckWaits = Mapping[tuple[int, int], float]
"""Joiners whose acknowledgements are waited for: rank and epoch → when this member first saw that."""

MARGIN_S: Final = 1.0
"""How long after its lease's end a dead member's key may still be there: etcd takes up to 0.5 s, a local store less."""

_CONCERNS: Final = {
    RankEvent.RECALL: (RankState.INACTIVE,),
    RankEvent.DEACTIVATE: (RankState.JOINING, RankState.ACTIVE),
    RankEvent.LEAVE: (RankState.JOINING, RankState.ACTIVE, RankState.INACTIVE),
}
"""The states that a request concerns: the other ranks are already as is wished, or must become so by themselves."""


def is_alive(holder: MemberRecord, *, first: MemberRecord | None, waited_s: float) -> bool:
    """Whether a rank's holder is known to live, so that the rank is refused to another process.

    It does when it came after `first`, the holder of `waited_s` ago, or when its lease, which a dead one's
    does not, has outlived its TTL since.
    """
    return first is None or holder.incarnation != first.incarnation or waited_s >= holder.ttl_s + MARGIN_S


def next_epoch(view: GroupView | None, members: Members) -> int:
    """Larger than the view's, and than any that a live member has applied: those of a store that was wiped too."""
    return max([0 if view is None else view.epoch, *(record.epoch for record in members.values())]) + 1


def next_view(view: GroupView | None, members: Members, *, overdue: Collection[int] = ()) -> GroupView | None:
    """The view that should follow, with the `overdue_ranks` dropped; None when the present one is right."""
    before = GroupView(epoch=0) if view is None else view
    epoch = next_epoch(view, members)
    changed: dict[int, Seat] = {}
    for seat in before.seats:
        ending = _ending(seat, members, overdue)
        if ending is not None:
            changed[seat.rank] = seat.after(ending, epoch=epoch)
    for rank, record in members.items():
        seat_before = changed.get(rank) or before.seat_of(rank)
        if seat_before is None or seat_before.incarnation != record.incarnation:
            changed[rank] = Seat.admitted(rank, record.incarnation, before=seat_before, epoch=epoch)
    after = before.with_seats(changed, epoch=epoch)
    joiners = [seat for seat in after.seats if seat.state is RankState.JOINING and seat.awaited_epoch <= before.epoch]
    known = [seat for seat in joiners if not _missing(seat, after, members)]
    changed |= {seat.rank: seat.after(RankEvent.ACTIVATE, epoch=epoch) for seat in known}
    is_behind = any(record.epoch > before.epoch for record in members.values())
    return before.with_seats(changed, epoch=epoch) if changed or is_behind else None


def _ending(seat: Seat, members: Members, overdue: Collection[int]) -> RankEvent | None:
    if not seat.state.is_seated:
        return None
    record = members.get(seat.rank)
    if record is None or record.incarnation != seat.incarnation:
        return RankEvent.LOSE
    return RankEvent.DROP if seat.rank in overdue else None


def _missing(joiner: Seat, view: GroupView, members: Members) -> tuple[int, ...]:
    """The ranks whose acknowledgement keeps a joiner from being active."""
    return tuple(
        seat.rank
        for seat in view.seats
        if (seat.state is RankState.ACTIVE or seat.rank == joiner.rank)
        and (record := members.get(seat.rank)) is not None
        and record.incarnation == seat.incarnation
        and record.epoch < joiner.awaited_epoch
    )


def awaited_ranks(view: GroupView | None, members: Members, rank: int) -> tuple[int, ...]:
    """The ranks that a joining one still waits for: those that must acknowledge it, or those that could admit it."""
    seat = None if view is None else view.seat_of(rank)
    record = members.get(rank)
    if view is None or seat is None or record is None or seat.incarnation != record.incarnation:
        return tuple(other for other in sorted(members) if other != rank)
    return _missing(seat, view, members)


def view_after(
    view: GroupView, members: Members, event: RankEvent, ranks: Collection[int], *, incarnation: str | None = None
) -> GroupView | None:
    """The view after RECALL, DEACTIVATE or LEAVE of this life of the ranks or (None) any; None: no change."""
    epoch = next_epoch(view, members)
    changed = {
        seat.rank: seat.after(event, epoch=epoch)
        for seat in view.seats
        if seat.rank in ranks
        and seat.state in _CONCERNS[event]
        and (incarnation is None or seat.incarnation == incarnation)
    }
    return view.with_seats(changed, epoch=epoch) if changed else None


def ack_waits(view: GroupView | None, known: AckWaits, now: float) -> AckWaits:
    """The waits of a view: those that are known go on, new ones begin now."""
    joiners = [] if view is None else [seat for seat in view.seats if seat.state is RankState.JOINING]
    keys = [(seat.rank, seat.awaited_epoch) for seat in joiners]  # a later incarnation's epoch is larger
    return {key: known.get(key, now) for key in keys}


def overdue_ranks(
    view: GroupView | None, members: Members, waits: AckWaits, *, now: float, ack_timeout_s: float
) -> frozenset[int]:
    """The ranks that have kept a joiner waiting for too long, the joiner itself among them if it has."""
    late: set[int] = set()
    for (rank, _), since in waits.items():
        seat = None if view is None else view.seat_of(rank)
        if view is not None and seat is not None and now - since >= ack_timeout_s:
            late.update(_missing(seat, view, members))
    return frozenset(late)


def turn_of(view: GroupView | None, members: Members, rank: int) -> int:
    """How many live members should have written the next view before `rank` does: 0 for one of them.

    Those in the group come first, by rank; so a joiner leaves the group's view to the group, if there is one.
    """
    in_group = [] if view is None else [other for other in view.ranks if other in members]
    order = [*in_group, *(other for other in sorted(members) if other not in in_group)]
    return order.index(rank) if rank in order else len(order)
