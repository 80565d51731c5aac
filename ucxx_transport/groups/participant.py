"""A participant of a group: one life of a rank applies, acknowledges and writes views, in a thread of its own.

Once `Participant.acquire` has published the rank's record, each `Participant.step` takes a snapshot of the group:

1. is this rank still a member? Its key must be there, and its seat not GONE; else its membership is over;
2. a newer view is applied: callbacks first, then waiting calls return;
3. it is acknowledged, in the rank's own key;
4. if another view should follow (`GroupSnapshot.next_view`), and it is this rank's turn, that is written, expecting the
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
from collections.abc import Collection
from contextlib import suppress
from dataclasses import replace
from itertools import count
from typing import Final

from ucxx_transport import errors
from ucxx_transport.groups.decisions import AckWaits, GroupSnapshot, parse_policy_version
from ucxx_transport.groups.state import CALL_S, PAUSE_S, MembershipEndedError, Retrying, SharedState
from ucxx_transport.groups.view import NO_VIEW, GroupView, MemberRecord, RankEvent
from ucxx_transport.logs import get_logger
from ucxx_transport.machine import start_thread
from ucxx_transport.membership.renewal import Keeper, LeaseRenewer
from ucxx_transport.membership.store import Watch
from ucxx_transport.teardown import Teardown

_log = get_logger(__name__)

MARGIN_S: Final = 1.0  # that a dead member's key may outlive its lease: etcd takes up to 0.5 s, a local store less
TURN_S: Final = 0.1  # each live member's, to write the next view before the one behind it does: several round trips
LAST_TURN: Final = 20  # the most turns that any member waits for, however many are before it
TICK_S: Final = 0.05  # from one look at the time to the next while an acknowledgement or a turn is waited for
LEAST_CALL_S: Final = 0.1  # for the last call of a teardown whose deadline has passed


class Participant:
    """See the module. `record` is of this life alone: its `incarnation` was never used before."""

    def __init__(self, shared: SharedState, record: MemberRecord) -> None:
        self._shared, self._record = shared, record
        self._keys, self._rank, self.incarnation = shared.keys, record.rank, record.incarnation
        self.lease_id: int | None = None
        self._has_applied = False  # in this life: before, another view than an earlier life's is only one to wait out
        self._was_seated = False
        self._ending, self._lease_lost = threading.Event(), threading.Event()
        self._watch: Watch | None = None
        self._away: type[errors.RegistryError] | None = None  # what the store has answered since it was last heard
        self._keeper = Keeper(shared.store, shared.config)
        self._renewer: LeaseRenewer | None = None
        self._thread: threading.Thread | None = None
        self.reset()

    @property
    def is_own_thread(self) -> bool:
        """Whether the caller is a callback: it must not wait for what only this thread can bring."""
        return threading.current_thread() is self._thread

    def acquire(self, retrying: Retrying) -> None:
        """Publish this life, once the rank is free, under a new lease, whose TTL its record asks for.

        A dead member has its rank until its lease ends, and that is waited for. A live one keeps it: a
        DuplicateSourceError; it is one that came since the first look, or whose lease outlives its TTL from then on.
        However this ends, `stop` takes back what it has published.
        """
        shared, store = self._shared, self._shared.store
        key, began = self._keys.member(self._rank), shared.clock()
        first = ""
        for attempt in count():
            entry = retrying.call(store.get, key)
            holder = None if entry is None else MemberRecord.from_bytes(entry.value)
            first = holder.incarnation if holder is not None and attempt == 0 else first
            if holder is None:
                lease = retrying.call(store.grant, self._record.ttl_s)
                self.lease_id = lease.lease_id  # before the key has it: an interrupt may come between any two lines
                raw = replace(self._record, ttl_s=lease.ttl_s).to_bytes()
                # Else another was first, an answer was lost, or the store was away for longer than the lease lived.
                with suppress(errors.ConflictError, errors.LeaseLostError):
                    retrying.call(store.put, key, raw, lease_id=lease.lease_id, expected=0)
                    break
            elif holder.incarnation == self.incarnation:
                break
            elif holder.incarnation != first or shared.clock() - began >= holder.ttl_s + MARGIN_S:
                text = "a live member has this rank: give this process another one, or end that one"
                facts = {"incarnation": holder.incarnation, "address": holder.address}
                raise errors.DuplicateSourceError(text, **facts, **shared.facts)
            else:
                retrying.pause(PAUSE_S)
                retrying.check("the rank's holder")  # whose lease may still end
        shared.begin(self.incarnation)

    def start(self) -> None:
        """Renew the lease, and take part."""
        assert self.lease_id is not None
        self._keeper.start()
        self._keeper.keep(self.lease_id)
        interval_s = self._shared.config.interval_s
        self._renewer = LeaseRenewer(lambda: self._shared.store, self.lease_id, interval_s, on_lost=self._on_lease_lost)
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

    def step(self, snapshot: GroupSnapshot) -> float | None:
        """Do what the snapshot asks for; for one thread.

        Returns in how many seconds to step again at the latest, if nothing changes; None: only a change matters. A
        MembershipEndedError: this rank is not a member any more. Other errors are the store's answers to a write.
        """
        self._shared.show(self.incarnation, snapshot)
        own = snapshot.members.get(self._rank)
        if own is None or own.incarnation != self.incarnation:
            text = "this rank's key is gone from the store, as its lease must be"
            raise self._ended(errors.LeaseLostError, text, taken_over=own is not None)
        self._apply(snapshot)
        self._check_seat()
        if snapshot.revision < self._seen_revision:
            return TICK_S  # what this rank wrote has not come back yet: the snapshot is older than its own writes
        known, key = self._shared.now.policy_version, self._keys.policy
        if snapshot.policy_version is None and known is not None and key not in snapshot.problems:
            self._put(key, str(known).encode(), expected=0)  # a store that lost its data has lost this too
        epoch = self._shared.now.epoch
        if own.epoch < epoch:  # acknowledge
            raw = replace(own, epoch=epoch).to_bytes()
            self._put(self._keys.member(self._rank), raw, expected=own.revision, lease_id=self.lease_id)
        return self._write(snapshot)

    def _apply(self, snapshot: GroupSnapshot) -> None:
        """Take a newer view. An older one is of a store that lost data: another will follow it, with a newer epoch."""
        view, known = snapshot.view, self._shared.now
        if view.epoch > known.epoch:
            self._has_applied = True
            self._shared.apply(self.incarnation, view)
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
                raise MembershipEndedError
            text = "the group goes on without this rank"
            raise self._ended(errors.LeaseLostError, text, epoch=view.epoch, ended_by=ended_by.value)

    def _ended(self, error: type[errors.RegistryError], text: str, **facts: object) -> MembershipEndedError:
        return MembershipEndedError(error(f"{text}: join_group() again", **facts, **self._shared.facts))

    def _write(self, snapshot: GroupSnapshot) -> float | None:
        """Write the view that should follow, at this rank's turn, by what the store has then: a watch may be behind."""
        now = self._shared.clock()
        if self._next(snapshot, now) is None:
            self._due = None
            return TICK_S if self._waits else None
        if self._due is None or self._due[0] != snapshot.view_revision:
            self._due = (snapshot.view_revision, now)
        if now - self._due[1] >= TURN_S * min(snapshot.turn_of(self._rank), LAST_TURN):
            found = self._shared.store.snapshot(self._keys.prefix, timeout_s=CALL_S)
            latest = GroupSnapshot.of(self._shared.now.group, found)
            if (wanted := self._next(latest, now)) is not None:
                try:
                    self._put(self._keys.view, wanted.to_bytes(), expected=latest.view_revision)
                except errors.ConflictError:  # the other member may have decided the same
                    self._shared.count(conflicts=1)
        return TICK_S

    def _next(self, snapshot: GroupSnapshot, now: float) -> GroupView | None:
        """The view that should follow, without those that have kept joiners waiting for too long; None: as it is."""
        if self._keys.view in snapshot.problems:
            return None
        self._waits = snapshot.ack_waits(self._waits, now)
        overdue = snapshot.overdue_ranks(self._waits, now=now, ack_timeout_s=self._shared.ack_timeout_s)
        return snapshot.next_view(overdue)

    def _put(self, key: str, value: bytes, *, expected: int, lease_id: int | None = None) -> None:
        self._seen_revision = self._shared.store.put(key, value, lease_id=lease_id, expected=expected, timeout_s=CALL_S)

    # the thread

    def _run(self) -> None:
        facts = self._shared.facts
        while not self._ending.is_set():
            try:
                self._take_part()
            except (errors.CompactedError, errors.StoreResetError, errors.ConflictError) as error:
                _log.info("group_read_again", reason=str(error), **facts)
            except (errors.StoreUnavailableError, errors.StorePermissionError) as error:
                if not self._ending.is_set() and not self._lease_lost.is_set():  # else this side has closed the watch
                    self._shared.count(outages=1)
                    if self._away is not type(error):
                        _log.warning("group_store_away", reason=str(error), **facts)
                    self._away = type(error)
            except MembershipEndedError as ended:
                return self._end(ended.error)
            except errors.LeaseLostError as error:
                return self._end(error)
            except Exception:  # noqa: BLE001 - the edge of the thread: whatever it was, the group goes on
                _log.exception("group_thread_failed", **facts)
            self._ending.wait(PAUSE_S)
        return None

    def _take_part(self) -> None:
        self._check_lease()
        store, prefix = self._shared.store, self._keys.prefix
        self.reset()
        found = store.snapshot(prefix, timeout_s=CALL_S)
        snapshot = GroupSnapshot.of(self._shared.now.group, found)
        with store.watch(prefix, after=snapshot.revision, identity=found.identity) as watch:
            self._watch = watch  # from here on it is closed to end this
            while not self._ending.is_set():
                self._check_lease()
                self._shared.listeners.retry()
                step_in_s = self.step(snapshot)
                batch = watch.next(self._shared.config.interval_s if step_in_s is None else step_in_s)
                self._away = None
                while batch is not None:  # what came together is one step
                    snapshot = snapshot.after(batch.revision, batch.events)
                    batch = watch.next(0.0)

    def _check_lease(self) -> None:
        if self._lease_lost.is_set():
            raise self._ended(errors.LeaseLostError, "this rank's lease has ended", lease=self.lease_id)

    def _on_lease_lost(self) -> None:
        self._lease_lost.set()
        self._interrupt()

    def _interrupt(self) -> None:
        if (watch := self._watch) is not None:
            watch.close()

    def _give_back(self, until_s: float) -> None:
        """End the renewals, then the lease; if the store does not answer, it ends by itself."""
        if self._renewer is not None:
            self._renewer.stop(self._shared.config.interval_s)
        self._keeper.close()
        if self.lease_id is not None and not self._lease_lost.is_set():
            self._shared.store.revoke(self.lease_id, timeout_s=max(LEAST_CALL_S, until_s - time.monotonic()))

    def _end(self, error: errors.RegistryError | None) -> None:
        if error is not None:  # else by `leave`, which may just be about to end it itself
            _log.warning("membership_lost", reason=str(error), **self._shared.facts)
        try:  # before anything else hears of it: the next `join_group` finds the rank free
            self._give_back(time.monotonic() + self._shared.config.stop_timeout_s)
        except errors.RegistryError as failure:
            _log.warning("lease_not_revoked", lease=self.lease_id, reason=str(failure))
        self._shared.end(self.incarnation, error)
        while self._shared.listeners.retry() and not self._ending.wait(PAUSE_S):
            pass  # `on_gone` waits for a thread, and this one has nothing else to do


