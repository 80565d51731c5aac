"""The state of a group as one rank knows it, the shared object that keeps it over all joins, and calls with a deadline.

All that is known at one moment is one immutable `GroupState`, replaced whole. So a reader needs no lock, and never sees
a view without the counts of what it changed.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Final, TypeVar

from ucxx_transport import errors
from ucxx_transport.backoff import random_pause_s
from ucxx_transport.config import PublisherConfig, checked_seconds
from ucxx_transport.groups.decisions import GroupSnapshot
from ucxx_transport.groups.view import NO_VIEW, GroupView, RankEvent, RankState, Seat, advance
from ucxx_transport.logs import get_logger
from ucxx_transport.membership.entries import GroupKeys
from ucxx_transport.membership.listeners import ADD, REMOVE, Listeners, identity_of
from ucxx_transport.membership.store import Store
from ucxx_transport.teardown import not_in_forks

_log = get_logger(__name__)

T = TypeVar("T")

NOT_SEEN: Final = GroupSnapshot(group="")
GONE: Final = "gone"  # to listeners: this rank is a member no longer, without having left

_REASONS: Final[Mapping[RankEvent | None, str]] = {RankEvent.LEAVE: "left", RankEvent.DROP: "dropped"}

PAUSE_S: Final = 0.2  # to the next look at what no event announces: a deadline, a silent store, a lease that may end
CALL_S: Final = 5.0  # for one call of the store: one that never answers is asked again while there is time
RACE_S: Final = 0.01  # to the next read, when another member's write came first


class Retrying:
    """Calls of a store for one purpose, such as "joining", under one deadline, until `cancelled` is set."""

    def __init__(
        self, shared: SharedState, timeout_s: float | str, purpose: str, *, cancelled: threading.Event | None = None
    ) -> None:
        self.shared, self._purpose = shared, purpose
        self._deadline = shared.clock() + checked_seconds(timeout_s, "timeout_s")
        self._cancelled = threading.Event() if cancelled is None else cancelled

    @property
    def left_s(self) -> float:
        """Seconds to the deadline, never negative."""
        return max(0.0, self._deadline - self.shared.clock())

    def call(self, method: Callable[..., T], *args: object, **settings: object) -> T:
        """What a method of the store answers, or raises as its answer; it is called until then. Errors as `check`."""
        config = self.shared.config
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
            return self.call(self.shared.store.put, key, value, expected=expected)
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
            raise errors.DeadlineExceededError(text, waiting_for=waiting_for, **facts, **self.shared.facts)


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
        admitted: ranks given a seat, those that came back included.
        left: ranks gone by themselves.
        lost: ranks gone by the end of their lease.
        dropped: ranks gone for want of an acknowledgement.
        conflicts: writes that another member's had overtaken.
        outages: times that the store could not be reached.
        callback_errors: exceptions of callbacks.
        callback_overflows: full queues of slow callbacks, shortened to the changes that last.
    """

    admitted: int = 0
    left: int = 0
    lost: int = 0
    dropped: int = 0
    conflicts: int = 0
    outages: int = 0
    callback_errors: int = 0
    callback_overflows: int = 0

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
    ended: errors.TransportError | None = field(default=None, compare=False)
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


class MembershipEndedError(Exception):
    """This rank is not in the group any more, by `error`, which waiting calls and `on_gone` get; None: it has left."""

    def __init__(self, error: errors.RegistryError | None = None) -> None:
        super().__init__(str(error))
        self.error = error


