"""The values of a group in its store: the view, the records of its members, and a snapshot of both.

| key              | value          | changed by                                                        |
|------------------|----------------|-------------------------------------------------------------------|
| `view`           | `GroupView`    | any live member, by compare-and-swap; every change a larger epoch |
| `members/<rank>` | `MemberRecord` | the rank itself, under its lease                                  |
| `policy`         | digits         | any member, by compare-and-swap                                   |

Epochs grow across a wiped store too. So two views of one epoch are equal, and a view of a smaller epoch than one that
was seen is an old one, or that of a store which lost its data.

Values are JSON, so that an operator can read them with the store's own tools. The writers of a store are trusted not
to be hostile, but not to be of this version: keys and types are checked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Final, TypeVar

from ucxx_transport.errors import ConfigError, ProtocolError
from ucxx_transport.groups.states import RankEvent, RankState, advance
from ucxx_transport.membership.keys import MAX_VALUE_BYTES, policy_key, rank_of, view_key
from ucxx_transport.membership.store import Batch, Snapshot
from ucxx_transport.schema.wire_form import (
    WIRE_VERSION,
    check_version,
    describe,
    is_unsigned,
    pack_json,
    take_fields,
    unpack_json,
)

MAX_INCARNATION_CHARS: Final = 64
MAX_ADDRESS_CHARS: Final = 1024
MAX_META_BYTES: Final = 64 << 10
MAX_POLICY_DIGITS: Final = 18

_ENDINGS: Final = {event.value: event for event in (RankEvent.LEAVE, RankEvent.LOSE, RankEvent.DROP)}
_SEAT_KEYS: Final = ("rank", "incarnation", "state", "awaited", "ended_by")
_RECORD_KEYS: Final = ("rank", "incarnation", "address", "meta", "epoch", "ttl_s")

T = TypeVar("T")
KeyT = TypeVar("KeyT")


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """A rank's place in a view; it stays, GONE, until a new incarnation of the rank is admitted.

    Attributes:
        rank: the rank.
        incarnation: which life of that rank: a new word at each join.
        state: see `states`.
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
        """The seat of a new incarnation, in place of a GONE one or of none; a RegistryError in place of another."""
        state = advance(RankState.ISOLATED if before is None else before.state, RankEvent.ADMIT)
        return cls(rank=rank, incarnation=incarnation, state=state, awaited_epoch=epoch)

    def after(self, event: RankEvent, *, epoch: int) -> Seat:
        """The seat after an event, in the view of `epoch`: one that is RECALLed waits for its acknowledgement."""
        state = advance(self.state, event)
        return replace(
            self,
            state=state,
            awaited_epoch=epoch if event is RankEvent.RECALL else self.awaited_epoch,
            ended_by=event if state is RankState.GONE else None,
        )


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
        return pack_json({"version": WIRE_VERSION, "epoch": self.epoch, "seats": seats})

    @classmethod
    def from_bytes(cls, raw: bytes) -> GroupView:
        """From the store; a ProtocolError where it is malformed, or of another version."""
        data = unpack_json(raw, "group view", max_bytes=MAX_VALUE_BYTES)
        form = take_fields(data, "group view", required=("version", "epoch", "seats"))
        check_version(form["version"], "group view")
        if not isinstance(form["seats"], list):
            raise ProtocolError(f"seats must be a list, not {describe(form['seats'])}", field="seats")
        seats = tuple(_seat_from(entry) for entry in form["seats"])
        ranks = [seat.rank for seat in seats]
        if ranks != sorted(set(ranks)):
            raise ProtocolError("seats must be in order, one a rank", field="seats")
        return cls(epoch=_take_count(form["epoch"], "epoch"), seats=seats)


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
        rank=_take_count(form["rank"], "rank"),
        incarnation=_take_text(form["incarnation"], "incarnation", max_chars=MAX_INCARNATION_CHARS),
        state=state,
        awaited_epoch=_take_count(form["awaited"], "awaited"),
        ended_by=ended_by,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberRecord:
    """What a live member publishes, under its lease.

    Attributes:
        rank: its own.
        incarnation: which life of that rank.
        epoch: the largest epoch of a view that it has applied, in this life or an earlier one of its process: its
            acknowledgement of that view, and what a later one must exceed. 0: none yet.
        ttl_s: how long its lease lives without being renewed, as granted.
        address: where it can be reached; "" when it has none.
        meta: plain values of its own for the others.
    """

    rank: int
    incarnation: str
    epoch: int
    ttl_s: float
    address: str = ""
    meta: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))

    def __post_init__(self) -> None:
        """Check what the caller chose; a ConfigError where `address` or `meta` cannot be stored."""
        if len(self.address) > MAX_ADDRESS_CHARS:
            raise ConfigError(f"address must be text of at most {MAX_ADDRESS_CHARS} characters", field="address")
        try:
            nbytes = len(pack_json(dict(self.meta)))
        except (TypeError, ValueError) as exc:
            raise ConfigError(f"meta must be a mapping of plain JSON values: {exc}", field="meta") from exc
        if nbytes > MAX_META_BYTES:
            raise ConfigError(f"meta of {nbytes} bytes; at most {MAX_META_BYTES}", field="meta", nbytes=nbytes)

    def having_applied(self, epoch: int) -> MemberRecord:
        """The record once its member has applied the view of `epoch`."""
        return replace(self, epoch=max(self.epoch, epoch))

    def to_bytes(self) -> bytes:
        """For the store."""
        values = {key: getattr(self, key) for key in _RECORD_KEYS}
        return pack_json({"version": WIRE_VERSION, **values, "meta": dict(self.meta)})

    @classmethod
    def from_bytes(cls, raw: bytes) -> MemberRecord:
        """From the store; a ProtocolError where it is malformed, or of another version."""
        data = unpack_json(raw, "member record", max_bytes=MAX_VALUE_BYTES)
        form = take_fields(data, "member record", required=("version", *_RECORD_KEYS))
        check_version(form["version"], "member record")
        ttl_s, meta = form["ttl_s"], form["meta"]
        if isinstance(ttl_s, bool) or not isinstance(ttl_s, int | float) or not isinstance(meta, dict):
            raise ProtocolError("a member record without a TTL or meta", field="ttl_s")
        return cls(
            rank=_take_count(form["rank"], "rank"),
            incarnation=_take_text(form["incarnation"], "incarnation", max_chars=MAX_INCARNATION_CHARS),
            epoch=_take_count(form["epoch"], "epoch"),
            ttl_s=float(ttl_s),
            address=_take_text(form["address"], "address", max_chars=MAX_ADDRESS_CHARS),
            meta=MappingProxyType(meta),
        )


