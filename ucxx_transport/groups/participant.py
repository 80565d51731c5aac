"""A participant of a group: one life of a rank applies, acknowledges and writes views, in a thread of its own.

Once `writes.acquire_rank` has published the rank's record, each `Participant.step` takes a snapshot of the group:

1. is this rank still a member? Its key must be there, and its seat not GONE; else its membership is over;
2. a newer view is applied: callbacks first, then waiting calls return;
3. it is acknowledged, in the rank's own key;
4. if another view should follow (`decisions.next_view`), and it is this rank's turn, that is written, expecting the
   revision of the present one.

| thread       | does                                                                                                |
|--------------|-----------------------------------------------------------------------------------------------------|
| `ucxx-group` | a snapshot, then a watch after it, and a participant's step at each change. Runs all callbacks      |
| `ucxx-lease` | renews the lease, as a helper process does: a callback that takes long costs none                   |

A store that does not answer changes nothing: the rank goes on with what it knows, and starts over with a snapshot.
"""

from __future__ import annotations

import threading
import time
from typing import Final

from ucxx_transport import errors
from ucxx_transport.groups.decisions import AckWaits, ack_waits, next_view, overdue_ranks, turn_of
from ucxx_transport.groups.state import SharedState
from ucxx_transport.groups.view import NO_VIEW, GroupSnapshot, GroupView, RankEvent
from ucxx_transport.groups.writes import CALL_S, RankContext, has_left
from ucxx_transport.logs import get_logger
from ucxx_transport.machine import start_thread
from ucxx_transport.membership.entries import group_prefix, member_key, policy_key, view_key
from ucxx_transport.membership.renewal import Keeper, LeaseRenewer
from ucxx_transport.membership.store import Watch
from ucxx_transport.teardown import Teardown

_log = get_logger(__name__)

TURN_S: Final = 0.1
"""How long each live member has to write the next view before the one behind it does: several round trips."""

PAUSE_S: Final = 0.2
"""Between two tries to reach a store that does not answer, and before a group is read again."""

LEAST_CALL_S: Final = 0.1
"""For the last call of a teardown whose deadline has passed."""

LAST_TURN: Final = 20
"""The most turns that any member waits for, however many are before it."""

TICK_S: Final = 0.05
"""How often time is looked at while an acknowledgement or a turn is waited for."""


class MembershipEndedError(Exception):
    """This rank is not in the group any more, and whether it `left`; `error` is for waiting calls and `on_gone`."""

    def __init__(self, error: errors.TransportError, *, left: bool = False) -> None:
        super().__init__(str(error))
        self.error, self.left = error, left


