"""What a member asks of its group: another view or policy version, by compare-and-swap until it is in."""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from ucxx_transport.errors import ConfigError, ConflictError, NotReadyError
from ucxx_transport.groups.group_picture import GroupPicture, policy_version_from
from ucxx_transport.groups.group_view import GroupView
from ucxx_transport.groups.joining import view_after
from ucxx_transport.groups.patience import Patience
from ucxx_transport.groups.rank_states import RankEvent, RankState
from ucxx_transport.membership.keys import group_prefix, policy_key, view_key
from ucxx_transport.membership.store import Store

__all__ = ["change_view", "put_policy_version"]

RACE_S: Final = 0.01
"""Before the next look, when another member's write came first."""

_CONCERNS: Final = {
    RankEvent.RECALL: (RankState.INACTIVE,),
    RankEvent.DEACTIVATE: (RankState.JOINING, RankState.ACTIVE),
    RankEvent.LEAVE: (RankState.JOINING, RankState.ACTIVE, RankState.INACTIVE),
}
"""Whom an event concerns: the others are already as is wished, or must become so by themselves."""


def change_view(
    store: Store,
    group: str,
    event: RankEvent,
    ranks: Collection[int],
    patience: Patience,
    *,
    incarnation: str | None = None,
) -> int:
    """Let `event` happen to those of `ranks` that it concerns.

    Args:
        store: where.
        group: whose view.
        event: RECALL, DEACTIVATE or LEAVE.
        ranks: whom it is asked for.
        patience: how long.
        incarnation: only to this life of the ranks; None: to whoever has them.

    Returns:
        The epoch of the view in which it is so.

    Raises:
        NotReadyError: RECALL: a rank is not in the group.
        DeadlineExceededError: the store did not answer.
    """
    phase = event.name.lower()
    while True:
        picture = patience.until_answered(lambda left_s: _look(store, group, left_s), phase=phase)
        view = GroupView(epoch=0) if picture.view is None else picture.view
        absent = [rank for rank in ranks if not view.state_of(rank).is_seated]
        if absent and event is RankEvent.RECALL:
            raise NotReadyError(
                f"ranks {absent} are not in {group!r}: they can be active when they have joined",
                group=group,
                ranks=absent,
                epoch=view.epoch,
            )
        concerned = [
            seat.rank
            for seat in view.seats
            if seat.rank in ranks
            and seat.state in _CONCERNS[event]
            and (incarnation is None or seat.incarnation == incarnation)
        ]
        wanted = view_after(view, picture.members, event, concerned)
        if wanted is None:
            return view.epoch
        revision = _swapped(store, view_key(group), wanted.to_bytes(), picture.view_revision, patience)
        if revision is not None:
            return wanted.epoch
        patience.pause(RACE_S, phase=phase)


def put_policy_version(store: Store, group: str, version: int, patience: Patience, *, rewind: bool) -> int:
    """Write the policy version.

    Args:
        store: where.
        group: whose.
        version: the new one.
        patience: how long.
        rewind: also if a larger one is there.

    Returns:
        The store's revision that has it.

    Raises:
        ConfigError: a larger one is there.
        DeadlineExceededError: the store did not answer.
    """
    phase = "setting the policy version"
    key = policy_key(group)
    while True:
        entry = patience.until_answered(lambda left_s: store.get(key, timeout_s=left_s), phase=phase)
        known = None if entry is None else policy_version_from(entry.value)
        if entry is not None and known == version:
            return entry.revision
        if known is not None and known > version and not rewind:
            raise ConfigError(
                f"policy version {version} is behind {known}, which the group has: rewind=True goes back",
                field="version",
                known=known,
            )
        expected = 0 if entry is None else entry.revision
        revision = _swapped(store, key, str(version).encode(), expected, patience)
        if revision is not None:
            return revision
        patience.pause(RACE_S, phase=phase)


def _look(store: Store, group: str, left_s: float) -> GroupPicture:
    return GroupPicture.of(group, store.snapshot(group_prefix(group), timeout_s=left_s))


def _swapped(store: Store, key: str, value: bytes, expected: int, patience: Patience) -> int | None:
    """The revision of the write; None: another one came first, or it was this one, and its answer was lost."""
    try:
        return patience.until_answered(
            lambda left_s: store.put(key, value, expected=expected, timeout_s=left_s), phase=f"writing {key}"
        )
    except ConflictError:
        return None
