"""Writes of a group by compare-and-swap, tried again until they are in or a deadline passes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass
from itertools import count
from typing import Final, TypeVar

from ucxx_transport.backoff import random_pause_s
from ucxx_transport.config import PublisherConfig, StoreConfig
from ucxx_transport.errors import (
    ConfigError,
    ConflictError,
    DeadlineExceededError,
    NotReadyError,
    RegistryError,
    StoreUnavailableError,
)
from ucxx_transport.groups.decisions import view_after
from ucxx_transport.groups.states import RankEvent
from ucxx_transport.groups.view import GroupSnapshot, GroupView, parse_policy_version
from ucxx_transport.membership.keys import group_prefix, policy_key, view_key
from ucxx_transport.membership.store import Store

T = TypeVar("T")

CALL_S: Final = 5.0
"""The bound of one call of the store: one that never answers is asked again while there is time."""

RACE_S: Final = 0.01
"""Before the next read, when another member's write came first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankContext:
    """What each part of a rank's membership works with.

    Attributes:
        store: the group's.
        group: its name.
        rank: this process's.
        config: interval, pauses, bounds, and what renews the lease.
        store_config: the store's settings, for a process that renews the lease.
        ack_timeout_s: how long an acknowledgement is waited for before the member that owes it is dropped.
        clock: seconds.
    """

    store: Store
    group: str
    rank: int
    config: PublisherConfig
    store_config: StoreConfig
    ack_timeout_s: float
    clock: Callable[[], float]

    @property
    def keys(self) -> dict[str, object]:
        """For errors and logs."""
        return {"group": self.group, "rank": self.rank}


class Retrying:
    """Calls of a store for one purpose: under one deadline, with growing pauses while it does not answer.

    Args:
        context: has the pauses and the clock.
        timeout_s: seconds to the deadline; a ConfigError unless more than 0.
        purpose: what the calls are for, such as "joining", for the errors.
        cancelled: set when the result is no longer wanted; None: it always is.
    """

    def __init__(
        self, context: RankContext, timeout_s: float, purpose: str, *, cancelled: threading.Event | None = None
    ) -> None:
        if timeout_s <= 0:
            raise ConfigError(f"timeout_s must be more than 0, not {timeout_s}", field="timeout_s")
        self._config, self._clock, self._purpose = context.config, context.clock, purpose
        self._deadline = context.clock() + timeout_s
        self._cancelled = threading.Event() if cancelled is None else cancelled

    @property
    def left_s(self) -> float:
        """Seconds to the deadline, never negative."""
        return max(0.0, self._deadline - self._clock())

    def call(self, call: Callable[[float], T]) -> T:
        """Call, with the seconds that it may take, until the store answers; an error that is an answer is raised.

        Raises:
            DeadlineExceededError: the store did not answer until the deadline.
            RegistryError: it was cancelled, or the store answered by an error.
        """
        unanswered: StoreUnavailableError | None = None
        first_s, longest_s = self._config.backoff_s, self._config.max_backoff_s
        for attempt in count(1):
            if self.left_s <= 0:
                break
            try:
                return call(min(self.left_s, CALL_S))
            except StoreUnavailableError as error:
                unanswered = error
            self.pause(random_pause_s(attempt, first_s=first_s, longest_s=longest_s))
        text = f"{self._purpose}: the deadline passed before the store answered"
        raise DeadlineExceededError(text, waiting_for="store", reason=str(unanswered)) from unanswered

    def pause(self, seconds: float) -> None:
        """Wait, at most until the deadline; a RegistryError when it was cancelled."""
        self._cancelled.wait(min(seconds, self.left_s))
        self.check()

    def check(self) -> None:
        """Raise a RegistryError when the result is no longer wanted."""
        if self._cancelled.is_set():
            raise RegistryError(f"{self._purpose}: cancelled by leave()")


def change_view(
    context: RankContext,
    event: RankEvent,
    ranks: Collection[int],
    retrying: Retrying,
    *,
    incarnation: str | None = None,
) -> int:
    """Make RECALL, DEACTIVATE or LEAVE happen to those of `ranks` that it concerns, in this life or (None) any.

    Returns:
        The epoch of the view in which it is so.

    Raises:
        NotReadyError: RECALL: a rank is not in the group.
        DeadlineExceededError: the store did not answer.
    """
    store, group = context.store, context.group
    while True:
        found = retrying.call(lambda left_s: store.snapshot(group_prefix(group), timeout_s=left_s))
        snapshot = GroupSnapshot.of(group, found)
        view = GroupView(epoch=0) if snapshot.view is None else snapshot.view
        absent = [rank for rank in ranks if not view.state_of(rank).is_seated]
        if absent and event is RankEvent.RECALL:
            raise NotReadyError(
                f"ranks {absent} are not in {group!r}: they can be active when they have joined",
                group=group,
                ranks=absent,
                epoch=view.epoch,
            )
        wanted = view_after(view, snapshot.members, event, ranks, incarnation=incarnation)
        if wanted is None:
            return view.epoch
        if _swap(store, view_key(group), wanted.to_bytes(), snapshot.view_revision, retrying) is not None:
            return wanted.epoch


def put_policy_version(context: RankContext, version: int, retrying: Retrying, *, rewind: bool) -> int:
    """Write the policy version; returns the store's revision that has it.

    Raises:
        ConfigError: a larger one is there, and it is not to `rewind`.
        DeadlineExceededError: the store did not answer.
    """
    store, key = context.store, policy_key(context.group)
    while True:
        entry = retrying.call(lambda left_s: store.get(key, timeout_s=left_s))
        known = None if entry is None else parse_policy_version(entry.value)
        if entry is not None and known == version:
            return entry.revision
        if known is not None and known > version and not rewind:
            raise ConfigError(
                f"policy version {version} is behind {known}, which the group has: rewind=True goes back",
                field="version",
                known=known,
            )
        revision = _swap(store, key, str(version).encode(), 0 if entry is None else entry.revision, retrying)
        if revision is not None:
            return revision


def _swap(store: Store, key: str, value: bytes, expected: int, retrying: Retrying) -> int | None:
    """The revision of the write; None: another came first, or it was this one, and its answer was lost: read again."""
    try:
        return retrying.call(lambda left_s: store.put(key, value, expected=expected, timeout_s=left_s))
    except ConflictError:
        retrying.pause(RACE_S)
        return None
