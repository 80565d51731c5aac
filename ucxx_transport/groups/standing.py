"""Standing: how a rank stands to its group: joining, leaving, joining again."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable

from ucxx_transport.config import PublisherConfig, StoreConfig
from ucxx_transport.errors import (
    ConfigError,
    DeadlineExceededError,
    LeaseLostError,
    NotReadyError,
    RegistryError,
    StoreResetError,
    TransportError,
)
from ucxx_transport.groups.claiming import claim_rank
from ucxx_transport.groups.group_board import GroupBoard
from ucxx_transport.groups.group_state import GroupState
from ucxx_transport.groups.group_writes import change_view
from ucxx_transport.groups.joining import waited_for
from ucxx_transport.groups.member_record import MemberRecord
from ucxx_transport.groups.membership import Membership, MembershipRules
from ucxx_transport.groups.patience import Patience
from ucxx_transport.groups.rank_states import RankEvent, RankState
from ucxx_transport.logs import get_logger
from ucxx_transport.membership.keeper_process import KeeperProcess
from ucxx_transport.membership.store import Store

__all__ = ["Standing"]

_log = get_logger(__name__)


class Standing:
    """See the module. Thread-safe.

    Args:
        store: the group's.
        board: told of all that happens.
        record: what this rank publishes; incarnation and epoch are another one's at each join.
        config: interval, pauses, bounds, and who renews.
        store_config: the store's settings, for the process that renews.
        ack_timeout_s: how long an acknowledgement is waited for.
        clock: seconds.
    """

    def __init__(
        self,
        store: Store,
        board: GroupBoard,
        *,
        record: MemberRecord,
        config: PublisherConfig,
        store_config: StoreConfig,
        ack_timeout_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._store, self._board, self._record = store, board, record
        self._config, self._store_config, self._clock = config, store_config, clock
        self._rules = MembershipRules(
            interval_s=config.interval_s, ack_timeout_s=ack_timeout_s, stop_timeout_s=config.stop_timeout_s
        )
        self._joining = threading.Lock()
        self._given_up = threading.Event()
        self._membership: Membership | None = None

    @property
    def membership(self) -> Membership:
        """The present one.

        Raises:
            NotReadyError: this rank is not a member.
        """
        membership = self._membership
        if membership is None or not self._board.is_seated:
            raise NotReadyError(
                "this rank is not a member: join_group() first", group=self._board.group, rank=self._board.rank
            )
        return membership

    def patience(self, timeout_s: float, *, given_up: threading.Event | None = None) -> Patience:
        """For calls that may take so long.

        Raises:
            ConfigError: `timeout_s` is not more than 0.
        """
        if timeout_s <= 0:
            raise ConfigError(f"timeout_s must be more than 0, not {timeout_s}", field="timeout_s")
        return Patience(
            deadline=self._clock() + timeout_s,
            clock=self._clock,
            backoff_s=self._config.backoff_s,
            max_backoff_s=self._config.max_backoff_s,
            given_up=threading.Event() if given_up is None else given_up,
        )

    def join(self, timeout_s: float) -> GroupState:
        """See `RankGroup.join_group`."""
        patience = self.patience(timeout_s, given_up=self._given_up)
        if not self._joining.acquire(timeout=patience.left_s):
            raise DeadlineExceededError(
                "another join_group() of this rank is under way",
                group=self._board.group,
                rank=self._board.rank,
                waiting_for="the other join_group()",
            )
        try:
            self._given_up.clear()
            if self._membership is not None and self._board.is_seated:
                return self._board.state
            if self._membership is not None:
                self._membership.end()  # one that is over: its thread may just be ending
            while True:
                try:
                    return self._join_once(patience)
                except (LeaseLostError, StoreResetError) as error:
                    _log.warning("joining begins anew", group=self._board.group, reason=str(error))
                    patience.pause(self._config.backoff_s, phase="joining")
        finally:
            self._joining.release()

    def _join_once(self, patience: Patience) -> GroupState:
        wanted = self._record.of_new_life(uuid.uuid4().hex, known_epoch=self._board.epoch)
        claimed = claim_rank(self._store, self._board.group, wanted, patience, clock=self._clock)
        membership = Membership(
            self._store,
            self._board,
            claimed,
            rules=self._rules,
            keeper=self._keeper(),
            clock=self._clock,
        )
        self._board.begin(wanted.incarnation)
        self._membership = membership
        try:
            membership.start()
            return self._board.wait(lambda: self._joined(wanted.incarnation), patience, self._not_joined)
        except BaseException:
            membership.end()
            self._board.end(RankEvent.LEAVE, RegistryError("joining was given up", group=self._board.group))
            self._membership = None
            raise

    def _keeper(self) -> KeeperProcess | None:
        if self._config.keeper == "thread":
            return None
        return KeeperProcess(self._store.url, self._store_config, interval_s=self._config.interval_s)

    def _joined(self, incarnation: str) -> GroupState | None:
        view = self._board.told_view
        if view is None or not view.seats_incarnation(self._board.rank, incarnation):
            return None
        state = self._board.state
        return state if state.state in (RankState.ACTIVE, RankState.INACTIVE) else None

    def _not_joined(self) -> DeadlineExceededError:
        picture = self._board.picture
        waiting_for: object = "store"
        if picture is not None:
            waiting_for = waited_for(picture.view, picture.members, self._board.rank)
        return DeadlineExceededError(
            f"rank {self._board.rank} did not become active in {self._board.group!r} in time",
            group=self._board.group,
            rank=self._board.rank,
            waiting_for=waiting_for,
            epoch=self._board.epoch,
            problems={} if picture is None else dict(picture.problems),
        )

    def leave(self) -> None:
        """See `RankGroup.leave`."""
        self._given_up.set()
        membership = self._membership
        is_callback = membership is not None and membership.is_own_thread
        has_lock = not is_callback and self._joining.acquire(timeout=self._config.stop_timeout_s)
        try:
            membership, self._membership = self._membership, None
            if membership is not None:
                self._leave(membership)
        finally:
            if has_lock:
                self._joining.release()

    def _leave(self, membership: Membership) -> None:
        group, rank = self._board.group, self._board.rank
        if self._board.is_seated:
            try:
                change_view(
                    self._store,
                    group,
                    RankEvent.LEAVE,
                    [rank],
                    self.patience(self._config.stop_timeout_s),
                    incarnation=membership.record.incarnation,
                )
            except TransportError as error:
                _log.warning("left without a word", group=group, rank=rank, reason=str(error))
        self._board.end(RankEvent.LEAVE, NotReadyError("this rank has left", group=group, rank=rank))
        membership.end()