def change_view(retrying: Retrying, event: RankEvent, ranks: Collection[int], *, incarnation: str | None = None) -> int:
    """Have `GroupSnapshot.view_after` written; the epoch it is so in. A NotReadyError: one to RECALL is no member."""
    store, keys, group = retrying.shared.store, retrying.shared.keys, retrying.shared.now.group
    while True:
        snapshot = GroupSnapshot.of(group, retrying.call(store.snapshot, keys.prefix))
        absent = [rank for rank in ranks if not snapshot.view.state_of(rank).is_seated]
        if absent and event is RankEvent.RECALL:
            text = f"ranks {absent} are not in {group!r}: they can be active when they have joined"
            raise errors.NotReadyError(text, group=group, ranks=absent, epoch=snapshot.view.epoch)
        wanted = snapshot.view_after(event, ranks, incarnation=incarnation)
        if wanted is None:
            return snapshot.view.epoch
        if retrying.swap(keys.view, wanted.to_bytes(), snapshot.view_revision) is not None:
            return wanted.epoch


def put_policy_version(retrying: Retrying, version: int, *, rewind: bool) -> int:
    """Write the policy version; returns the store's revision that has it. A ConfigError: that would `rewind` it."""
    store, key = retrying.shared.store, retrying.shared.keys.policy
    while True:
        entry = retrying.call(store.get, key)
        known = None if entry is None else parse_policy_version(entry.value)
        if entry is not None and known == version:
            return entry.revision
        if known is not None and known > version and not rewind:
            text = f"policy version {version} is behind {known}, which the group has: give rewind=True to go back"
            raise errors.ConfigError(text, field="version", known=known)
        revision = retrying.swap(key, str(version).encode(), 0 if entry is None else entry.revision)
        if revision is not None:
            return revision
