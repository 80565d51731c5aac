"""A group's keys at one moment, and what follows from them: which ranks are taken, admitted, activated or dropped.

Every live member decides alone, from what it sees; the first view that is written by compare-and-swap wins, and the
others read it. So no coordinator is needed.

A rank that has published its record is admitted (JOINING) at a new epoch. It becomes ACTIVE at a later one, when every
ACTIVE member whose lease lives, and the rank itself, has acknowledged the former. A member that has not done so
`ack_timeout_s` after the former was first seen is dropped, and no longer waited for; one without a lease is gone at
once. A dropped incarnation's seat stays, GONE, so that it is not admitted again while its lease still lives.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from ucxx_transport.errors import ProtocolError
from ucxx_transport.groups.view import NO_VIEW, TRANSITIONS, GroupView, MemberRecord, RankEvent, RankState, Seat
from ucxx_transport.membership.entries import Entry, Event, GroupKeys, Snapshot
from ucxx_transport.schema.wire_form import describe

MAX_POLICY_DIGITS: Final = 18

AckWaits = Mapping[tuple[int, int], float]  # joiners to be acknowledged: rank and epoch → when that was first seen


def parse_policy_version(value: bytes) -> int:
    """A policy version, from the store; a ProtocolError where it is no number."""
    if not value.isdigit() or len(value) > MAX_POLICY_DIGITS:
        raise ProtocolError(f"a policy version that is no number: {describe(value)}", field="policy")
    return int(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupSnapshot:
    """A group's keys at one revision of the store.

    The view is `NO_VIEW` where there is none, or none that can be read; a member's key exists while its lease lives.
    `problems` says why the values of some keys were not understood: those are as if they were not there.
    """

    group: str
    revision: int = 0
    view: GroupView = NO_VIEW
    view_revision: int = 0
    members: Mapping[int, MemberRecord] = field(default_factory=dict)
    policy_version: int | None = None
    problems: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, group: str, snapshot: Snapshot) -> GroupSnapshot:
        """From the store's snapshot of the group's prefix."""
        return cls(group=group).after(snapshot.revision, snapshot.entries)

    def after(self, revision: int, changes: Iterable[Entry]) -> GroupSnapshot:
        """The snapshot after these changes of its keys, which are all up to that revision."""
        keys, values = GroupKeys(self.group), dict[str, Any](revision=revision)
        members, problems = dict(self.members), dict(self.problems)
        for entry in changes:
            key, is_there = entry.key, not (isinstance(entry, Event) and entry.kind == "delete")
            problems.pop(key, None)
            try:
                if key == keys.view:
                    values |= {"view": NO_VIEW, "view_revision": entry.revision if is_there else 0}
                    values["view"] = GroupView.from_bytes(entry.value) if is_there else NO_VIEW
                elif key == keys.policy:
                    values["policy_version"] = None
                    values["policy_version"] = parse_policy_version(entry.value) if is_there else None
                elif (rank := keys.rank_of(key)) is not None:
                    members.pop(rank, None)
                    if is_there:
                        members[rank] = MemberRecord.from_bytes(entry.value, rank=rank, revision=entry.revision)
            except ProtocolError as error:
                problems[key] = str(error)
        return replace(self, members=members, problems=problems, **values)

    @property
    def next_epoch(self) -> int:
        """Larger than the view's, and than any that a live member has applied: those of a store that was wiped too."""
        return max([self.view.epoch, *(record.epoch for record in self.members.values())]) + 1

    def next_view(self, overdue: Collection[int] = ()) -> GroupView | None:
        """The view that should follow, with the `overdue_ranks` dropped; None when the present one is right."""
        view, epoch = self.view, self.next_epoch
        changed: dict[int, Seat] = {}
        for seat in view.seats:
            is_lost = not self._has(seat)
            if seat.state.is_seated and (is_lost or seat.rank in overdue):
                changed[seat.rank] = seat.after(RankEvent.LOSE if is_lost else RankEvent.DROP, epoch=epoch)
        for rank, record in self.members.items():
            before = changed.get(rank) or view.seat_of(rank)
            if before.incarnation != record.incarnation:
                changed[rank] = before.after(RankEvent.ADMIT, epoch=epoch, incarnation=record.incarnation)
        after = view.with_seats(changed, epoch=epoch)
        for seat in after.seats:
            if seat.state is RankState.JOINING and seat.awaited <= view.epoch and not self._missing(seat, after):
                changed[seat.rank] = seat.after(RankEvent.ACTIVATE, epoch=epoch)
        return view.with_seats(changed, epoch=epoch) if changed or epoch > view.epoch + 1 else None

    def view_after(
        self, event: RankEvent, ranks: Collection[int], *, incarnation: str | None = None
    ) -> GroupView | None:
        """The view after RECALL, DEACTIVATE or LEAVE of this life of the ranks or (None) any; None: no change."""
        epoch = self.next_epoch
        changed = {
            seat.rank: seat.after(event, epoch=epoch)
            for seat in self.view.seats
            if seat.rank in ranks
            and (seat.state, event) in TRANSITIONS
            and (incarnation is None or seat.incarnation == incarnation)
        }
        return self.view.with_seats(changed, epoch=epoch) if changed else None

    def awaited_ranks(self, rank: int) -> tuple[int, ...]:
        """The ranks that a joining one still waits for: those to acknowledge it, or those that could admit it."""
        seat = self.view.seat_of(rank)
        if not self._has(seat):
            return tuple(other for other in sorted(self.members) if other != rank)
        return self._missing(seat, self.view)

    def ack_waits(self, known: AckWaits, now: float) -> AckWaits:
        """The waits of the view: those that are known go on, new ones begin now."""
        keys = [(seat.rank, seat.awaited) for seat in self.view.seats if seat.state is RankState.JOINING]
        return {key: known.get(key, now) for key in keys}  # a later incarnation's epoch is larger

    def overdue_ranks(self, waits: AckWaits, *, now: float, ack_timeout_s: float) -> frozenset[int]:
        """The ranks that have kept a joiner waiting for too long, the joiner itself among them if it has."""
        late = [self.view.seat_of(rank) for (rank, _), since in waits.items() if now - since >= ack_timeout_s]
        return frozenset(missing for joiner in late for missing in self._missing(joiner, self.view))

    def turn_of(self, rank: int) -> int:
        """How many live members should write the next view before `rank` does: those in the group first, by rank."""
        in_group = [other for other in self.view.ranks if other in self.members]
        order = [*in_group, *(other for other in sorted(self.members) if other not in in_group)]
        return order.index(rank) if rank in order else len(order)

    def _has(self, seat: Seat) -> bool:
        """Whether the seat's life of the rank is a live member."""
        return seat.rank in self.members and self.members[seat.rank].incarnation == seat.incarnation

    def _missing(self, joiner: Seat, view: GroupView) -> tuple[int, ...]:
        """The ranks of that view whose acknowledgement keeps a joiner from being active."""
        return tuple(
            seat.rank
            for seat in view.seats
            if (seat.state is RankState.ACTIVE or seat.rank == joiner.rank)
            and self._has(seat)
            and self.members[seat.rank].epoch < joiner.awaited
        )
