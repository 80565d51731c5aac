"""RankGroup: a group of ranks that each join when they are ready, and that goes on while others come and go."""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Final, Self

from ucxx_transport import errors
from ucxx_transport.config import PublisherConfig, checked_seconds
from ucxx_transport.groups.participant import Participant, change_view, put_policy_version
from ucxx_transport.groups.state import GONE, PAUSE_S, GroupState, GroupStatistics, Member, Retrying, SharedState
from ucxx_transport.groups.view import GroupView, MemberRecord, RankEvent, RankState
from ucxx_transport.logs import get_logger
from ucxx_transport.membership.listeners import ADD, REMOVE
from ucxx_transport.membership.store import Store
from ucxx_transport.settings import check_can, made_of
from ucxx_transport.teardown import OfOneProcess, Teardown, may_end, refuse_forked

_log = get_logger(__name__)

CHANGE_TIMEOUT_S: Final = 30.0  # for a change that names no bound: several ack_timeout_s, and an outage of seconds


class RankGroup(OfOneProcess):
    """One rank's part in a group. Thread-safe.

    Until `join_group` nothing of it is in the store, and no member waits for it or knows of it: so a recovered rank
    initialises alone, for as long as it takes, while the others work on.

    Args:
        store: `open_store(url)`; it stays the caller's to close, after `leave`.
        group: its name.
        rank: this process's place in it, from 0.
        address: where this rank can be reached, for the others.
        meta: plain JSON values of this rank, for the others.
        config: what renews the lease and how often (it lives three times that), pauses between tries, the bound on
            leaving: a dict or a `PublisherConfig`; None: those of the environment and the file.
        ack_timeout_s: how long a joining rank is kept waiting by one that does not acknowledge it, before that one is
            dropped. Longer than a lease lives, so that a dead one has gone by then.
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
        address: str = "",
        meta: Mapping[str, object] | None = None,
        config: PublisherConfig | Mapping[str, object] | None = None,
        ack_timeout_s: float | str = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not group:
            raise errors.ConfigError("a group needs a name", field="group")
        check_can(store, "grant", "store", "a store, such as open_store(url)")
        ack_timeout_s = checked_seconds(ack_timeout_s, "ack_timeout_s")
        if ack_timeout_s <= 0:
            raise errors.ConfigError(f"ack_timeout_s must be more than 0, not {ack_timeout_s}", field="ack_timeout_s")
        config = made_of(PublisherConfig, config, "config")
        self._shared = SharedState(store, group, rank, config=config, ack_timeout_s=ack_timeout_s, clock=clock)
        self._record = MemberRecord(rank=rank, incarnation="", ttl_s=config.ttl_s, address=address, meta=meta or {})
        self._joining = threading.RLock()
        self._cancelled = threading.Event()
        self._participant: Participant | None = None
        self._pid = os.getpid()

    @property
    def rank(self) -> int:
        """This process's place."""
        return self._record.rank

    @property
    def state(self) -> GroupState:
        """The group as this rank has it now. `state.state` is GONE when its lease was lost, or the group dropped it.

        View and statistics of one state belong together; two reads of this property are of two moments.
        """
        refuse_forked(self._pid, "RankGroup")
        return self._shared.now

    @property
    def view(self) -> GroupView | None:
        """The view that was applied last; None before the first. It stays when the store cannot be reached."""
        return self.state.view

    def statistics(self) -> GroupStatistics:
        """What was seen of the group so far: `state.statistics`."""
        return self.state.statistics

    def get_peer_state(self, rank: int) -> RankState:
        """The state of a rank, as far as this one knows: without asking the store.

        Raises:
            ConfigError: it is no rank.
            NotReadyError: this rank has seen no view yet: `join_group()` first.
        """
        now = self.state
        if rank == self.rank:
            return now.state
        if now.view is None:
            text = "an isolated rank knows no others: join_group() first"
            raise errors.NotReadyError(text, group=now.group, rank=rank)
        return now.view.state_of(rank)

    def join_group(self, timeout_s: float | str) -> GroupState:
        """Become a member: publish this rank, be admitted at a new epoch, and wait until all have acknowledged it.

        A member already: returns at once, and nothing changes. If its lease is lost while it waits, or the store is
        wiped, it starts over within the same time.

        Args:
            timeout_s: how long it may take; 0 is enough for a member alone. A dead member's rank is free when its lease
                has ended, which is some seconds after its death.

        Returns:
            The group's state at the epoch in which this rank became active (or INACTIVE, if it was deactivated).

        Raises:
            DuplicateSourceError: a live member has this rank.
            DeadlineExceededError: nothing of this rank is left in the group; `facts["waiting_for"]` has the ranks, or
                "store", that it was waiting for.
            RegistryError: it was cancelled by `leave`, or the store refuses this user.
            ConfigError: a callback calls this.
        """
        refuse_forked(self._pid, "RankGroup")
        self._shared.listeners.refuse_in_callback("join_group()")
        retrying = Retrying(self._shared, timeout_s, "joining", cancelled=self._cancelled)
        try:
            while True:
                if self._joining.acquire(timeout=min(retrying.left_s, PAUSE_S)):
                    break
                retrying.check("another join_group() of this rank")
            has_left = self._cancelled.is_set()  # by a callback's leave that is under way, or one that was interrupted
            self._cancelled.clear()
            if self._participant is not None:
                if self.state.state.is_seated and self._shared.has_joined and not has_left:
                    return self.state
                self._stop(self._participant)  # one that is just ending, or the end of whose join was interrupted
            while True:
                try:
                    return self._join_once(retrying)
                except (errors.LeaseLostError, errors.StoreResetError) as error:
                    _log.warning("join_restarted", reason=str(error), **self._shared.facts)
                    retrying.pause(self._shared.config.backoff_s)
        finally:
            self._release()

    def leave(self) -> None:
        """End the membership: in the view first, then the lease is given back. Idempotent, and bounded.

        What this rank serves should have ended by then: the others stop asking it as soon as they see the view. A
        `join_group` that is under way in another thread is cancelled. If the store cannot be reached, the lease ends by
        itself. `join_group` may be called again. Callbacks have a second for the news that they have not heard.
        """
        if not may_end(self._pid):
            return
        self._cancelled.set()
        is_callback = self._participant is not None and self._participant.is_own_thread
        try:
            if not is_callback:
                self._joining.acquire(timeout=self._shared.config.stop_timeout_s)
            if (participant := self._participant) is not None:
                self._stop(participant)
                if self._participant is participant:  # else a join that a callback's leave did not keep waiting
                    self._participant = None  # what interrupts this is made good by another call
        finally:
            self._release()
        self._shared.listeners.wait_idle()  # so that callbacks have ended with it, unless one blocks

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.leave()

    def activate_ranks(self, ranks: Collection[int], timeout_s: float | str = CHANGE_TIMEOUT_S) -> GroupView:
        """Wait until these ranks are ACTIVE, and let those join once more that were deactivated.

        Ranks that are active already stay as they are; if all are, the epoch does not change. Called from a callback
        it does not wait.

        Returns:
            The view in which they are.

        Raises:
            ConfigError: one of those is no rank.
            NotReadyError: this rank or one of those is not a member, or is one no longer.
            DeadlineExceededError: the store did not answer, or `facts["waiting_for"]` are not active yet.
        """
        return self._change(RankEvent.RECALL, ranks, timeout_s, active=ranks)

    def deactivate_ranks(self, ranks: Collection[int], timeout_s: float | str = CHANGE_TIMEOUT_S) -> GroupView:
        """Take these ranks out of the active ones; they stay members, and are not waited for.

        This rank may be among them. Ranks that are not active, or not even members, stay as they are.

        Returns:
            The view in which they are not active; the others have it as soon as they see it.

        Raises:
            ConfigError: one of those is no rank.
            NotReadyError: this rank is not a member.
            DeadlineExceededError: the store did not answer.
        """
        return self._change(RankEvent.DEACTIVATE, ranks, timeout_s)

    def set_policy_version(
        self, version: int, timeout_s: float | str = CHANGE_TIMEOUT_S, *, rewind: bool = False
    ) -> None:
        """Set which policy version the group trains; joiners get it. It is no part of the view: no epoch follows.

        Raises:
            ConfigError: not a number from 0 on, or behind the one that the group has, without `rewind`.
            NotReadyError: this rank is not a member.
            DeadlineExceededError: the store did not answer.
        """
        if type(version) is not int or not 0 <= version < 1 << 59:
            raise errors.ConfigError(f"a policy version is a number from 0 on, not {version!r}", field="version")
        self._member()
        retrying = Retrying(self._shared, timeout_s, "setting the policy version")
        revision = put_policy_version(retrying, version, rewind=rewind)
        if not self._shared.listeners.is_calling_back():
            self._shared.wait(lambda now: now.snapshot.revision >= revision, retrying, f"revision {revision}")

    def wait_for_view(self, min_epoch: int, timeout_s: float | str) -> GroupView:
        """The group's view once it is of `min_epoch` or later, and the callbacks of `on_view` have had it.

        Raises:
            NotReadyError: this rank is not a member.
            LeaseLostError, StoreResetError: it is one no longer: `join_group()` again.
            DeadlineExceededError: no such view came.
            ConfigError: a callback calls this.
        """
        self._shared.listeners.refuse_in_callback("wait_for_view()")
        self._member()
        retrying = Retrying(self._shared, timeout_s, "waiting for a view")
        return self._shared.wait(lambda now: now.notified_view(min_epoch), retrying, f"epoch {min_epoch}")

    def on_view(self, callback: Callable[[GroupView], object]) -> Callable[[], None]:
        """Call `callback` with each view from now on, also while joining; returns what ends that.

        It is called in the group's own thread. The view is acknowledged, and waiting calls return, when it has
        returned: so it is the place to connect to joiners. A callback that takes longer than `ack_timeout_s` while a
        rank joins costs this one its place. An exception is logged and counted, and the view acknowledged. It must not
        wait for the group: `join_group` and `wait_for_view` are a ConfigError in it.
        """
        refuse_forked(self._pid, "RankGroup")
        return self._shared.on_view(callback)

    def on_gone(self, callback: Callable[[errors.TransportError], object]) -> Callable[[], None]:
        """Call `callback` when this rank is a member no longer without having left; returns what ends that.

        It is called in a thread of its own, with the reason: the lease was lost, or the group dropped this rank. Wake
        your own loop with it to `join_group` again: a callback must not wait.
        """
        refuse_forked(self._pid, "RankGroup")
        return self._shared.listeners.subscribe({GONE: callback})

    def subscribe(
        self,
        *,
        on_add: Callable[[Member], object] = lambda _: None,
        on_remove: Callable[[Member], object] = lambda _: None,
    ) -> Callable[[], None]:
        """Call `on_add` with each member there is and each that is admitted, `on_remove` with each that has gone.

        A rank whose new life is admitted has gone before. The members there are come in this thread, before this
        returns; the others in a thread of its own, so that a slow callback delays neither the group nor another one.
        Returns what ends that.
        """
        refuse_forked(self._pid, "RankGroup")
        return self._shared.listeners.subscribe({ADD: on_add, REMOVE: on_remove})

    def _release(self) -> None:
        with suppress(RuntimeError):  # it is not this thread's: an interrupt may come right before, or after, it is
            self._joining.release()

    def _join_once(self, retrying: Retrying) -> GroupState:
        record = replace(self._record, incarnation=uuid.uuid4().hex, epoch=self.state.epoch)
        participant = self._participant = Participant(self._shared, record)

        def joined(now: GroupState) -> GroupState | None:
            view = now.notified_view()
            is_in = view is not None and view.seats_incarnation(self.rank, record.incarnation)
            return now if is_in and now.state in (RankState.ACTIVE, RankState.INACTIVE) else None

        def waiting_for(now: GroupState) -> str | tuple[int, ...]:
            seen = now.snapshot
            return seen.awaited_ranks(self.rank) if seen.revision else "store"

        try:
            participant.acquire(retrying)
            participant.start()
            return self._shared.wait(joined, retrying, waiting_for)
        except BaseException:
            self._stop(participant)
            self._participant = None
            raise

    def _stop(self, participant: Participant) -> None:
        """End it: in the view first, if it is in the group, then for this rank's waiting calls, then the lease."""
        timeout_s = self._shared.config.stop_timeout_s
        until_s = time.monotonic() + timeout_s
        teardown = Teardown("rank", group=self._shared.now.group, rank=self.rank)
        if self.state.state.is_seated:
            leaving = Retrying(self._shared, timeout_s, "leaving")
            change = partial(change_view, leaving, RankEvent.LEAVE, [self.rank], incarnation=participant.incarnation)
            teardown.step("view", change, until_s)
        self._shared.end(participant.incarnation)
        participant.stop(teardown, until_s)

    def _member(self) -> None:
        """A NotReadyError while this rank is not a member, a ConfigError in a forked child."""
        if not self.state.state.is_seated or self._participant is None:
            raise errors.NotReadyError("this rank is not a member: join_group() first", **self._shared.facts)

    def _change(
        self, event: RankEvent, ranks: Collection[int], timeout_s: float | str, *, active: Collection[int] = ()
    ) -> GroupView:
        """Write a change, and wait for a view that has it, in which those that are to be `active` are."""
        self._member()
        retrying = Retrying(self._shared, timeout_s, event.name.lower())
        epoch = change_view(retrying, event, ranks)
        if self._shared.listeners.is_calling_back() and self.view is not None:
            return self.view  # the next one may come by this very thread

        def changed(now: GroupState) -> GroupView | None:
            view = now.notified_view(epoch)
            if view is not None and (gone := sorted({*active}.difference(view.ranks))):
                text = f"ranks {gone} have gone while they were waited for"
                raise errors.NotReadyError(text, group=now.group, ranks=gone)
            return view if view is not None and {*active} <= {*view.active_ranks} else None

        def missing(now: GroupState) -> str | tuple[int, ...]:
            return tuple(sorted({*active}.difference(now.active_ranks))) or f"epoch {epoch}"

        return self._shared.wait(changed, retrying, missing)
