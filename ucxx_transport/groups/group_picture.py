"""GroupPicture: all that the store says of a group at one revision: a snapshot, and a watch's batches after it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Final, TypeVar

from ucxx_transport.errors import ProtocolError
from ucxx_transport.groups.group_view import GroupView
from ucxx_transport.groups.member_record import MemberRecord
from ucxx_transport.membership.keys import policy_key, rank_of, view_key
from ucxx_transport.membership.store import Batch, Snapshot
from ucxx_transport.schema.wire_form import describe

__all__ = ["GroupPicture", "policy_version_from"]

MAX_POLICY_DIGITS: Final = 18

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupPicture:
    """A group's keys.

    Attributes:
        group: whose.
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
    def of(cls, group: str, snapshot: Snapshot) -> GroupPicture:
        """The picture of a snapshot of the group's prefix."""
        picture = cls(group=group, revision=snapshot.revision)
        for entry in snapshot:
            picture = _with(picture, entry.key, entry.value, entry.revision)
        return picture

    def after(self, batch: Batch) -> GroupPicture:
        """The picture after the changes of one revision."""
        picture = replace(self, revision=batch.revision)
        for event in batch.events:
            picture = _with(picture, event.key, event.value if event.kind == "put" else None, event.revision)
        return picture


def _with(picture: GroupPicture, key: str, value: bytes | None, revision: int) -> GroupPicture:
    problems = {known: why for known, why in picture.problems.items() if known != key}
    picture, why = _read(picture, key, value, revision)
    if why:
        problems[key] = why
    return replace(picture, problems=MappingProxyType(problems))


def _read(picture: GroupPicture, key: str, value: bytes | None, revision: int) -> tuple[GroupPicture, str]:
    if key == view_key(picture.group):
        view, why = _parsed(value, GroupView.from_bytes)
        return replace(picture, view=view, view_revision=0 if value is None else revision), why
    if key == policy_key(picture.group):
        version, why = _parsed(value, policy_version_from)
        return replace(picture, policy_version=version), why
    rank = rank_of(key, picture.group)
    if rank is None:
        return picture, ""
    record, why = _parsed(value, MemberRecord.from_bytes)
    members = {known: other for known, other in picture.members.items() if known != rank}
    revisions = {known: other for known, other in picture.member_revisions.items() if known != rank}
    if record is not None and record.rank != rank:
        why = f"the record of rank {record.rank}"
    elif record is not None:
        members[rank], revisions[rank] = record, revision
    changed = replace(picture, members=MappingProxyType(members), member_revisions=MappingProxyType(revisions))
    return changed, why


def _parsed(value: bytes | None, parse: Callable[[bytes], T]) -> tuple[T | None, str]:
    if value is None:
        return None, ""
    try:
        return parse(value), ""
    except ProtocolError as error:
        return None, str(error)


def policy_version_from(value: bytes) -> int:
    """A policy version, from the store.

    Raises:
        ProtocolError: it is no number.
    """
    if not value.isdigit() or len(value) > MAX_POLICY_DIGITS:
        raise ProtocolError(f"a policy version that is no number: {describe(value)}", field="policy")
    return int(value)