def parse_policy_version(value: bytes) -> int:
    """A policy version, from the store; a ProtocolError where it is no number."""
    if not value.isdigit() or len(value) > MAX_POLICY_DIGITS:
        raise ProtocolError(f"a policy version that is no number: {describe(value)}", field="policy")
    return int(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupSnapshot:
    """A group's keys at one revision of the store.

    Attributes:
        group: its name.
        revision: of the store.
        view: None: there is none, or it cannot be read (then `problems` has it).
        view_revision: of the view's key; 0: there is none.
        members: by rank: those whose key exists, which is to say whose lease lives.
        member_revisions: of their keys.
        policy_version: None: there is none.
        problems: key → why its value was not understood; it is as if it were not there.
    """

    group: str
    revision: int
    view: GroupView | None = None
    view_revision: int = 0
    members: Mapping[int, MemberRecord] = field(default_factory=lambda: MappingProxyType({}))
    member_revisions: Mapping[int, int] = field(default_factory=lambda: MappingProxyType({}))
    policy_version: int | None = None
    problems: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    @classmethod
    def of(cls, group: str, snapshot: Snapshot) -> GroupSnapshot:
        """From the store's snapshot of the group's prefix."""
        found = cls(group=group, revision=snapshot.revision)
        for entry in snapshot:
            found = _with_key(found, entry.key, entry.value, entry.revision)
        return found

    def after(self, batch: Batch) -> GroupSnapshot:
        """The snapshot after the changes of one revision."""
        found = replace(self, revision=batch.revision)
        for event in batch.events:
            found = _with_key(found, event.key, event.value if event.kind == "put" else None, event.revision)
        return found


def _with_key(snapshot: GroupSnapshot, key: str, value: bytes | None, revision: int) -> GroupSnapshot:
    """With one key's new value; None: it was deleted."""
    problem = ""
    rank = rank_of(key, snapshot.group)
    if key == view_key(snapshot.group):
        view, problem = _parsed(value, GroupView.from_bytes)
        snapshot = replace(snapshot, view=view, view_revision=0 if value is None else revision)
    elif key == policy_key(snapshot.group):
        version, problem = _parsed(value, parse_policy_version)
        snapshot = replace(snapshot, policy_version=version)
    elif rank is not None:
        record, problem = _parsed(value, MemberRecord.from_bytes)
        if record is not None and record.rank != rank:
            problem = f"the record of rank {record.rank}"
        known = None if problem else record
        members = _changed(snapshot.members, rank, known)
        revisions = _changed(snapshot.member_revisions, rank, None if known is None else revision)
        snapshot = replace(snapshot, members=members, member_revisions=revisions)
    return replace(snapshot, problems=_changed(snapshot.problems, key, problem or None))


def _changed(mapping: Mapping[KeyT, T], key: KeyT, value: T | None) -> Mapping[KeyT, T]:
    """A copy with `value` at `key`, or without that key."""
    others = {known: other for known, other in mapping.items() if known != key}
    return MappingProxyType(others if value is None else others | {key: value})


def _parsed(value: bytes | None, parse: Callable[[bytes], T]) -> tuple[T | None, str]:
    if value is None:
        return None, ""
    try:
        return parse(value), ""
    except ProtocolError as error:
        return None, str(error)


def _take_count(value: object, field: str) -> int:
    if not is_unsigned(value, 63):
        raise ProtocolError(f"{field} must be a number from 0 on, not {describe(value)}", field=field)
    return value


def _take_text(value: object, field: str, *, max_chars: int) -> str:
    if not isinstance(value, str) or len(value) > max_chars:
        raise ProtocolError(
            f"{field} must be text of at most {max_chars} characters, not {describe(value)}", field=field
        )
    return value
