"""Participant: what a member does when it looks at its group: it applies, acknowledges, and writes what should follow.

One `look` at a picture:

1. is this rank still a member? Its key must be there, and its seat not GONE; else its membership is over;
2. a newer view is applied: callbacks first, then those are woken who wait for it;
3. it is acknowledged, in the rank's own key;
4. if another view should follow (`joining.next_view`), and it is this rank's turn, that is written, expecting the
   revision of the present one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from ucxx_transport.errors import ConflictError, LeaseLostError, RegistryError, StoreResetError
from ucxx_transport.groups.claiming import ClaimedRank
from ucxx_transport.groups.group_board import GroupBoard
from ucxx_transport.groups.group_picture import GroupPicture
from ucxx_transport.groups.group_view import GroupView, ViewNews, news_of
from ucxx_transport.groups.joining import AckWait, next_view, overdue_ranks, turn_of, waits_of
from ucxx_transport.groups.rank_states import RankEvent
from ucxx_transport.membership.keys import member_key, policy_key, view_key
from ucxx_transport.membership.store import Store

__all__ = ["MembershipOverError", "Participant"]

TURN_S: Final = 0.1
"""How long each live member has to write the next view before the one behind it does: several round trips."""

LAST_TURN: Final = 20
"""However many members are before it, nobody waits for more turns than these."""

TICK_S: Final = 0.05
"""How often time is looked at while somebody is waited for."""

CALL_S: Final = 5.0
"""Bound on one call of the store."""


class MembershipOverError(Exception):
    """This rank is not in the group any more.

    Attributes:
        event: how it ended.
        error: what who asks is told.
    """

    def __init__(self, event: RankEvent, error: RegistryError) -> None:
        super().__init__(str(error))
        self.event, self.error = event, error


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wish:
    """A view that should follow another one.

    Attributes:
        view_revision: of the one it should follow.
        since: when that was first seen.
    """

    view_revision: int
    since: float


class Participant:
    """See the module. Used by one thread.

    Args:
        store: the group's.
        board: told of all that happens.
        claimed: the rank that was taken.
        ack_timeout_s: how long an acknowledgement is waited for before who owes it is dropped.
        clock: seconds.
    """

    def __init__(
        self,
        store: Store,
        board: GroupBoard,
        claimed: ClaimedRank,
        *,
        ack_timeout_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._store, self._board, self._clock = store, board, clock
        self._group, self._rank = board.group, board.rank
        self._record, self._lease_id = claimed.record, claimed.lease.lease_id
        self._ack_timeout_s = ack_timeout_s
        self._waits: tuple[AckWait, ...] = ()
        self._wish: _Wish | None = None
        self._seen_revision = 0
        self._overtaken_revision = -1
        self._has_applied = False  # in this life: before, another view than an earlier life's is only one to wait out
        self._was_seated = False

    def begin_anew(self) -> None:
        """The store was out of reach: that time does not count against those who could not acknowledge in it."""
        self._waits = ()
        self._wish = None
        self._seen_revision = 0
        self._overtaken_revision = -1

    def look(self, picture: GroupPicture) -> float | None:
        """Do what the picture asks for.

        Returns:
            In how many seconds to look again at the latest, if nothing changes; None: only a change matters.

        Raises:
            MembershipOverError: this rank is not a member any more.
            LeaseLostError, ConflictError, StoreUnavailableError, StorePermissionError: the store's answers to a write.
        """
        self._board.show(picture)
        self._check_key(picture)
        self._apply(picture)
        self._check_seat()
        if picture.revision < self._seen_revision:
            return TICK_S  # what this rank wrote has not come back yet: the picture is older than its deeds
        self._restore_policy(picture)
        self._acknowledge(picture)
        return self._write(picture)

    def _check_key(self, picture: GroupPicture) -> None:
        own = picture.members.get(self._rank)
        if own is None or own.incarnation != self._record.incarnation:
            raise MembershipOverError(
                RankEvent.LOSE,
                LeaseLostError(
                    "this rank's key is gone from the store, as its lease must be: join_group() again",
                    group=self._group,
                    rank=self._rank,
                    taken_over=own is not None,
                ),
            )

    def _apply(self, picture: GroupPicture) -> None:
        if picture.view is None:
            return
        news = news_of(picture.view, self._board.view)
        if news is ViewNews.CONTRADICTION and self._has_applied:
            raise MembershipOverError(
                RankEvent.LOSE,
                StoreResetError(
                    "the store has another view of the epoch that this rank applied last: its data are others. "
                    "join_group() again",
                    group=self._group,
                    rank=self._rank,
                    epoch=picture.view.epoch,
                ),
            )
        if news is ViewNews.NEWER:
            self._has_applied = True
            self._board.apply(picture.view)

    def _check_seat(self) -> None:
        view = self._board.view
        seat = None if view is None else view.seat_of(self._rank)
        is_own = seat is not None and seat.incarnation == self._record.incarnation
        if is_own and seat is not None and seat.state.is_seated:
            self._was_seated = True
            return
        if not self._was_seated and not is_own:
            return  # not admitted yet
        event = seat.ended_by if is_own and seat is not None and seat.ended_by is not None else RankEvent.LOSE
        raise MembershipOverError(
            event,
            LeaseLostError(
                "the group goes on without this rank: join_group() again",
                group=self._group,
                rank=self._rank,
                epoch=self._board.epoch,
                ended_by=event.value,
            ),
        )

    def _restore_policy(self, picture: GroupPicture) -> None:
        """A store that lost its data has lost the policy version too."""
        known = self._board.policy_version
        if picture.policy_version is None and known is not None and policy_key(self._group) not in picture.problems:
            self._put(policy_key(self._group), str(known).encode(), expected=0)

    def _acknowledge(self, picture: GroupPicture) -> None:
        epoch = self._board.epoch
        own = picture.members[self._rank]
        if own.epoch < epoch:
            revision = picture.member_revisions[self._rank]
            self._record = own.having_applied(epoch)
            self._put(
                member_key(self._group, self._rank),
                self._record.to_bytes(),
                lease_id=self._lease_id,
                expected=revision,
            )

    def _write(self, picture: GroupPicture) -> float | None:
        if view_key(self._group) in picture.problems or picture.view_revision == self._overtaken_revision:
            return None
        now = self._clock()
        self._waits = waits_of(picture.view, self._waits, now)
        late = overdue_ranks(picture.view, picture.members, self._waits, now=now, ack_timeout_s=self._ack_timeout_s)
        wanted = next_view(picture.view, picture.members, overdue=late)
        if wanted is None or picture.revision < self._seen_revision:
            self._wish = None
            return TICK_S if self._waits or wanted is not None else None
        if self._wish is None or self._wish.view_revision != picture.view_revision:
            self._wish = _Wish(view_revision=picture.view_revision, since=now)
        turn = min(turn_of(picture.view, picture.members, self._rank), LAST_TURN)
        if now - self._wish.since < turn * TURN_S:
            return TICK_S
        self._write_view(wanted, picture)
        return TICK_S

    def _write_view(self, wanted: GroupView, picture: GroupPicture) -> None:
        try:
            self._put(view_key(self._group), wanted.to_bytes(), expected=picture.view_revision)
        except ConflictError:
            self._overtaken_revision = picture.view_revision
            self._board.count(conflicts=1)
            return
        self._board.count(written=1)

    def _put(self, key: str, value: bytes, *, expected: int, lease_id: int | None = None) -> None:
        self._seen_revision = self._store.put(key, value, lease_id=lease_id, expected=expected, timeout_s=CALL_S)
