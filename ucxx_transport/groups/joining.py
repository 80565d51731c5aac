"""Who is admitted to a group, who becomes active, who is dropped: decisions over values and `now`.

Any live member takes them, alone, from what it sees; whoever's view is the first to be written has decided, and the
others look again. So they need no coordinator, and may be taken by many at once.

A rank that has published itself is admitted (JOINING) at a new epoch. It becomes ACTIVE at a later one, when every
ACTIVE member whose lease lives, and the rank itself, has acknowledged the former. Who has not done so
`ack_timeout_s` after the former was first seen is dropped, and no longer waited for; and who has no lease any more is
gone at once. A dropped incarnation's seat stays, GONE, so that it is not admitted again while its lease still lives.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import Enum

from ucxx_transport.groups.group_view import GroupView, Seat
from ucxx_transport.groups.member_record import MemberRecord
from ucxx_transport.groups.rank_states import RankEvent, RankState

__all__ = [
    "AckWait",
    "Claim",
    "judge_claim",
    "next_epoch",
    "next_view",
    "overdue_ranks",
    "turn_of",
    "view_after",
    "waited_for",
    "waits_of",
]

Members = Mapping[int, MemberRecord]


class Claim(Enum):
    """What becomes of a claim to a rank."""

    TAKE = "take"
    WAIT = "wait"
    REFUSE = "refuse"


def judge_claim(holder: MemberRecord | None, *, first: MemberRecord | None, waited_s: float, margin_s: float) -> Claim:
    """Whether a rank may be taken.

    Args:
        holder: who has it now: a member whose lease has not ended, which a dead one's has not until its TTL is over.
        first: who had it at the first look; None: it was free.
        waited_s: since the first look.
        margin_s: how long after its end a lease's keys may still be seen.

    Returns:
        TAKE: it is free. WAIT: the holder may be dead, and its lease not over yet. REFUSE: it lives: it came after the
        first look, or its lease has outlived its TTL since.
    """
    if holder is None:
        return Claim.TAKE
    if first is None or holder.incarnation != first.incarnation or waited_s >= holder.ttl_s + margin_s:
        return Claim.REFUSE
    return Claim.WAIT


def next_epoch(view: GroupView | None, members: Members) -> int:
    """Larger than the view's, and than any that a live member has applied: those of a store that was wiped too."""
    return max([0 if view is None else view.epoch, *(record.epoch for record in members.values())]) + 1


def next_view(view: GroupView | None, members: Members, *, overdue: Collection[int] = ()) -> GroupView | None:
    """The view that should follow.

    Args:
        view: the present one; None: there is none.
        members: those whose lease lives.
        overdue: ranks whose acknowledgement was waited for long enough: see `overdue_ranks`.

    Returns:
        None when the present one is right.
    """
    before = GroupView(epoch=0) if view is None else view
    epoch = next_epoch(view, members)
    changed: dict[int, Seat] = {}
    for seat in before.seats:
        ending = _ending(seat, members, overdue)
        if ending is not None:
            changed[seat.rank] = seat.after(ending)
    for rank, record in members.items():
        seat_before = changed.get(rank) or before.seat_of(rank)
        if seat_before is None or seat_before.incarnation != record.incarnation:
            changed[rank] = Seat.admitted(rank, record.incarnation, before=seat_before, epoch=epoch)
    after = before.with_seats(changed, epoch=epoch)
    joiners = [seat for seat in after.seats if seat.state is RankState.JOINING and seat.awaited_epoch <= before.epoch]
    changed |= {seat.rank: seat.after(RankEvent.ACTIVATE) for seat in joiners if not _missing(seat, after, members)}
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


def waited_for(view: GroupView | None, members: Members, rank: int) -> tuple[int, ...]:
    """Whom a rank that joins still waits for: those who must acknowledge it, or those who could admit it."""
    seat = None if view is None else view.seat_of(rank)
    record = members.get(rank)
    if view is None or seat is None or record is None or seat.incarnation != record.incarnation:
        return tuple(other for other in sorted(members) if other != rank)
    return _missing(seat, view, members)


def view_after(view: GroupView, members: Members, event: RankEvent, ranks: Collection[int]) -> GroupView | None:
    """The view after something was asked for: ranks RECALLed, DEACTIVATEd, or one that LEAVEs.

    Returns:
        None when nothing changes.

    Raises:
        RegistryError: a rank's state does not allow it.
    """
    epoch = next_epoch(view, members)
    seats = [seat for seat in view.seats if seat.rank in ranks]
    changed = {seat.rank: seat.recalled(epoch) if event is RankEvent.RECALL else seat.after(event) for seat in seats}
    return view.with_seats(changed, epoch=epoch) if changed else None


@dataclass(frozen=True, slots=True, kw_only=True)
class AckWait:
    """A joiner whose acknowledgements are waited for.

    Attributes:
        rank, incarnation, epoch: the joiner, and the epoch that is to be acknowledged.
        since: when this member first saw it; later, when the store was out of reach meanwhile.
    """

    rank: int
    incarnation: str
    epoch: int
    since: float


def waits_of(view: GroupView | None, known: Collection[AckWait], now: float) -> tuple[AckWait, ...]:
    """The waits of a view: those that are known go on, new ones begin now."""
    since = {(wait.rank, wait.incarnation, wait.epoch): wait.since for wait in known}
    joiners = [] if view is None else [seat for seat in view.seats if seat.state is RankState.JOINING]
    return tuple(
        AckWait(
            rank=seat.rank,
            incarnation=seat.incarnation,
            epoch=seat.awaited_epoch,
            since=since.get((seat.rank, seat.incarnation, seat.awaited_epoch), now),
        )
        for seat in joiners
    )


def overdue_ranks(
    view: GroupView | None, members: Members, waits: Collection[AckWait], *, now: float, ack_timeout_s: float
) -> frozenset[int]:
    """The ranks that have let a joiner wait for too long, the joiner itself among them if it has."""
    late: set[int] = set()
    for wait in waits:
        seat = None if view is None else view.seat_of(wait.rank)
        if view is not None and seat is not None and now - wait.since >= ack_timeout_s:
            late.update(_missing(seat, view, members))
    return frozenset(late)


def turn_of(view: GroupView | None, members: Members, rank: int) -> int:
    """How many live members should have written the next view before `rank` does: 0 for one of them.

    Those in the group come first, by rank; so a joiner leaves the group's view to the group, if there is one.
    """
    in_group = [] if view is None else [r for r in view.ranks if r in members]
    order = [*in_group, *(other for other in sorted(members) if other not in in_group)]
    return order.index(rank) if rank in order else len(order)
