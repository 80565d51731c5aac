"""The state of a group as one rank knows it: what programs read, and the shared object that keeps it over all joins.

All that is known at one moment is one immutable `GroupState`, replaced whole. So a reader needs no lock, and never sees
a view without the counts of what it changed.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Final, TypeVar

from ucxx_transport.errors import TransportError
from ucxx_transport.groups.view import (
    NO_VIEW,
    GroupSnapshot,
    GroupView,
    RankEvent,
    RankState,
    Seat,
    advance,
)
from ucxx_transport.groups.writes import Retrying
from ucxx_transport.logs import get_logger
from ucxx_transport.membership.listeners import ADD, REMOVE, Listeners
from ucxx_transport.teardown import not_in_forks

_log = get_logger(__name__)

T = TypeVar("T")

ViewCallback = Callable[[GroupView], object]

NOT_SEEN: Final = GroupSnapshot(group="", revision=0)

GONE: Final = "gone"
"""To listeners: this rank is a member no longer, without having left."""

POLL_S: Final = 0.2
"""How often a waiting call looks at the clock, and whether it is cancelled; what it waits for wakes it at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A rank that is in the group.

    Attributes:
        rank: the rank.
        state: JOINING, ACTIVE or INACTIVE.
        incarnation: which life of that rank: a new word at each join.
        address: where it can be reached, as it published it; "" when it did not.
        meta: what else it published.
    """

    rank: int
    state: RankState
    incarnation: str
    address: str = ""
    meta: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupStatistics:
    """What a rank has seen of its group, over all its joins.

    Attributes:
        views: applied.
        admitted: ranks given a seat, those that came back included.
        activated: ranks that became active.
        left: ranks gone by themselves.
        lost: ranks gone by the end of their lease.
        dropped: ranks gone for want of an acknowledgement.
        conflicts: writes that another member's had overtaken.
        outages: times that the store could not be reached.
        callback_errors: exceptions of callbacks.
        callback_overflows: full queues of slow callbacks, shortened to the changes that last.
        callback_waits: callbacks that had to wait, because no thread could be started for them.
    """

    views: int = 0
    admitted: int = 0
    activated: int = 0
    left: int = 0
    lost: int = 0
    dropped: int = 0
    conflicts: int = 0
    outages: int = 0
    callback_errors: int = 0
    callback_overflows: int = 0
    callback_waits: int = 0

    def plus(self, **more: int) -> GroupStatistics:
        """With these added."""
        return replace(self, **{name: getattr(self, name) + count for name, count in more.items()})


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupState:
    """A group as one of its ranks has it at one moment.

    Attributes:
        group: its name.
        rank: this process's.
        state: of this rank. GONE, while the view may still have it, when its membership was lost.
        view: the one that was applied last; None before the first.
        policy_version: what the group trains; None: it was never set.
        statistics: counts up to this view: a rank that has gone from it has been counted.
        ended: why this rank is a member no longer; None: it is one, or never was.
        notified_epoch: of the last view that all callbacks of `on_view` have had.
        snapshot: the store's content as seen last; `NOT_SEEN`: not since this rank joined.
    """

    group: str
    rank: int
    state: RankState = RankState.ISOLATED
    view: GroupView | None = None
    policy_version: int | None = None
    statistics: GroupStatistics = field(default_factory=GroupStatistics)
    ended: TransportError | None = field(default=None, compare=False)
    notified_epoch: int = field(default=0, compare=False)
    snapshot: GroupSnapshot = field(default=NOT_SEEN, compare=False, repr=False)

    @property
    def epoch(self) -> int:
        """Of the view that was applied last; 0 before the first."""
        return (self.view or NO_VIEW).epoch

    @property
    def active_ranks(self) -> tuple[int, ...]:
        """Those that take part, in order."""
        return (self.view or NO_VIEW).active_ranks

    @property
    def members(self) -> Mapping[int, Member]:
        """By rank: all that are in the group, active or not, this rank too, with what each has published."""
        return {seat.rank: self._member(seat) for seat in (self.view or NO_VIEW).seats if seat.state.is_seated}

    def _member(self, seat: Seat) -> Member:
        member = Member(rank=seat.rank, state=seat.state, incarnation=seat.incarnation)
        record = self.snapshot.members.get(seat.rank)
        if record is None or record.incarnation != seat.incarnation:
            return member
        return replace(member, address=record.address, meta=record.meta)

    def notified_view(self, min_epoch: int = 1) -> GroupView | None:
        """The view, once all callbacks of `on_view` have had it, if its epoch is not smaller; else None."""
        return self.view if self.notified_epoch == self.epoch >= min_epoch else None

    def not_in(self, view: GroupView | None) -> list[Member]:
        """The members whose incarnation is not seated in `view`."""
        members = self.members.values()
        return [one for one in members if view is None or not view.seats_incarnation(one.rank, one.incarnation)]


class SharedState:
    """The present `GroupState`: set by the rank's own thread, read and waited for by others. Thread-safe.

    Attributes:
        now: everything at one moment; read it once for several facts that belong together.
        listeners: who hears of members that come ("add") and go ("remove"), and of the end of this rank's membership
            ("gone"), each in a thread of its own; whether the caller is one of them, or of `on_view`.
    """

    def __init__(self, group: str, rank: int) -> None:
        self.now = GroupState(group=group, rank=rank)
        self._changed = threading.Condition()
        self._incarnation = ""
        self._has_joined = False
        self._view_callbacks: dict[object, ViewCallback] = {}
        self._keys = {"group": group, "rank": rank}
        self.listeners = Listeners(_identity, lambda what: self.count(**{f"callback_{what}": 1}), keys=self._keys)

    def wait(
        self,
        find: Callable[[GroupState], T | None],
        retrying: Retrying,
        waiting_for: Callable[[GroupState], str | Sequence[int]],
    ) -> T:
        """The first true answer of `find`, which is asked at each change, and must not block.

        Raises why this rank is a member no longer, or that the deadline has passed, or that the wait was cancelled.
        """
        with self._changed:
            while not (answer := find(self.now)):
                if self.now.ended is not None:
                    raise copy(self.now.ended)  # several may wait, and come back
                problems = dict(self.now.snapshot.problems)
                retrying.check(waiting_for(self.now), epoch=self.now.epoch, problems=problems)
                self._changed.wait(min(retrying.left_s, POLL_S))
            return answer

    def on_view(self, callback: ViewCallback) -> Callable[[], None]:
        """Call `callback` with each view from now on, in the thread of `apply`, until what is returned is called."""
        registration = object()

        @not_in_forks
        def end() -> None:
            with self._changed:
                self._view_callbacks.pop(registration, None)

        with self._changed:
            self._view_callbacks[registration] = callback
        return end

    def count(self, **more: int) -> None:
        """Add to the statistics."""
        with self._changed:
            self.now = replace(self.now, statistics=self.now.statistics.plus(**more))

    def begin(self, incarnation: str) -> None:
        """This rank has published itself: it joins."""
        with self._changed:
            state = advance(self.now.state, RankEvent.ADMIT)
            self._incarnation, self._has_joined = incarnation, False
            self.now = replace(self.now, state=state, snapshot=NOT_SEEN, ended=None)

    def show(self, snapshot: GroupSnapshot) -> None:
        """The store's present content, whether its view is applied or not."""
        with self._changed:
            version = self.now.policy_version if snapshot.policy_version is None else snapshot.policy_version
            self.now = replace(self.now, snapshot=snapshot, policy_version=version)
            self._changed.notify_all()

    def apply(self, view: GroupView) -> None:
        """Take a newer view with its counts, call back for it, and only then wake waiting calls; for one thread."""
        with self._changed:
            before, callbacks = self.now, list(self._view_callbacks.values())
            after = replace(before, view=view)
            if view.seats_incarnation(before.rank, self._incarnation):
                after = replace(after, state=view.state_of(before.rank))
                self._has_joined = self._has_joined or after.state is not RankState.JOINING
            removed, added = before.not_in(view), after.not_in(before.view)
            activated = set(view.active_ranks) - set(before.active_ranks)
            reasons = [_reason_gone(view, member) for member in removed]
            counts = {"views": 1, "admitted": len(added), "activated": len(activated), **Counter(reasons)}
            self.now = replace(after, statistics=before.statistics.plus(**counts))
            self.listeners.put([(REMOVE, member) for member in removed] + [(ADD, member) for member in added])
        for member, reason in zip(removed, reasons, strict=True):
            if reason != "left":
                _log.warning("group_member_gone", member=member.rank, reason=reason, epoch=view.epoch, **self._keys)
        for callback in callbacks:
            try:
                with self.listeners.calling_back():
                    callback(view)
            except Exception:  # noqa: BLE001 - a callback's failure is the application's: the group goes on
                self.count(callback_errors=1)
                _log.exception("group_callback_failed", group=before.group, rank=before.rank, epoch=view.epoch)
        with self._changed:
            self.now = replace(self.now, notified_epoch=view.epoch)
            self._changed.notify_all()

    def end(self, error: TransportError, *, left: bool = False) -> None:
        """This rank is a member no more: waiting calls raise `error`; `on_gone`, if it had joined and has not left."""
        with self._changed:
            if not self.now.state.is_seated:
                return
            state = advance(self.now.state, RankEvent.LEAVE if left else RankEvent.LOSE)
            self.now = replace(self.now, state=state, ended=error)
            if self._has_joined and not left:
                self.listeners.put([(GONE, error)])
            self._changed.notify_all()


def _identity(fact: Member | TransportError) -> tuple[int, str]:
    assert isinstance(fact, Member)  # only what stays known is asked for
    return fact.rank, fact.incarnation


def _reason_gone(view: GroupView, member: Member) -> str:
    """How a member that has gone from `view` is counted."""
    ended_by = view.seat_of(member.rank).ended_by  # of its next incarnation, perhaps: then it was lost before
    return "left" if ended_by is RankEvent.LEAVE else "dropped" if ended_by is RankEvent.DROP else "lost"
