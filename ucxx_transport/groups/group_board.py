"""GroupBoard: what a process knows of its group, over all its joins: shared by the rank's thread and its callers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, replace
from typing import Final, TypeVar

from ucxx_transport.errors import TransportError
from ucxx_transport.groups.group_picture import GroupPicture
from ucxx_transport.groups.group_state import (
    GroupState,
    GroupStatistics,
    Member,
    arrived,
    departed,
    members_of,
)
from ucxx_transport.groups.group_view import GroupView, Seat
from ucxx_transport.groups.patience import Patience
from ucxx_transport.groups.rank_states import TRANSITIONS, RankEvent, RankState, advance
from ucxx_transport.logs import get_logger

__all__ = ["GroupBoard", "Listener"]

_log = get_logger(__name__)

T = TypeVar("T")

LOOK_S: Final = 0.2
"""How often who waits looks at the clock, and whether it is still wanted; what it waits for wakes it at once."""

_COUNTED_AS = {RankEvent.LEAVE: "left", RankEvent.LOSE: "lost", RankEvent.DROP: "dropped"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Listener:
    """Who is told of views, of members that come and go, and that this rank is a member no longer."""

    on_view: Callable[[GroupView], object] = lambda _: None
    on_add: Callable[[Member], object] = lambda _: None
    on_remove: Callable[[Member], object] = lambda _: None
    on_gone: Callable[[TransportError], object] = lambda _: None


class GroupBoard:
    """See the module. Thread-safe; views are applied by one thread at a time.

    Args:
        group: its name.
        rank: this process's.
    """

    def __init__(self, group: str, rank: int) -> None:
        self.group, self.rank = group, rank
        self.changed = threading.Condition()
        self._telling = threading.RLock()  # taken before `changed`: who comes to listen hears of each member once
        self.picture: GroupPicture | None = None
        self.view: GroupView | None = None
        self.told_epoch = 0
        self.policy_version: int | None = None
        self.ended: TransportError | None = None
        self._state = RankState.ISOLATED
        self._incarnation = ""
        self._has_joined = False
        self._listeners: list[Listener] = []
        self._statistics = GroupStatistics()

    @property
    def is_seated(self) -> bool:
        """Whether this rank has published itself, and is not gone."""
        with self.changed:
            return self._state.is_seated

    @property
    def told_view(self) -> GroupView | None:
        """The last view, once the listeners have had it; None while they have not, or before the first."""
        with self.changed:
            return self.view if self.view is not None and self.told_epoch == self.view.epoch else None

    @property
    def epoch(self) -> int:
        """The largest that was applied, 0 before the first."""
        with self.changed:
            return 0 if self.view is None else self.view.epoch

    @property
    def state(self) -> GroupState:
        """Now."""
        with self.changed:
            view = self.view
            return GroupState(
                group=self.group,
                rank=self.rank,
                state=self._state,
                epoch=0 if view is None else view.epoch,
                active_ranks=() if view is None else view.active_ranks,
                members=members_of(view, self.picture),
                policy_version=self.policy_version,
            )

    @property
    def statistics(self) -> GroupStatistics:
        """Now."""
        with self.changed:
            return self._statistics

    def count(self, **what: int) -> None:
        """Add to the statistics."""
        with self.changed:
            now = {name: getattr(self._statistics, name) + more for name, more in what.items()}
            self._statistics = replace(self._statistics, **now)

    def listen(self, listener: Listener) -> Callable[[], None]:
        """Tell `listener` from now on; returns what ends that."""
        with self.changed:
            self._listeners.append(listener)

        def end() -> None:
            with self.changed:
                self._listeners = [other for other in self._listeners if other is not listener]

        return end

    def listen_to_members(self, listener: Listener) -> Callable[[], None]:
        """`listen`, and tell it of the members there are now. Waits while a view is being told."""
        with self._telling:
            with self.changed:
                end = self.listen(listener)
                present = members_of(self.view, self.picture)
            for member in present.values():
                self._tell(listener.on_add, member)
        return end

    def wait(self, found: Callable[[], T | None], patience: Patience, late: Callable[[], TransportError]) -> T:
        """The first true answer of `found`, which is asked at each change, with the lock.

        Raises:
            TransportError: this rank is a member no longer; or `late()`, when the deadline has passed.
            RegistryError: it was given up.
        """
        with self.changed:
            while not (answer := found()):
                if self.ended is not None:
                    raise copy(self.ended)  # several may wait, and come back
                if patience.left_s <= 0:
                    raise late()
                patience.check("waiting")
                self.changed.wait(min(patience.left_s, LOOK_S))
            return answer

    def begin(self, incarnation: str) -> None:
        """This rank has published itself: it joins."""
        with self.changed:
            self._state = advance(self._state, RankEvent.ADMIT)
            self._incarnation = incarnation
            self._has_joined = False
            self.ended = None
            self.picture = None

    def end(self, event: RankEvent, error: TransportError) -> None:
        """This rank's membership is over: who waits is told why; listeners, if it had joined and did not leave."""
        with self.changed:
            if not self._state.is_seated:
                return
            is_known = (self._state, event) in TRANSITIONS  # not so if views were skipped that were soon outdated
            self._state = advance(self._state, event if is_known else RankEvent.LOSE)
            self.ended = error
            listeners = tuple(self._listeners) if self._has_joined and event is not RankEvent.LEAVE else ()
            self.changed.notify_all()
        for listener in listeners:
            self._tell(listener.on_gone, error)

    def show(self, picture: GroupPicture) -> None:
        """The store's present content, whatever of it is applied."""
        with self.changed:
            self.picture = picture
            if picture.policy_version is not None:
                self.policy_version = picture.policy_version
            self.changed.notify_all()

    def apply(self, view: GroupView) -> None:
        """Take a newer view: set, then told to the listeners, and only then are those woken who wait for it."""
        with self._telling:
            self._set_and_tell(view)
        with self.changed:
            self.told_epoch = view.epoch
            self.changed.notify_all()

    def _set_and_tell(self, view: GroupView) -> None:
        with self.changed:
            before, self.view = self.view, view
            listeners = tuple(self._listeners)
            come, gone = arrived(before, view), departed(before, view)
            was, now = members_of(before, self.picture), members_of(view, self.picture)
            if view.seats_incarnation(self.rank, self._incarnation):
                self._state = view.state_of(self.rank)
                self._has_joined = self._has_joined or self._state is not RankState.JOINING
            reasons = self._count_changes(before, view, come, gone)
        self._log_losses(view, reasons)
        for listener in listeners:
            for seat in gone:
                self._tell(listener.on_remove, was[seat.rank])
            for seat in come:
                self._tell(listener.on_add, now[seat.rank])
            self._tell(listener.on_view, view)

    def _tell(self, callback: Callable[..., object], *facts: object) -> None:
        try:
            callback(*facts)
        except Exception:  # noqa: BLE001 - a listener's trouble is its own: the group goes on
            self.count(callback_errors=1)
            _log.exception("group callback failed", group=self.group, rank=self.rank)

    def _count_changes(
        self, before: GroupView | None, view: GroupView, come: tuple[Seat, ...], gone: tuple[Seat, ...]
    ) -> dict[int, str]:
        """Count them; returns why each rank is gone."""
        was_active = () if before is None else before.active_ranks
        activated = [rank for rank in view.active_ranks if rank not in was_active]
        self.count(views=1, admitted=len(come), activated=len(activated))
        reasons = {}
        for seat in gone:
            seat_now = view.seat_of(seat.rank)
            ended_by = seat_now.ended_by if seat_now is not None and seat_now.ended_by else RankEvent.LOSE
            reasons[seat.rank] = _COUNTED_AS[ended_by]
            self.count(**{_COUNTED_AS[ended_by]: 1})
        return reasons

    def _log_losses(self, view: GroupView, reasons: dict[int, str]) -> None:
        """Of what came to pass as somebody wished there are counts."""
        for member, reason in reasons.items():
            if reason != _COUNTED_AS[RankEvent.LEAVE]:
                _log.warning(
                    "group member gone",
                    group=self.group,
                    rank=self.rank,
                    epoch=view.epoch,
                    member=member,
                    reason=reason,
                )
