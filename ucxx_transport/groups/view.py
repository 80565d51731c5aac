"""The states of a rank, and the values of a group in its store: the view, the records of its members.

`TRANSITIONS` is the table of the states; what each event means stands beside it.

Every change of the view has a larger epoch, across a wiped store too. So two views of one epoch are equal, and a view
of a smaller epoch than one that was seen is an old one, or that of a store which lost its data.

Values are JSON, so that an operator can read them with the store's own tools. The writers of a store are trusted not
to be hostile, but not to be of this version: keys and types are checked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from types import MappingProxyType
from typing import Final

from ucxx_transport.errors import ConfigError, ProtocolError, RegistryError
from ucxx_transport.membership.entries import MAX_VALUE_BYTES
from ucxx_transport.schema import wire_form
from ucxx_transport.schema.wire_form import describe, refuse, untrusted

MAX_INCARNATION_CHARS: Final = 64
MAX_ADDRESS_CHARS: Final = 1024


class RankState(StrEnum):
    """What a rank is to its group. The values are part of the stored view."""

    ISOLATED = "isolated"
    JOINING = "joining"
    ACTIVE = "active"
    INACTIVE = "inactive"
    GONE = "gone"

    @property
    def is_seated(self) -> bool:
        """Whether the rank is in the group, active or not."""
        return self in (RankState.JOINING, RankState.ACTIVE, RankState.INACTIVE)


class RankEvent(StrEnum):
    """What can happen to a rank. The values are part of the stored view."""

    ADMIT = "admit"  # it, or a new incarnation of it, has published itself, and the view has a seat for it
    ACTIVATE = "activate"  # all live active members, and the rank itself, have acknowledged that it joins
    DEACTIVATE = "deactivate"  # `deactivate_ranks`, before it was active too
    RECALL = "recall"  # `activate_ranks`: it joins once more, and all acknowledge it
    LEAVE = "leave"  # it left, or gave up waiting
    LOSE = "lose"  # its lease ended: it died, or was cut off from the store for as long
    DROP = "drop"  # its lease lives, but it did not acknowledge in time that a rank joins; an INACTIVE one need not


_ENDS: Final = (RankEvent.LEAVE, RankEvent.LOSE, RankEvent.DROP)

TRANSITIONS: Final[Mapping[tuple[RankState, RankEvent], RankState]] = MappingProxyType(
    {
        (RankState.ISOLATED, RankEvent.ADMIT): RankState.JOINING,
        (RankState.GONE, RankEvent.ADMIT): RankState.JOINING,
        (RankState.JOINING, RankEvent.ACTIVATE): RankState.ACTIVE,
        (RankState.JOINING, RankEvent.DEACTIVATE): RankState.INACTIVE,
        (RankState.ACTIVE, RankEvent.DEACTIVATE): RankState.INACTIVE,
        (RankState.INACTIVE, RankEvent.RECALL): RankState.JOINING,
        **{(state, RankEvent.LEAVE): RankState.GONE for state in RankState if state.is_seated},
        **{(state, RankEvent.LOSE): RankState.GONE for state in RankState if state.is_seated},
        (RankState.JOINING, RankEvent.DROP): RankState.GONE,
        (RankState.ACTIVE, RankEvent.DROP): RankState.GONE,
    }
)


def advance(state: RankState, event: RankEvent) -> RankState:
    """The state after `event`: the only maker of states. A RegistryError: the table has no such transition."""
    after = TRANSITIONS.get((state, event))
    if after is None:
        raise RegistryError(f"a rank cannot {event.name} while {state.name}", state=state.name, event=event.name)
    return after


def _check(value: object, *counts: str, **texts: int) -> None:
    """Refuse fields that are no numbers from 0 on, and those that are no texts of at most so many characters."""
    for name in counts:
        if not wire_form.is_unsigned(count := getattr(value, name), 63):
            refuse(name, count, "a number from 0 on")
    for name, max_chars in texts.items():
        if not isinstance(text := getattr(value, name), str) or len(text) > max_chars:
            refuse(name, text, f"text of at most {max_chars} characters")


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """A rank's place in a view; it stays, GONE, until a new incarnation of the rank is admitted.

    Attributes:
        incarnation: which life of that rank: a new word at each join; "" where there was none.
        awaited: the epoch of the view that made it JOINING: it is ACTIVE once that one is acknowledged.
        ended_by: GONE: by LEAVE, LOSE or DROP; else None.
    """

    rank: int
    incarnation: str = ""
    state: RankState = RankState.ISOLATED
    awaited: int = 0
    ended_by: RankEvent | None = None

    def __post_init__(self) -> None:
        """Refuse what no rank can have, by a ConfigError, as all values here do: a store has what others wrote."""
        _check(self, "rank", "awaited", incarnation=MAX_INCARNATION_CHARS)
        if self.ended_by not in (_ENDS if self.state is RankState.GONE else (None,)):
            refuse("ended_by", str(self.ended_by), f"what ends a seat that is {self.state.value}")

    def after(self, event: RankEvent, *, epoch: int, incarnation: str | None = None) -> Seat:
        """The seat after an event, in the view of `epoch`; an ADMIT names the new incarnation. Errors as `advance`."""
        state = advance(self.state, event)
        return replace(
            self,
            incarnation=self.incarnation if incarnation is None else incarnation,
            state=state,
            awaited=epoch if state is RankState.JOINING else self.awaited,
            ended_by=event if state is RankState.GONE else None,
        )

    @classmethod
    def from_form(cls, data: object) -> Seat:
        """From its stored form, its fields; a ProtocolError where that is malformed."""
        form = dict(wire_form.take_fields(data, "seat", required=cls.__slots__))
        state, ended_by = form["state"], form["ended_by"]
        try:
            form |= {"state": RankState(state), "ended_by": None if ended_by is None else RankEvent(ended_by)}
        except ValueError as exc:
            raise ProtocolError(f"a seat of no known state: {describe(state)}", field="state") from exc
        with untrusted():
            return cls(**form)


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupView:
    """The group at one epoch.

    Attributes:
        epoch: 1 or more; only grows.
        seats: by rank, one a rank.
    """

    epoch: int
    seats: tuple[Seat, ...] = ()

    def __post_init__(self) -> None:
        _check(self, "epoch")
        ranks = [seat.rank for seat in self.seats if seat.state is not RankState.ISOLATED]
        if ranks != sorted({seat.rank for seat in self.seats}):
            raise ConfigError("seats must be of admitted ranks, in order, one a rank", field="seats")

    @property
    def active_ranks(self) -> tuple[int, ...]:
        """The ranks that take part, in order."""
        return tuple(seat.rank for seat in self.seats if seat.state is RankState.ACTIVE)

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks that are in the group, active or not, in order."""
        return tuple(seat.rank for seat in self.seats if seat.state.is_seated)

    def seat_of(self, rank: int) -> Seat:
        """The rank's seat, GONE or not; ISOLATED: it never had one."""
        return next((seat for seat in self.seats if seat.rank == rank), Seat(rank=rank))

    def state_of(self, rank: int) -> RankState:
        """The rank's state; ISOLATED without a seat."""
        return self.seat_of(rank).state

    def seats_incarnation(self, rank: int, incarnation: str) -> bool:
        """Whether this life of the rank is in the group."""
        seat = self.seat_of(rank)
        return seat.incarnation == incarnation and seat.state.is_seated

    def with_seats(self, changed: dict[int, Seat], *, epoch: int) -> GroupView:
        """A later view, with these seats in place of their ranks' earlier ones."""
        seats = {seat.rank: seat for seat in self.seats} | changed
        return GroupView(epoch=epoch, seats=tuple(seats[rank] for rank in sorted(seats)))

    def to_bytes(self) -> bytes:
        """For the store."""
        return wire_form.pack_json({"version": wire_form.WIRE_VERSION, **asdict(self)})

    @classmethod
    def from_bytes(cls, raw: bytes) -> GroupView:
        """From the store; a ProtocolError where it is malformed, or of another version."""
        form = wire_form.take_json(raw, "group view", required=cls.__slots__, max_bytes=MAX_VALUE_BYTES)
        if not isinstance(form["seats"], list):
            raise ProtocolError(f"seats must be a list, not {describe(form['seats'])}", field="seats")
        with untrusted():
            return cls(epoch=form["epoch"], seats=tuple(map(Seat.from_form, form["seats"])))


