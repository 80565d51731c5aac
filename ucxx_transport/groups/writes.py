"""Writes of a rank to its group: each is tried again until it is in, or a deadline passes.

`acquire_rank` publishes the rank's record under a new lease, while no live member has the rank. The view and the policy
version are changed by compare-and-swap.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import count
from typing import Final, TypeVar

from ucxx_transport import errors
from ucxx_transport.backoff import random_pause_s
from ucxx_transport.config import PublisherConfig, StoreConfig, checked_seconds
from ucxx_transport.groups.decisions import is_alive, view_after
from ucxx_transport.groups.view import GroupSnapshot, MemberRecord, RankEvent, parse_policy_version
from ucxx_transport.membership.entries import Lease, group_prefix, member_key, policy_key, view_key
from ucxx_transport.membership.store import Store

T = TypeVar("T")

CALL_S: Final = 5.0
"""The bound of one call of the store: one that never answers is asked again while there is time."""

POLL_S: Final = 0.25
"""How often a rank whose lease may still end is read."""

RACE_S: Final = 0.01
"""Before the next read, when another member's write came first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankContext:
    """What each part of a rank's membership works with: the arguments of `RankGroup`."""

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


def has_left(context: RankContext) -> errors.NotReadyError:
    """What is raised to those that wait for a rank while it leaves."""
    return errors.NotReadyError("this rank has left", **context.keys)


class Retrying:
    """Calls of a store for one purpose, such as "joining", under one deadline, until `cancelled` is set."""

    def __init__(
        self, context: RankContext, timeout_s: float | str, purpose: str, *, cancelled: threading.Event | None = None
    ) -> None:
        timeout_s = checked_seconds(timeout_s, "timeout_s")
        if timeout_s <= 0:
            raise errors.ConfigError(f"timeout_s must be more than 0, not {timeout_s}", field="timeout_s")
        self.context, self._purpose = context, purpose
        self._deadline = context.clock() + timeout_s
        self._cancelled = threading.Event() if cancelled is None else cancelled

    @property
    def left_s(self) -> float:
        """Seconds to the deadline, never negative."""
        return max(0.0, self._deadline - self.context.clock())

    def call(self, method: Callable[..., T], *args: object, **settings: object) -> T:
        """What a method of the store answers, or raises as its answer; it is called until then. Errors as `check`."""
        config = self.context.config
        self.check("store")
        for attempt in count(1):
            try:
                return method(*args, **settings, timeout_s=min(self.left_s, CALL_S))
            except errors.StoreUnavailableError as error:
                self.pause(random_pause_s(attempt, first_s=config.backoff_s, longest_s=config.max_backoff_s))
                self.check("store", reason=str(error))
        raise AssertionError

    def swap(self, key: str, value: bytes, expected: int) -> int | None:
        """The revision of the write; None: another came first, or it was this one, its answer lost: read again."""
        try:
            return self.call(self.context.store.put, key, value, expected=expected)
        except errors.ConflictError:
            self.pause(RACE_S)
            return None

    def pause(self, seconds: float) -> None:
        """Wait, at most until the deadline."""
        self._cancelled.wait(min(seconds, self.left_s))

    def check(self, waiting_for: str | Sequence[int], **facts: object) -> None:
        """Raise a RegistryError when it was cancelled; a DeadlineExceededError, with what was waited for, when late."""
        if self._cancelled.is_set():
            raise errors.RegistryError(f"{self._purpose}: cancelled by leave()")
        if self.left_s <= 0:
            what = waiting_for if isinstance(waiting_for, str) else f"ranks {list(waiting_for)}"
            text = f"{self._purpose}: the deadline passed, waiting for {what}"
            raise errors.DeadlineExceededError(text, waiting_for=waiting_for, **facts, **self.context.keys)


def acquire_rank(retrying: Retrying, wanted: MemberRecord) -> Lease:
    """Publish a member, once its rank is free, under a new lease, whose TTL `wanted` asks for.

    A dead member has its rank until its lease ends, and that is waited for. A live one keeps it: a
    DuplicateSourceError.
    """
    context, store = retrying.context, retrying.context.store
    key, began = member_key(context.group, context.rank), context.clock()
    first: MemberRecord | None = None
    lease: Lease | None = None
    for attempt in count():
        entry = retrying.call(store.get, key)
        holder = None if entry is None else MemberRecord.from_bytes(entry.value)
        first = holder if attempt == 0 else first
        if holder is None:
            lease = retrying.call(store.grant, wanted.ttl_s)
            raw = replace(wanted, ttl_s=lease.ttl_s).to_bytes()
            # Else another was first, an answer was lost, or the store was away for longer than the lease lived.
            with suppress(errors.ConflictError, errors.LeaseLostError):
                retrying.call(store.put, key, raw, lease_id=lease.lease_id, expected=0)
                return lease
        elif lease is not None and holder.incarnation == wanted.incarnation:
            return lease
        elif is_alive(holder, first=first, waited_s=context.clock() - began):
            text = "a live member has this rank: give this process another one, or end that one"
            facts = {"incarnation": holder.incarnation, "address": holder.address}
            raise errors.DuplicateSourceError(text, **facts, **context.keys)
        else:
            retrying.pause(POLL_S)
            retrying.check("the rank's holder")  # whose lease may still end
    raise AssertionError


def change_view(retrying: Retrying, event: RankEvent, ranks: Collection[int], *, incarnation: str | None = None) -> int:
    """Make RECALL, DEACTIVATE or LEAVE happen to those of `ranks` that it concerns, in this life or (None) any.

    Returns the epoch of the view in which it is so. A NotReadyError: one to RECALL is not in the group.
    """
    store, group = retrying.context.store, retrying.context.group
    while True:
        snapshot = GroupSnapshot.of(group, retrying.call(store.snapshot, group_prefix(group)))
        view = snapshot.view
        absent = [rank for rank in ranks if not view.state_of(rank).is_seated]
        if absent and event is RankEvent.RECALL:
            text = f"ranks {absent} are not in {group!r}: they can be active when they have joined"
            raise errors.NotReadyError(text, group=group, ranks=absent, epoch=view.epoch)
        wanted = view_after(view, snapshot.members, event, ranks, incarnation=incarnation)
        if wanted is None:
            return view.epoch
        if retrying.swap(view_key(group), wanted.to_bytes(), snapshot.view_revision) is not None:
            return wanted.epoch


def put_policy_version(retrying: Retrying, version: int, *, rewind: bool) -> int:
    """Write the policy version; returns the store's revision that has it.

    A ConfigError: a larger one is there, and it is not to `rewind`.
    """
    key = policy_key(retrying.context.group)
    while True:
        entry = retrying.call(retrying.context.store.get, key)
        known = None if entry is None else parse_policy_version(entry.value)
        if entry is not None and known == version:
            return entry.revision
        if known is not None and known > version and not rewind:
            text = f"policy version {version} is behind {known}, which the group has: give rewind=True to go back"
            raise errors.ConfigError(text, field="version", known=known)
        revision = retrying.swap(key, str(version).encode(), 0 if entry is None else entry.revision)
        if revision is not None:
            return revision
