"""GroupView: which ranks a group has at one epoch. It lies in one key, and changes by compare-and-swap alone.

Every change has a new, larger epoch, across a wiped store too. So two views of one epoch are equal, and a view of a
smaller epoch than one that was seen is an old one, or that of a store which lost its data.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import Final

from ucxx_transport.errors import ProtocolError
from ucxx_transport.groups.rank_states import RankEvent, RankState, advance
from ucxx_transport.groups.stored_form import from_stored, take_count, take_text, to_stored
from ucxx_transport.schema.wire_form import WIRE_VERSION, check_version, describe, take_fields

__all__ = ["GroupView", "Seat", "ViewNews", "news_of"]

MAX_INCARNATION_CHARS: Final = 64
_ENDINGS: Final = {event.value: event for event in (RankEvent.LEAVE, RankEvent.LOSE, RankEvent.DROP)}
_SEAT_KEYS: Final = ("rank", "incarnation", "state", "awaited", "ended_by")


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """A rank's place in a view; it stays, GONE, until a new incarnation of the rank is admitted.

    Attributes:
        rank: whose.
        incarnation: which life of that rank: another word at each join.
        state: see `rank_states`.
        awaited_epoch: of the view that made it JOINING: it is ACTIVE once that one is acknowledged.
        ended_by: GONE: by LEAVE, LOSE or DROP; else None.
    """

    rank: int
    incarnation: str
    state: RankState
    awaited_epoch: int
    ended_by: RankEvent | None = None

    @classmethod
    def admitted(cls, rank: int, incarnation: str, *, before: Seat | None, epoch: int) -> Seat:
        """The seat of a new incarnation, in place of a GONE one or of none.

        Raises:
            RegistryError: the seat before it is not GONE.
        """
        state = advance(RankState.ISOLATED if before is None else before.state, RankEvent.ADMIT)
        return cls(rank=rank, incarnation=incarnation, state=state, awaited_epoch=epoch)

    def after(self, event: RankEvent) -> Seat:
        """The seat after an event that asks for nobody's acknowledgement.

        Raises:
            RegistryError: the table has no such transition.
        """
        state = advance(self.state, event)
        return replace(self, state=state, ended_by=event if state is RankState.GONE else None)

    def recalled(self, epoch: int) -> Seat:
        """The seat of an INACTIVE rank that joins once more, with the view of `epoch`.

        Raises:
            RegistryError: it is not INACTIVE.
        """
        return replace(self, state=advance(self.state, RankEvent.RECALL), awaited_epoch=epoch)


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupView:
    """The group at one epoch.

    Attributes:
        epoch: 1 or more; only grows.
        seats: by rank, one a rank.
    """

    epoch: int
    seats: tuple[Seat, ...] = ()

    @property
    def active_ranks(self) -> tuple[int, ...]:
        """The ranks that take part, in order."""
        return tuple(seat.rank for seat in self.seats if seat.state is RankState.ACTIVE)

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks that are in the group, active or not, in order."""
        return tuple(seat.rank for seat in self.seats if seat.state.is_seated)

    def seat_of(self, rank: int) -> Seat | None:
        """The rank's seat, GONE or not; None: it never had one."""
        return next((seat for seat in self.seats if seat.rank == rank), None)

    def state_of(self, rank: int) -> RankState:
        """The rank's state; ISOLATED without a seat."""
        seat = self.seat_of(rank)
        return RankState.ISOLATED if seat is None else seat.state

    def seats_incarnation(self, rank: int, incarnation: str) -> bool:
        """Whether this life of the rank is in the group."""
        seat = self.seat_of(rank)
        return seat is not None and seat.incarnation == incarnation and seat.state.is_seated

    def with_seats(self, changed: dict[int, Seat], *, epoch: int) -> GroupView:
        """A later view, with these seats in place of their ranks' earlier ones."""
        seats = {seat.rank: seat for seat in self.seats} | changed
        return GroupView(epoch=epoch, seats=tuple(seats[rank] for rank in sorted(seats)))

    def to_bytes(self) -> bytes:
        """For the store."""
        seats = [
            {
                "rank": seat.rank,
                "incarnation": seat.incarnation,
                "state": seat.state.value,
                "awaited": seat.awaited_epoch,
                "ended_by": None if seat.ended_by is None else seat.ended_by.value,
            }
            for seat in self.seats
        ]
        return to_stored({"version": WIRE_VERSION, "epoch": self.epoch, "seats": seats})

    @classmethod
    def from_bytes(cls, raw: bytes) -> GroupView:
        """From the store.

        Raises:
            ProtocolError: it is malformed, or of another version.
        """
        form = take_fields(from_stored(raw, "group view"), "group view", required=("version", "epoch", "seats"))
        check_version(form["version"], "group view")
        if not isinstance(form["seats"], list):
            raise ProtocolError(f"seats must be a list, not {describe(form['seats'])}", field="seats")
        seats = tuple(_seat_from(entry) for entry in form["seats"])
        ranks = [seat.rank for seat in seats]
        if ranks != sorted(set(ranks)):
            raise ProtocolError("seats must be in order, one a rank", field="seats")
        return cls(epoch=take_count(form["epoch"], "epoch"), seats=seats)


def _seat_from(entry: object) -> Seat:
    form = take_fields(entry, "seat", required=_SEAT_KEYS)
    try:
        state = RankState(form["state"])
        ended_by = None if form["ended_by"] is None else _ENDINGS[str(form["ended_by"])]
    except (ValueError, KeyError) as exc:
        raise ProtocolError(f"a seat of no known state: {describe(form['state'])}", field="state") from exc
    if state is RankState.ISOLATED or (state is RankState.GONE) != (ended_by is not None):
        raise ProtocolError(
            f"a seat that contradicts itself: {state.value}, {describe(form['ended_by'])}", field="state"
        )
    return Seat(
        rank=take_count(form["rank"], "rank"),
        incarnation=take_text(form["incarnation"], "incarnation", max_chars=MAX_INCARNATION_CHARS),
        state=state,
        awaited_epoch=take_count(form["awaited"], "awaited"),
        ended_by=ended_by,
    )


class ViewNews(Enum):
    """What a view that was read means to who has another one."""

    NEWER = "newer"
    SAME = "same"
    OLDER = "older"
    CONTRADICTION = "contradiction"


def news_of(seen: GroupView, known: GroupView | None) -> ViewNews:
    """Compare a view that was read with the last one applied.

    Args:
        seen: as the store has it.
        known: the last one applied; None: none yet.

    Returns:
        NEWER: apply it. SAME: nothing to do. OLDER: the store lost data; do not go back. CONTRADICTION: another view of
        the same epoch: the store lost its data, and others went on without them; start over.
    """
    if known is None or seen.epoch > known.epoch:
        return ViewNews.NEWER
    if seen.epoch < known.epoch:
        return ViewNews.OLDER
    return ViewNews.SAME if seen == known else ViewNews.CONTRADICTION
