"""The membership of a rank: joining, leaving, and the threads of one incarnation in between.

| thread       | does                                                                                                |
|--------------|-----------------------------------------------------------------------------------------------------|
| `ucxx-group` | a snapshot, then a watch after it, and a participant's step at each change. Runs all callbacks      |
| `ucxx-lease` | renews the lease, or has a helper process renew it: a callback that takes long costs no lease       |

A store that does not answer changes nothing: the rank goes on with what it knows, and starts over with a snapshot.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Final

from ucxx_transport.errors import (
    CompactedError,
    ConflictError,
    DeadlineExceededError,
    LeaseLostError,
    NotReadyError,
    RegistryError,
    StoreResetError,
    StoreUnavailableError,
)
from ucxx_transport.groups.decisions import awaited_ranks
from ucxx_transport.groups.participant import MembershipEndedError, Participant, acquire_rank
from ucxx_transport.groups.state import GroupState, SharedState
from ucxx_transport.groups.states import RankEvent, RankState
from ucxx_transport.groups.view import GroupSnapshot, MemberRecord
from ucxx_transport.groups.writes import CALL_S, RankContext, Retrying, change_view
from ucxx_transport.logs import get_logger
from ucxx_transport.membership.keys import group_prefix
from ucxx_transport.membership.renewal import Renewal, renew
from ucxx_transport.membership.store import Store, Watch
from ucxx_transport.teardown import Teardown

_log = get_logger(__name__)

PAUSE_S: Final = 0.2
"""Between two tries to reach a store that does not answer, and before a group is read again."""

LEAST_CALL_S: Final = 0.1
"""For the last call of a teardown whose deadline has passed."""

_RETRIES_AN_INTERVAL: Final = 4
"""After a renewal that failed the next comes this much sooner: a lease of three intervals is then tried eight times."""


class LeaseRenewer:
    """Renews one lease until it is stopped, or the store says that the lease has ended. A daemon thread.

    Args:
        store: where the lease is.
        lease_id: the lease.
        interval_s: between two renewals.
        on_lost: called once, in the renewer's thread, when the store answers twice that the lease has ended. A store
            that does not answer says nothing: it is asked again, for as long as it takes.
        helper: a process that renews in its place from when it can, closed at the end; None: a call that holds the GIL
            for longer than a lease lives starves the lease.
    """

    def __init__(
        self,
        store: Store,
        lease_id: int,
        interval_s: float,
        on_lost: Callable[[], object],
        helper: Renewal | None = None,
    ) -> None:
        self._store, self._lease_id, self._interval_s = store, lease_id, interval_s
        self._on_lost, self._helper = on_lost, helper
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ucxx-lease", daemon=True)

    def start(self) -> None:
        """Begin; returns at once."""
        self._thread.start()

    def stop(self) -> None:
        """End, bounded; the lease stays as it is. Idempotent, and callable from `on_lost`."""
        self._stopping.set()
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join(2 * self._interval_s)
            if self._thread.is_alive():
                _log.warning("lease_renewer_hung", lease=self._lease_id)

    def _run(self) -> None:
        try:
            if self._helper is not None:
                self._helper.keep(self._lease_id)
            self._renew_until_stopped()
        except LeaseLostError as error:
            if not self._stopping.is_set():
                _log.warning("lease_lost", lease=self._lease_id, reason=str(error))
                self._on_lost()
        finally:
            if self._helper is not None:
                self._helper.close()

    def _renew_until_stopped(self) -> None:
        pause_s, failures = self._interval_s, 0
        while not self._stopping.wait(pause_s):
            try:
                if self._helper is None or not self._helper.keeps(self._lease_id):
                    renew(self._store, self._lease_id, timeout_s=self._interval_s)
            except LeaseLostError:
                raise
            except Exception as error:  # noqa: BLE001 - the edge of a thread: whatever it was, the lease is to live
                failures += 1
                if failures == 1:
                    reason = f"{type(error).__name__}: {error}"
                    _log.warning("lease_not_renewed", lease=self._lease_id, reason=reason)
            else:
                if failures:
                    _log.info("lease_renewed_again", lease=self._lease_id, attempts=failures)
                failures = 0
            pause_s = self._interval_s / (_RETRIES_AN_INTERVAL if failures else 1)


class MemberThread:
    """One incarnation of a rank: its lease, and the thread in which it takes part."""

    def __init__(self, context: RankContext, shared: SharedState, incarnation: str, lease_id: int) -> None:
        self._context, self._shared = context, shared
        self.incarnation, self._lease_id = incarnation, lease_id
        self._participant = Participant(context, shared, incarnation, lease_id)
        self._ending = threading.Event()
        self._lease_lost = threading.Event()
        self._watch: Watch | None = None
        config = context.config
        by_process = config.keeper == "process"
        helper = Renewal(context.store, context.store_config, config.interval_s) if by_process else None
        self._renewer = LeaseRenewer(context.store, self._lease_id, config.interval_s, self._on_lease_lost, helper)
        self._thread = threading.Thread(target=self._run, name=f"ucxx-group-{context.rank}", daemon=True)

    @property
    def is_own_thread(self) -> bool:
        """Whether the caller is a callback: it must not wait for what only this thread can bring."""
        return threading.current_thread() is self._thread

    def start(self) -> None:
        """Renew the lease, and take part."""
        self._renewer.start()
        self._thread.start()

    def stop(self, teardown: Teardown, until_s: float) -> None:
        """Take part no longer, and give the lease back, until `until_s` on `time.monotonic()`. Idempotent."""
        self._ending.set()
        self._interrupt()
        if self._thread.ident is not None and not self.is_own_thread:
            teardown.step("thread", self._thread.join, until_s)
        teardown.step("lease", lambda: self._give_back(until_s), until_s)

    def _give_back(self, until_s: float) -> None:
        """End the renewals, then the lease; if the store does not answer, it ends by itself."""
        self._renewer.stop()
        if not self._lease_lost.is_set():
            self._context.store.revoke(self._lease_id, timeout_s=max(LEAST_CALL_S, until_s - time.monotonic()))

    def _on_lease_lost(self) -> None:
        self._lease_lost.set()
        self._interrupt()

    def _interrupt(self) -> None:
        watch = self._watch
        if watch is not None:
            watch.close()

    def _run(self) -> None:
        keys = self._context.keys
        while not self._ending.is_set():
            try:
                self._take_part()
            except (CompactedError, StoreResetError, ConflictError) as error:
                _log.info("group_read_again", reason=str(error), **keys)
            except StoreUnavailableError as error:
                if not self._ending.is_set() and not self._lease_lost.is_set():  # else this side has closed the watch
                    self._shared.count(outages=1)
                    _log.warning("group_store_away", reason=str(error), **keys)
            except MembershipEndedError as ended:
                return self._end(ended.event, ended.error)
            except LeaseLostError as error:
                return self._end(RankEvent.LOSE, error)
            except Exception:  # noqa: BLE001 - the edge of the thread: whatever it was, the group goes on
                _log.exception("group_thread_failed", **keys)
            self._ending.wait(PAUSE_S)
        return None

    def _take_part(self) -> None:
        self._check_lease()
        store, group = self._context.store, self._context.group
        self._participant.reset()
        snapshot = GroupSnapshot.of(group, store.snapshot(group_prefix(group), timeout_s=CALL_S))
        with store.watch(group_prefix(group), after=snapshot.revision) as watch:
            self._watch = watch  # from here on it is closed to end this
            while not self._ending.is_set():
                self._check_lease()
                step_in_s = self._participant.step(snapshot)
                batch = watch.next(self._context.config.interval_s if step_in_s is None else step_in_s)
                while batch is not None:  # what came together is one step
                    snapshot = snapshot.after(batch)
                    batch = watch.next(0.0)

    def _check_lease(self) -> None:
        if self._lease_lost.is_set():
            text = "this rank's lease has ended: join_group() again"
            raise LeaseLostError(text, lease=self._lease_id, **self._context.keys)

    def _end(self, event: RankEvent, error: RegistryError) -> None:
        if event is not RankEvent.LEAVE:  # which is this rank's own: its thread may see it before `leave` has ended it
            _log.warning("membership_lost", reason=str(error), **self._context.keys)
        try:  # before anything else hears of it: the next `join_group` finds the rank free
            self._give_back(time.monotonic() + self._context.config.stop_timeout_s)
        except RegistryError as failure:
            _log.warning("lease_not_revoked", lease=self._lease_id, reason=str(failure))
        self._shared.end(event, error)


class MemberLifecycle:
    """Joins, leaves and joins again; `record` is what it publishes, but for incarnation and epoch. Thread-safe."""

    def __init__(self, context: RankContext, shared: SharedState, record: MemberRecord) -> None:
        self._context, self._shared, self._record = context, shared, record
        self._joining = threading.Lock()
        self._cancelled = threading.Event()
        self._thread: MemberThread | None = None

    @property
    def thread(self) -> MemberThread:
        """The present incarnation's; a NotReadyError while this rank is not a member."""
        thread = self._thread
        if thread is None or not self._shared.now.state.is_seated:
            raise NotReadyError("this rank is not a member: join_group() first", **self._context.keys)
        return thread

    def join(self, timeout_s: float) -> GroupState:
        retrying = Retrying(self._context, timeout_s, "joining", cancelled=self._cancelled)
        if not self._joining.acquire(timeout=retrying.left_s):
            text = "another join_group() of this rank is under way"
            raise DeadlineExceededError(text, waiting_for="the other join_group()", **self._context.keys)
        try:
            self._cancelled.clear()
            if self._thread is not None:
                if self._shared.now.state.is_seated:
                    return self._shared.now
                self._stop(self._thread)  # one that is over: it may just be ending
            while True:
                try:
                    return self._join_once(retrying)
                except (LeaseLostError, StoreResetError) as error:
                    _log.warning("join_restarted", reason=str(error), **self._context.keys)
                    retrying.pause(self._context.config.backoff_s)
        finally:
            self._joining.release()

    def _join_once(self, retrying: Retrying) -> GroupState:
        incarnation, rank = uuid.uuid4().hex, self._context.rank
        wanted = replace(self._record, incarnation=incarnation, epoch=self._shared.now.epoch)
        lease = acquire_rank(self._context, wanted, retrying)
        thread = MemberThread(self._context, self._shared, incarnation, lease.lease_id)
        self._shared.begin(incarnation)
        self._thread = thread

        def joined(now: GroupState) -> GroupState | None:
            view = now.notified_view()
            is_in = view is not None and view.seats_incarnation(rank, incarnation)
            return now if is_in and now.state in (RankState.ACTIVE, RankState.INACTIVE) else None

        try:
            thread.start()
            return self._shared.wait(joined, retrying, self._not_joined)
        except BaseException:
            self._stop(thread)
            self._shared.end(RankEvent.LEAVE, RegistryError("joining was cancelled", **self._context.keys))
            self._thread = None
            raise

    def _not_joined(self, now: GroupState) -> DeadlineExceededError:
        rank, snapshot = self._context.rank, now.snapshot
        return DeadlineExceededError(
            f"rank {rank} did not become active in {self._context.group!r} in time",
            waiting_for="store" if snapshot is None else awaited_ranks(snapshot.view, snapshot.members, rank),
            epoch=now.epoch,
            problems={} if snapshot is None else dict(snapshot.problems),
            **self._context.keys,
        )

    def leave(self) -> None:
        self._cancelled.set()
        thread = self._thread
        is_callback = thread is not None and thread.is_own_thread
        has_lock = not is_callback and self._joining.acquire(timeout=self._context.config.stop_timeout_s)
        try:
            thread, self._thread = self._thread, None
            if thread is not None:
                self._stop(thread, leaves=True)
        finally:
            if has_lock:
                self._joining.release()

    def _stop(self, thread: MemberThread, *, leaves: bool = False) -> None:
        timeout_s, keys = self._context.config.stop_timeout_s, self._context.keys
        until_s = time.monotonic() + timeout_s
        teardown = Teardown("rank", group=self._context.group, rank=self._context.rank)
        if leaves and self._shared.now.state.is_seated:
            teardown.step("view", partial(self._write_leave, thread.incarnation, timeout_s), until_s)
        if leaves:
            self._shared.end(RankEvent.LEAVE, NotReadyError("this rank has left", **keys))
        thread.stop(teardown, until_s)

    def _write_leave(self, incarnation: str, timeout_s: float) -> None:
        retrying = Retrying(self._context, timeout_s, "leaving")
        change_view(self._context, RankEvent.LEAVE, [self._context.rank], retrying, incarnation=incarnation)
