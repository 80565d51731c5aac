"""A model of a group in plain dicts: which process holds which rank, what each has applied, which views may follow."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from ucxx_transport.groups.view import GroupView, RankEvent, RankState, Seat

# From → to, whatever happened between two views: a rank's death and its next life may fall into one.
STEPS = {
    (RankState.ISOLATED, RankState.JOINING),
    (RankState.JOINING, RankState.ACTIVE),
    (RankState.JOINING, RankState.INACTIVE),
    (RankState.ACTIVE, RankState.INACTIVE),
    (RankState.INACTIVE, RankState.JOINING),
    (RankState.JOINING, RankState.GONE),
    (RankState.ACTIVE, RankState.GONE),
    (RankState.INACTIVE, RankState.GONE),
    (RankState.GONE, RankState.JOINING),
}


@dataclass
class GroupModel:
    """One generation of a store's data, as an observer of everything sees it.

    Attributes:
        ack_timeout_s: how long acknowledgements are waited for.
        views: all that were written, in order, with the time.
        applied: incarnation → the largest epoch that it has really applied.
        acknowledged: (incarnation, epoch) → when its record said so first.
        alive: incarnations whose lease lives.
        resting: incarnations that were deactivated, and not recalled since.
        left: incarnations that left by themselves.
    """

    ack_timeout_s: float
    views: list[tuple[float, GroupView]] = field(default_factory=list)
    applied: dict[str, int] = field(default_factory=dict)
    acknowledged: dict[tuple[str, int], float] = field(default_factory=dict)
    alive: set[str] = field(default_factory=set)
    resting: set[str] = field(default_factory=set)
    left: set[str] = field(default_factory=set)

    @property
    def view(self) -> GroupView:
        return self.views[-1][1] if self.views else GroupView(epoch=0)

    def written(self, view: GroupView, now: float) -> None:
        """A view was written: may it follow?"""
        before = self.view
        assert view.epoch > before.epoch, "an epoch only grows"
        for seat in view.seats:
            self._judge(before.seat_of(seat.rank), seat, view, now)
        assert {seat.rank for seat in before.seats} <= {seat.rank for seat in view.seats}, "a seat stays"
        self.views.append((now, view))

    def _judge(self, before: Seat, after: Seat, view: GroupView, now: float) -> None:
        if before.incarnation == after.incarnation:
            if before.state is after.state:
                return
            assert (before.state, after.state) in STEPS
            assert before.state is not RankState.GONE, "an incarnation that is gone stays gone"
        else:
            assert after.state is RankState.JOINING, "a new incarnation begins by joining"
            assert after.awaited == view.epoch
            if before.state.is_seated:
                assert before.incarnation not in self.alive, "a rank is taken from the dead alone"
        if after.state is RankState.ACTIVE:
            self._judge_activation(after, view)
        if after.ended_by is RankEvent.LOSE:
            assert after.incarnation not in self.alive, "a rank with a lease is not lost"
        if after.ended_by is RankEvent.LEAVE:
            assert after.incarnation in self.left
        if after.ended_by is RankEvent.DROP:
            self._judge_drop(after, now)

    def _judge_activation(self, joiner: Seat, view: GroupView) -> None:
        for seat in view.seats:
            if seat.state is RankState.ACTIVE and seat.incarnation in self.alive:
                was = self.view.state_of(seat.rank)
                if was is RankState.ACTIVE or seat.rank == joiner.rank:
                    assert self.applied[seat.incarnation] >= joiner.awaited, "all active ones know of it"
        assert joiner.incarnation not in self.resting

    def _judge_drop(self, dropped: Seat, now: float) -> None:
        """Some joiner had been waiting for it for as long as acknowledgements are waited for.

        One that acknowledged in time is not dropped; one that does so between the decision and its write may be.
        """
        late = []
        for seat in self.view.seats:
            written = [when for when, view in self.views if view.epoch == seat.awaited]
            if seat.state is RankState.JOINING and written:
                due = written[0] + self.ack_timeout_s - 1e-6
                late.append(due <= min(now, self._acknowledged_at(dropped.incarnation, seat.awaited)))
        assert late, "no rank was joining"
        assert any(late), "no joiner had waited for it for so long"

    def _acknowledged_at(self, incarnation: str, epoch: int) -> float:
        times = [when for (who, known), when in self.acknowledged.items() if who == incarnation and known >= epoch]
        return min(times, default=math.inf)

    def expected(self, healthy: dict[int, str]) -> dict[int, RankState]:
        """The states of healthy ranks once all is quiet: active, unless they were deactivated."""
        return {
            rank: RankState.INACTIVE if incarnation in self.resting else RankState.ACTIVE
            for rank, incarnation in healthy.items()
        }