class Participant:
    """See the module. `lease_id` keeps the rank in this life, `incarnation`."""

    def __init__(self, context: RankContext, shared: SharedState, incarnation: str, lease_id: int) -> None:
        self._context, self._shared = context, shared
        self._group, self._rank = context.group, context.rank
        self.incarnation, self._lease_id = incarnation, lease_id
        self._has_applied = False  # in this life: before, another view than an earlier life's is only one to wait out
        self._was_seated = False
        self._ending, self._lease_lost = threading.Event(), threading.Event()
        self._watch: Watch | None = None
        # what the store has answered last, since it was last heard
        self._away: type[errors.RegistryError] | None = None
        self._keeper = Keeper(context.store, context.store_config, context.config)
        self._renewer = LeaseRenewer(
            lambda: context.store, lease_id, context.config.interval_s, on_lost=self._on_lease_lost
        )
        self._thread: threading.Thread | None = None
        self.reset()

    @property
    def is_own_thread(self) -> bool:
        """Whether the caller is a callback: it must not wait for what only this thread can bring."""
        return threading.current_thread() is self._thread

    def start(self) -> None:
        """Renew the lease, and take part."""
        self._keeper.start()
        self._keeper.keep(self._lease_id)
        self._renewer.start()
        self._thread = start_thread(self._run, name=f"ucxx-group-{self._rank}")

    def stop(self, teardown: Teardown, until_s: float) -> None:
        """Take part no longer, and give the lease back, until `until_s` on `time.monotonic()`. Idempotent."""
        self._ending.set()
        self._interrupt()
        if self._thread is not None and not self.is_own_thread:
            teardown.step("thread", self._thread.join, until_s)
        teardown.step("lease", lambda: self._give_back(until_s), until_s)

    def reset(self) -> None:
        """The store was out of reach: that time does not count against members that could not acknowledge in it."""
        self._waits: AckWaits = {}
        self._due: tuple[int, float] | None = None  # a view's revision, and since when another should follow it
        self._seen_revision = 0
        self._overtaken_revision = -1

    def step(self, snapshot: GroupSnapshot) -> float | None:
        """Do what the snapshot asks for; for one thread.

        Returns in how many seconds to step again at the latest, if nothing changes; None: only a change matters. A
        MembershipEndedError: this rank is not a member any more. Other errors are the store's answers to a write.
        """
        self._shared.show(snapshot)
        own = snapshot.members.get(self._rank)
        if own is None or own.incarnation != self.incarnation:
            text = "this rank's key is gone from the store, as its lease must be"
            raise self._ended(errors.LeaseLostError, text, taken_over=own is not None)
        self._apply(snapshot)
        self._check_seat()
        if snapshot.revision < self._seen_revision:
            return TICK_S  # what this rank wrote has not come back yet: the snapshot is older than its own writes
        known, key = self._shared.now.policy_version, policy_key(self._group)
        if snapshot.policy_version is None and known is not None and key not in snapshot.problems:
            self._put(key, str(known).encode(), expected=0)  # a store that lost its data has lost this too
        epoch = self._shared.now.epoch
        if own.epoch < epoch:  # acknowledge
            raw = own.having_applied(epoch).to_bytes()
            self._put(member_key(self._group, self._rank), raw, expected=own.revision, lease_id=self._lease_id)
        return self._write(snapshot)

    def _apply(self, snapshot: GroupSnapshot) -> None:
        """Take a newer view. An older one is of a store that lost data: another will follow it, with a newer epoch."""
        view, known = snapshot.view, self._shared.now
        if view.epoch > known.epoch:
            self._has_applied = True
            self._shared.apply(view)
        elif view.epoch == known.epoch and view != known.view and self._has_applied:
            text = "the store has another view of the epoch that this rank applied last, its data are others"
            raise self._ended(errors.StoreResetError, text, epoch=view.epoch)

    def _check_seat(self) -> None:
        view = self._shared.now.view or NO_VIEW
        seat = view.seat_of(self._rank)
        is_own = seat.incarnation == self.incarnation
        if is_own and seat.state.is_seated:
            self._was_seated = True
        elif is_own or self._was_seated:  # else it is not admitted yet
            ended_by = (seat.ended_by if is_own else None) or RankEvent.LOSE
            if ended_by is RankEvent.LEAVE:
                raise MembershipEndedError(has_left(self._context), left=True)
            text = "the group goes on without this rank"
            raise self._ended(errors.LeaseLostError, text, epoch=view.epoch, ended_by=ended_by.value)

    def _ended(self, error: type[errors.RegistryError], text: str, **facts: object) -> MembershipEndedError:
        return MembershipEndedError(error(f"{text}: join_group() again", **facts, **self._context.keys))

    def _write(self, snapshot: GroupSnapshot) -> float | None:
        """Write the view that should follow, at this rank's turn."""
        now = self._context.clock()
        if view_key(self._group) in snapshot.problems or snapshot.view_revision == self._overtaken_revision:
            return None
        self._waits = ack_waits(snapshot.view, self._waits, now)
        wanted, overdue = self._next(snapshot, now)
        if wanted is None or snapshot.revision < self._seen_revision:
            self._due = None
            return TICK_S if self._waits or wanted is not None else None
        if self._due is None or self._due[0] != snapshot.view_revision:
            self._due = (snapshot.view_revision, now)
        if now - self._due[1] >= TURN_S * min(turn_of(snapshot.view, snapshot.members, self._rank), LAST_TURN):
            if overdue:  # by a watch that may be behind: none is dropped who has acknowledged meanwhile
                found = self._context.store.snapshot(group_prefix(self._group), timeout_s=CALL_S)
                wanted, _ = self._next(GroupSnapshot.of(self._group, found), now)
                if wanted is None:
                    return TICK_S
            try:
                self._put(view_key(self._group), wanted.to_bytes(), expected=snapshot.view_revision)
            except errors.ConflictError:  # the other member may have decided the same
                self._overtaken_revision = snapshot.view_revision
                self._shared.count(conflicts=1)
        return TICK_S

    def _next(self, snapshot: GroupSnapshot, now: float) -> tuple[GroupView | None, frozenset[int]]:
        """The view that should follow, if one should, and the ranks that it drops."""
        view, members, timeout_s = snapshot.view, snapshot.members, self._context.ack_timeout_s
        overdue = overdue_ranks(view, members, self._waits, now=now, ack_timeout_s=timeout_s)
        return next_view(view, members, overdue=overdue), overdue

    def _put(self, key: str, value: bytes, *, expected: int, lease_id: int | None = None) -> None:
        store = self._context.store
        self._seen_revision = store.put(key, value, lease_id=lease_id, expected=expected, timeout_s=CALL_S)

    # the thread

    def _run(self) -> None:
        keys = self._context.keys
        while not self._ending.is_set():
            try:
                self._take_part()
            except (errors.CompactedError, errors.StoreResetError, errors.ConflictError) as error:
                _log.info("group_read_again", reason=str(error), **keys)
            except (errors.StoreUnavailableError, errors.StorePermissionError) as error:
                if not self._ending.is_set() and not self._lease_lost.is_set():  # else this side has closed the watch
                    self._shared.count(outages=1)
                    if self._away is not type(error):
                        _log.warning("group_store_away", reason=str(error), **keys)
                    self._away = type(error)
            except MembershipEndedError as ended:
                return self._end(ended.error, left=ended.left)
            except errors.LeaseLostError as error:
                return self._end(error)
            except Exception:  # noqa: BLE001 - the edge of the thread: whatever it was, the group goes on
                _log.exception("group_thread_failed", **keys)
            self._ending.wait(PAUSE_S)
        return None

    def _take_part(self) -> None:
        self._check_lease()
        store, group = self._context.store, self._group
        self.reset()
        found = store.snapshot(group_prefix(group), timeout_s=CALL_S)
        snapshot = GroupSnapshot.of(group, found)
        with store.watch(group_prefix(group), after=snapshot.revision, identity=found.identity) as watch:
            self._watch = watch  # from here on it is closed to end this
            while not self._ending.is_set():
                self._check_lease()
                self._shared.listeners.retry()
                step_in_s = self.step(snapshot)
                batch = watch.next(self._context.config.interval_s if step_in_s is None else step_in_s)
                self._away = None
                while batch is not None:  # what came together is one step
                    snapshot = snapshot.after(batch)
                    batch = watch.next(0.0)

    def _check_lease(self) -> None:
        if self._lease_lost.is_set():
            raise self._ended(errors.LeaseLostError, "this rank's lease has ended", lease=self._lease_id)

    def _on_lease_lost(self) -> None:
        self._lease_lost.set()
        self._interrupt()

    def _interrupt(self) -> None:
        if (watch := self._watch) is not None:
            watch.close()

    def _give_back(self, until_s: float) -> None:
        """End the renewals, then the lease; if the store does not answer, it ends by itself."""
        self._renewer.stop(self._context.config.interval_s)
        self._keeper.close()
        if not self._lease_lost.is_set():
            self._context.store.revoke(self._lease_id, timeout_s=max(LEAST_CALL_S, until_s - time.monotonic()))

    def _end(self, error: errors.TransportError, *, left: bool = False) -> None:
        if not left:  # by `leave`, which may just be about to end it itself
            _log.warning("membership_lost", reason=str(error), **self._context.keys)
        try:  # before anything else hears of it: the next `join_group` finds the rank free
            self._give_back(time.monotonic() + self._context.config.stop_timeout_s)
        except errors.RegistryError as failure:
            _log.warning("lease_not_revoked", lease=self._lease_id, reason=str(failure))
        self._shared.end(error, left=left)
        while self._shared.listeners.retry() and not self._ending.wait(PAUSE_S):
            pass  # `on_gone` waits for a thread, and this one has nothing else to do
