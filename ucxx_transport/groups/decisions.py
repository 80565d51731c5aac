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

from ucxx_transport.groups.view import TRANSITIONS, GroupView, MemberRecord, RankEvent, RankState, Seat

Members = Mapping[int, MemberRecord]

AckWaits = Mapping[tuple[int, int], float]
"""Joiners whose acknowledgements are waited for: rank and epoch → when this member first saw that."""

MARGIN_S: Final = 1.0
"""How long after its lease's end a dead member's key may still be there: etcd takes up to 0.5 s, a local store less."""


def is_alive(holder: MemberRecord, *, first: MemberRecord | None, waited_s: float) -> bool:
    """Whether a rank's holder is known to live, so that the rank is refused to another process.

    It does when it came after `first`, the holder of `waited_s` ago, or when its lease, which a dead one's
    does not, has outlived its TTL since.
    """
    return first is None or holder.incarnation != first.incarnation or waited_s >= holder.ttl_s + MARGIN_S


def next_epoch(view: GroupView, members: Members) -> int:
    """Larger than the view's, and than any that a live member has applied: those of a store that was wiped too."""
    return max([view.epoch, *(record.epoch for record in members.values())]) + 1


def next_view(view: GroupView, members: Members, *, overdue: Collection[int] = ()) -> GroupView | None:
    """The view that should follow, with the `overdue_ranks` dropped; None when the present one is right."""
    epoch = next_epoch(view, members)
    changed: dict[int, Seat] = {}
    for seat in view.seats:
        is_lost = not _is_present(seat, members)
        if seat.state.is_seated and (is_lost or seat.rank in overdue):
            changed[seat.rank] = seat.after(RankEvent.LOSE if is_lost else RankEvent.DROP, epoch=epoch)
    for rank, record in members.items():
        before = changed.get(rank) or view.seat_of(rank)
        if before.incarnation != record.incarnation:
            changed[rank] = before.after(RankEvent.ADMIT, epoch=epoch, incarnation=record.incarnation)
    after = view.with_seats(changed, epoch=epoch)
    for seat in after.seats:
        if seat.state is RankState.JOINING and seat.awaited <= view.epoch and not _missing(seat, after, members):
            changed[seat.rank] = seat.after(RankEvent.ACTIVATE, epoch=epoch)
    is_behind = any(record.epoch > view.epoch for record in members.values())
    return view.with_seats(changed, epoch=epoch) if changed or is_behind else None


def _is_present(seat: Seat, members: Members) -> bool:
    """Whether the seat's life of the rank is a live member."""
    return seat.rank in members and members[seat.rank].incarnation == seat.incarnation


def _missing(joiner: Seat, view: GroupView, members: Members) -> tuple[int, ...]:
    """The ranks whose acknowledgement keeps a joiner from being active."""
    return tuple(
        seat.rank
        for seat in view.seats
        if (seat.state is RankState.ACTIVE or seat.rank == joiner.rank)
        and _is_present(seat, members)
        and members[seat.rank].epoch < joiner.awaited
    )


def awaited_ranks(view: GroupView, members: Members, rank: int) -> tuple[int, ...]:
    """The ranks that a joining one still waits for: those that must acknowledge it, or those that could admit it."""
    seat = view.seat_of(rank)
    if not _is_present(seat, members):
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
        and (seat.state, event) in TRANSITIONS
        and (incarnation is None or seat.incarnation == incarnation)
    }
    return view.with_seats(changed, epoch=epoch) if changed else None


def ack_waits(view: GroupView, known: AckWaits, now: float) -> AckWaits:
    """The waits of a view: those that are known go on, new ones begin now."""
    keys = [(seat.rank, seat.awaited) for seat in view.seats if seat.state is RankState.JOINING]
    return {key: known.get(key, now) for key in keys}  # a later incarnation's epoch is larger


def overdue_ranks(
    view: GroupView, members: Members, waits: AckWaits, *, now: float, ack_timeout_s: float
) -> frozenset[int]:
    """The ranks that have kept a joiner waiting for too long, the joiner itself among them if it has."""
    late = [rank for (rank, _), since in waits.items() if now - since >= ack_timeout_s]
    return frozenset(missing for rank in late for missing in _missing(view.seat_of(rank), view, members))


def turn_of(view: GroupView, members: Members, rank: int) -> int:
    """How many live members should have written the next view before `rank` does: 0 for one of them.

    Those in the group come first, by rank; so a joiner leaves the group's view to the group, if there is one.
    """
    in_group = [other for other in view.ranks if other in members]
    order = [*in_group, *(other for other in sorted(members) if other not in in_group)]
    return order.index(rank) if rank in order else len(order)
