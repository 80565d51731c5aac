"""RankGroup: a group of ranks that each join when they are ready, and that goes on while others come and go."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from types import TracebackType
from typing import Final, Self

from ucxx_transport.config import PublisherConfig, StoreConfig
from ucxx_transport.errors import ConfigError, DeadlineExceededError, NotReadyError, TransportError
from ucxx_transport.groups.group_board import GroupBoard, Listener
from ucxx_transport.groups.group_state import GroupState, GroupStatistics, Member
from ucxx_transport.groups.group_view import GroupView
from ucxx_transport.groups.group_writes import change_view, put_policy_version
from ucxx_transport.groups.member_record import MemberRecord
from ucxx_transport.groups.membership import Membership
from ucxx_transport.groups.patience import Patience
from ucxx_transport.groups.rank_states import RankEvent, RankState
from ucxx_transport.groups.standing import Standing
from ucxx_transport.membership.store import Store

__all__ = ["RankGroup"]

MAX_RANKS: Final = 1 << 20

CHANGE_TIMEOUT_S: Final = 30.0
"""A change of the group that names no bound: several acknowledgement timeouts, and an outage of seconds."""


class RankGroup:
    """One rank's part in a group. Thread-safe.

    Until `join_group` nothing of it is in the store, and nobody waits for it or knows of it: so a recovered rank
    initialises alone, for as long as it takes, while the others work on.

    Args:
        store: `open_store(url)`; it stays the caller's to close, after `leave`.
        group: its name.
        rank: this process's place in it, from 0.
        world_size: how many places there are; None: as many as come.
        address: where this rank can be reached, for the others.
        meta: plain JSON values of this rank, for the others.
        config: who renews the lease and how often (it lives three times that), pauses between tries, the bound on
            leaving; None: those of the environment and the file.
        ack_timeout_s: how long a joining rank is kept waiting by one that does not acknowledge it, before that one is
            dropped. Longer than a lease lives, so that a dead one has gone by then.
        store_config: the store's settings, for the process that renews the lease; None: those of the environment and
            the file.
        clock: seconds.

    Raises:
        ConfigError: an argument is wrong.
    """

    def __init__(
        self,
        store: Store,
        group: str,
        rank: int,
        *,
        world_size: int | None = None,
        address: str = "",
        meta: Mapping[str, object] | None = None,
        config: PublisherConfig | None = None,
        ack_timeout_s: float = 10.0,
        store_config: StoreConfig | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        config = PublisherConfig() if config is None else config
        self._world_size = world_size
        if world_size is not None and world_size < 1:
            raise ConfigError(f"world_size must be 1 or more, not {world_size}", field="world_size")
        if not group:
            raise ConfigError("a group needs a name", field="group")
        if ack_timeout_s <= 0:
            raise ConfigError(f"ack_timeout_s must be more than 0, not {ack_timeout_s}", field="ack_timeout_s")
        self._check_ranks([rank])
        self._store, self._group, self._rank = store, group, rank
        self._board = GroupBoard(group, rank)
        self._standing = Standing(
            store,
            self._board,
            record=MemberRecord(
                rank=rank, incarnation="", epoch=0, ttl_s=config.ttl_s, address=address, meta=meta or {}
            ),
            config=config,
            ack_timeout_s=ack_timeout_s,
            store_config=StoreConfig() if store_config is None else store_config,
            clock=clock,
        )

    # what there is

    @property
    def rank(self) -> int:
        """This process's place."""
        return self._rank

    @property
    def state(self) -> GroupState:
        """The group as this rank has it now. `state.state` is GONE when its lease was lost, or the group dropped it."""
        return self._board.state

    @property
    def view(self) -> GroupView | None:
        """The view that was applied last; None before the first. It stays when the store cannot be reached."""
        return self._board.view

    def statistics(self) -> GroupStatistics:
        """What was seen of the group so far."""
        return self._board.statistics

    def get_peer_state(self, rank: int) -> RankState:
        """The state of a rank, as far as this one knows: without asking the store.

        Raises:
            ConfigError: the group has no such place.
            NotReadyError: this rank has seen no view yet: `join_group()` first.
        """
        self._check_ranks([rank])
        now = self._board.state
        if rank == self._rank:
            return now.state
        view, picture = self._board.view, self._board.picture
        if view is None:
            raise NotReadyError("an isolated rank knows of nobody: join_group() first", group=self._group, rank=rank)
        state = view.state_of(rank)
        record = None if picture is None else picture.members.get(rank)
        seat = view.seat_of(rank)
        if not state.is_seated and record is not None and (seat is None or seat.incarnation != record.incarnation):
            return RankState.JOINING  # it has published itself, and will be admitted
        return state

    # being a member

    def join_group(self, timeout_s: float) -> GroupState:
        """Become a member: publish this rank, be admitted at a new epoch, and wait until all have acknowledged it.

        A member already: returns at once, and nothing changes. A lease that is lost while waiting, or a store that is
        wiped, begins it anew within the same time.

        Args:
            timeout_s: how long it may take. A dead member's rank is free when its lease has ended, which is some
                seconds after its death.

        Returns:
            The group's state at the epoch in which this rank became active (or INACTIVE, if somebody deactivated it).

        Raises:
            DuplicateSourceError: a live member has this rank.
            DeadlineExceededError: nothing of this rank is left in the group; `facts["waiting_for"]` has the ranks, or
                "store", that it was waiting for.
            RegistryError: `leave` was called meanwhile, or the store refuses this user.
        """
        return self._standing.join(timeout_s)

    def leave(self) -> None:
        """Be a member no longer: the view says so, then the lease is given back. Idempotent, and bounded.

        What this rank serves should have ended by then: the others stop asking it as soon as they see the view. A
        `join_group` that is under way in another thread is given up. If the store cannot be reached, the lease ends by
        itself. `join_group` may be called again.
        """
        self._standing.leave()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.leave()

    # what a member may ask for

    def activate_ranks(self, ranks: Collection[int], timeout_s: float = CHANGE_TIMEOUT_S) -> GroupView:
        """Wait until these ranks are ACTIVE, and let those join once more that were deactivated.

        Ranks that are active already stay as they are; if all are, the epoch does not change. Called from a callback
        it does not wait.

        Returns:
            The view in which they are.

        Raises:
            ConfigError: the group has no such place.
            NotReadyError: this rank or one of those is not a member, or is one no longer.
            DeadlineExceededError: the store did not answer, or `facts["waiting_for"]` are not active yet.
        """
        membership, patience = self._member(ranks), self._standing.patience(timeout_s)
        epoch = change_view(self._store, self._group, RankEvent.RECALL, ranks, patience)

        def active() -> GroupView | None:
            view = self._told(epoch)
            gone = [] if view is None else [rank for rank in ranks if not view.state_of(rank).is_seated]
            if gone:
                raise NotReadyError(f"ranks {gone} have gone meanwhile", group=self._group, ranks=gone)
            return view if view is not None and set(ranks) <= set(view.active_ranks) else None

        def late() -> DeadlineExceededError:
            view = self._board.view
            waiting_for = sorted(set(ranks) - set(() if view is None else view.active_ranks))
            return DeadlineExceededError(f"ranks {waiting_for} are not active yet", waiting_for=tuple(waiting_for))

        return self._awaited(membership, active, patience, late)

    def deactivate_ranks(self, ranks: Collection[int], timeout_s: float = CHANGE_TIMEOUT_S) -> GroupView:
        """Take these ranks out of the active ones; they stay members, and nobody waits for them.

        This rank may be among them. Ranks that are not active, or not even members, stay as they are.

        Returns:
            The view in which they are not active; the others have it as soon as they see it.

        Raises:
            ConfigError: the group has no such place.
            NotReadyError: this rank is not a member.
            DeadlineExceededError: the store did not answer.
        """
        membership, patience = self._member(ranks), self._standing.patience(timeout_s)
        epoch = change_view(self._store, self._group, RankEvent.DEACTIVATE, ranks, patience)
        return self._awaited(membership, lambda: self._told(epoch), patience, lambda: self._not_seen(epoch))

    def set_policy_version(self, version: int, timeout_s: float = CHANGE_TIMEOUT_S, *, rewind: bool = False) -> None:
        """Say which policy version the group trains; joiners are told. It is no part of the view, so no epoch follows.

        Raises:
            ConfigError: not a number from 0 on, or behind the one that the group has, without `rewind`.
            NotReadyError: this rank is not a member.
            DeadlineExceededError: the store did not answer.
        """
        if type(version) is not int or not 0 <= version < 1 << 59:
            raise ConfigError(f"a policy version is a number from 0 on, not {version!r}", field="version")
        membership, patience = self._member(()), self._standing.patience(timeout_s)
        revision = put_policy_version(self._store, self._group, version, patience, rewind=rewind)

        def seen() -> bool:
            picture = self._board.picture
            return picture is not None and picture.revision >= revision

        if not membership.is_own_thread:
            self._board.wait(seen, patience, lambda: self._not_seen(self._board.epoch))

    def wait_for_view(self, min_epoch: int, timeout_s: float) -> GroupView:
        """The group's view once it is of `min_epoch` or later, and the callbacks of `on_view` have had it.

        Raises:
            NotReadyError: this rank is not a member.
            LeaseLostError, StoreResetError: it is one no longer: `join_group()` again.
            DeadlineExceededError: no such view came.
        """
        self._member(())
        return self._board.wait(
            lambda: self._told(min_epoch), self._standing.patience(timeout_s), lambda: self._not_seen(min_epoch)
        )

    # being told

    def on_view(self, callback: Callable[[GroupView], object]) -> Callable[[], None]:
        """Call `callback` with each view from now on, also while joining; returns what ends that.

        It is called in the group's own thread. The view is acknowledged, and who waits for it is woken, when it has
        returned: so it is the place to connect to those who join. A callback that takes longer than `ack_timeout_s`
        while somebody joins costs this rank its place. An exception is logged and counted, and the view acknowledged.
        """
        return self._board.listen(Listener(on_view=callback))

    def on_gone(self, callback: Callable[[TransportError], object]) -> Callable[[], None]:
        """Call `callback` when this rank is a member no longer without having left; returns what ends that.

        It is called in the group's own thread, with the reason: the lease was lost, or the group dropped this rank.
        """
        return self._board.listen(Listener(on_gone=callback))

    def subscribe(
        self,
        *,
        on_add: Callable[[Member], object] = lambda _: None,
        on_remove: Callable[[Member], object] = lambda _: None,
    ) -> Callable[[], None]:
        """Call `on_add` with each member there is and each that is admitted, `on_remove` with each that has gone.

        A rank whose new life is admitted has gone before. Returns what ends that.
        """
        return self._board.listen_to_members(Listener(on_add=on_add, on_remove=on_remove))

    # waiting

    def _told(self, min_epoch: int) -> GroupView | None:
        view = self._board.told_view
        return view if view is not None and view.epoch >= min_epoch else None

    def _not_seen(self, epoch: int) -> DeadlineExceededError:
        return DeadlineExceededError(
            f"no view of epoch {epoch} or later was seen in time",
            group=self._group,
            waiting_for=f"epoch {epoch}",
            epoch=self._board.epoch,
        )

    def _member(self, ranks: Collection[int]) -> Membership:
        self._check_ranks(ranks)
        return self._standing.membership

    def _awaited(
        self,
        membership: Membership,
        found: Callable[[], GroupView | None],
        patience: Patience,
        late: Callable[[], DeadlineExceededError],
    ) -> GroupView:
        if membership.is_own_thread and self._board.view is not None:
            return self._board.view  # the view comes by this very thread
        return self._board.wait(found, patience, late)

    def _check_ranks(self, ranks: Collection[int]) -> None:
        end = MAX_RANKS if self._world_size is None else self._world_size
        for rank in ranks:
            if type(rank) is not int or not 0 <= rank < end:
                raise ConfigError(f"rank must be from 0 to {end - 1}, not {rank!r}", field="rank", rank=rank)