NO_VIEW: Final = GroupView(epoch=0)  # what is followed by a group's first view

_RECORD_KEYS: Final = ("rank", "incarnation", "address", "meta", "epoch", "ttl_s")


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberRecord:
    """What a live member publishes, under its lease.

    Attributes:
        ttl_s: how long its lease lives without being renewed, as granted.
        epoch: the largest epoch of a view that it has applied, in this life or an earlier one of its process: its
            acknowledgement of that view, and what a later one must exceed. 0: none yet.
        address: where it can be reached; "" when it has none.
        meta: plain values of its own for the others.
        revision: of its key, where it is from the store.
    """

    rank: int
    incarnation: str
    ttl_s: float
    epoch: int = 0
    address: str = ""
    meta: Mapping[str, object] = field(default_factory=lambda: wire_form.NO_META)
    revision: int = field(default=0, compare=False)

    def __post_init__(self) -> None:
        """As a seat's; the caller chose `address` and `meta`."""
        _check(self, "rank", "epoch", incarnation=MAX_INCARNATION_CHARS, address=MAX_ADDRESS_CHARS)
        if type(self.ttl_s) not in (int, float) or not 0 <= self.ttl_s < float("inf"):
            refuse("ttl_s", self.ttl_s, "a number of seconds")
        object.__setattr__(self, "meta", wire_form.checked_meta(self.meta)[0])

    def to_bytes(self) -> bytes:
        """For the store."""
        values = {key: getattr(self, key) for key in _RECORD_KEYS}
        return wire_form.pack_json({"version": wire_form.WIRE_VERSION, **values, "meta": dict(self.meta)})

    @classmethod
    def from_bytes(cls, raw: bytes, *, rank: int | None = None, revision: int = 0) -> MemberRecord:
        """From the store; a ProtocolError where it is malformed, of another version, or of another rank."""
        form = wire_form.take_json(raw, "member record", required=_RECORD_KEYS, max_bytes=MAX_VALUE_BYTES)
        with untrusted():
            record = cls(**form, revision=revision)
        if rank not in {None, record.rank}:
            raise ProtocolError(f"the record of rank {record.rank}", field="rank")
        return record