class SharedState:
    """What all parts of a rank's membership share: the arguments of `RankGroup`, and the present `GroupState`.

    That is set by the rank's own thread, read and waited for by others. Thread-safe.

    A thread that a leave does not wait for, or not yet, may still run when the rank has left, and when it has joined
    again: what it says of its own life, by that one's `incarnation`, changes nothing from the end of that life on.

    Attributes:
        now: everything at one moment; read it once for several facts that belong together.
        has_joined: whether this rank has been ACTIVE or INACTIVE since it published itself last.
        listeners: who hears of members that come ("add") and go ("remove"), and of the end of this rank's membership
            ("gone"), each in a thread of its own; whether the caller is one of them, or of `on_view`.
    """

    def __init__(
        self,
        store: Store,
        group: str,
        rank: int,
        *,
        config: PublisherConfig,
        ack_timeout_s: float,
        clock: Callable[[], float],
    ) -> None:
        self.store, self.config, self.ack_timeout_s, self.clock = store, config, ack_timeout_s, clock
        self.keys, self.facts = GroupKeys(group), {"group": group, "rank": rank}
        self.now = GroupState(group=group, rank=rank)
        self._changed = threading.Condition()
        self._incarnation = ""
        self.has_joined = False
        self._view_callbacks: dict[object, Callable[[GroupView], object]] = {}
        self.listeners: Listeners[Member | errors.TransportError] = Listeners(
            self._changed,
            lambda: self.now.members.values(),  # noqa: PLW0108 - of the state there is then
            lambda what: self.count(**{f"callback_{what}": 1}),
            keys=self.facts,
        )

    def wait(
        self,
        find: Callable[[GroupState], T | None],
        retrying: Retrying,
        waiting_for: str | Callable[[GroupState], str | Sequence[int]],
    ) -> T:
        """The first true answer of `find`, which is asked under the lock; else what ended the wait is raised."""
        with self._changed:
            while True:
                if answer := find(self.now):
                    return answer
                if self.now.ended is not None:
                    raise copy(self.now.ended)  # several may wait, and come back
                missing = waiting_for if isinstance(waiting_for, str) else waiting_for(self.now)
                retrying.check(missing, epoch=self.now.epoch, problems=dict(self.now.snapshot.problems))
                self._changed.wait(min(retrying.left_s, PAUSE_S))

    def on_view(self, callback: Callable[[GroupView], object]) -> Callable[[], None]:
        """Call `callback` with each view from now on, in the thread of `apply`, until what is returned is called."""
        registration = object()
        self._view_callbacks[registration] = callback

        def end() -> None:
            self._view_callbacks.pop(registration, None)

        return not_in_forks(end)

    def count(self, **more: int) -> None:
        """Add to the statistics."""
        with self._changed:
            self.now = replace(self.now, statistics=self.now.statistics.plus(**more))

    def begin(self, incarnation: str) -> None:
        """This rank has published itself: it joins."""
        with self._changed:
            state = advance(self.now.state, RankEvent.ADMIT)
            self._incarnation, self.has_joined = incarnation, False
            self.now = replace(self.now, state=state, snapshot=NOT_SEEN, ended=None)

    def show(self, incarnation: str, snapshot: GroupSnapshot) -> None:
        """The store's present content, its view applied or not. A MembershipEndedError: that life is over."""
        with self._changed:
            self._require_live(incarnation)
            version = self.now.policy_version if snapshot.policy_version is None else snapshot.policy_version
            self.now = replace(self.now, snapshot=snapshot, policy_version=version)
            self._changed.notify_all()

    def apply(self, incarnation: str, view: GroupView) -> None:
        """Take a newer view with its counts, call back, then wake waiting calls; for one thread. Errors as `show`."""
        with self._changed:
            self._require_live(incarnation)
            before, callbacks = self.now, list(self._view_callbacks.values())
            after = replace(before, view=view)
            if view.seats_incarnation(before.rank, self._incarnation):
                after = replace(after, state=view.state_of(before.rank))
                self.has_joined = self.has_joined or after.state is not RankState.JOINING
            were, are = ({identity_of(one): one for one in state.members.values()} for state in (before, after))
            removed = [one for identity, one in were.items() if identity not in are]
            added = [one for identity, one in are.items() if identity not in were]
            # by the seat of its next life, perhaps: then it was lost before
            reasons = [_REASONS.get(view.seat_of(one.rank).ended_by, "lost") for one in removed]
            self.now = replace(after, statistics=before.statistics.plus(admitted=len(added), **Counter(reasons)))
            self.listeners.put([(REMOVE, member) for member in removed] + [(ADD, member) for member in added])
        for member, reason in zip(removed, reasons, strict=True):
            if reason != "left":
                _log.warning("group_member_gone", member=member.rank, reason=reason, epoch=view.epoch, **self.facts)
        for callback in callbacks:
            self._require_live(incarnation)  # one before it may have blocked for longer than this life, or ended it
            try:
                with self.listeners.calling_back():
                    callback(view)
            except Exception:  # noqa: BLE001 - a callback's failure is the application's: the group goes on
                self.count(callback_errors=1)
                _log.exception("group_callback_failed", group=before.group, rank=before.rank, epoch=view.epoch)
        with self._changed:
            self._require_live(incarnation)
            self.now = replace(self.now, notified_epoch=view.epoch)
            self._changed.notify_all()

    def end(self, incarnation: str, error: errors.TransportError | None = None) -> None:
        """This rank is a member no more; None: it has left. Waiting calls raise that; `on_gone`, if it had joined."""
        with self._changed:
            if incarnation != self._incarnation or not self.now.state.is_seated:
                return
            state = advance(self.now.state, RankEvent.LEAVE if error is None else RankEvent.LOSE)
            ended = error or errors.NotReadyError("this rank has left", **self.facts)
            self.now = replace(self.now, state=state, ended=ended)
            if self.has_joined and error is not None:
                self.listeners.put([(GONE, error)])
            self._changed.notify_all()

    def _require_live(self, incarnation: str) -> None:
        if incarnation != self._incarnation or self.now.ended is not None:
            raise MembershipEndedError
