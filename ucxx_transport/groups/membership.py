"""Membership: one life of a rank in its group: a lease, its renewer, and the thread in which the rank takes part.

The thread's loop is a snapshot and then a watch after it, with a look at each change. A store that does not answer
changes nothing: the membership goes on with what it has, and begins anew with a snapshot.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from ucxx_transport.errors import (
    CompactedError,
    ConflictError,
    LeaseLostError,
    RegistryError,
    StoreResetError,
    StoreUnavailableError,
)
from ucxx_transport.groups.claiming import ClaimedRank
from ucxx_transport.groups.group_board import GroupBoard
from ucxx_transport.groups.group_picture import GroupPicture
from ucxx_transport.groups.lease_renewer import LeaseRenewer
from ucxx_transport.groups.participant import CALL_S, MembershipOverError, Participant
from ucxx_transport.groups.rank_states import RankEvent
from ucxx_transport.logs import get_logger
from ucxx_transport.membership.keeper_process import KeeperProcess
from ucxx_transport.membership.keys import group_prefix
from ucxx_transport.membership.store import Store, Watch

__all__ = ["Membership", "MembershipRules"]

_log = get_logger(__name__)

PAUSE_S: Final = 0.2
"""Between two tries to reach a store that does not answer, and before a group is read anew."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MembershipRules:
    """What a membership goes by.

    Attributes:
        interval_s: how often the lease is renewed.
        ack_timeout_s: how long an acknowledgement is waited for before who owes it is dropped.
        stop_timeout_s: bound on ending.
    """

    interval_s: float
    ack_timeout_s: float
    stop_timeout_s: float


class Membership:
    """See the module.

    Args:
        store: the group's.
        board: told of all that happens.
        claimed: the rank that was taken.
        rules: see there.
        keeper: the process that renews the lease, closed at the end; None: a thread does.
        clock: seconds.
    """

    def __init__(
        self,
        store: Store,
        board: GroupBoard,
        claimed: ClaimedRank,
        *,
        rules: MembershipRules,
        keeper: KeeperProcess | None,
        clock: Callable[[], float],
    ) -> None:
        self._store, self._board, self._rules = store, board, rules
        self.record, self._lease = claimed.record, claimed.lease
        self._participant = Participant(store, board, claimed, ack_timeout_s=rules.ack_timeout_s, clock=clock)
        self._ending = threading.Event()
        self._lease_lost = threading.Event()
        self._watch: Watch | None = None
        self._renewer = LeaseRenewer(store, rules.interval_s, self._on_lease_lost, keeper=keeper)
        self._thread = threading.Thread(target=self._run, name=f"ucxx-group-{board.rank}", daemon=True)

    @property
    def is_own_thread(self) -> bool:
        """Whether the caller is a callback: it must not wait for what only this thread can bring."""
        return threading.current_thread() is self._thread

    def start(self) -> None:
        """Renew the lease, and take part."""
        self._renewer.start(self._lease.lease_id)
        self._thread.start()

    def end(self) -> None:
        """Take part no longer, and give the lease back; bounded. Idempotent."""
        self._ending.set()
        self._interrupt()
        if self._thread.ident is not None and not self.is_own_thread:
            self._thread.join(self._rules.stop_timeout_s)
            if self._thread.is_alive():
                _log.warning("group thread did not stop in time", group=self._board.group, rank=self._board.rank)
        self._give_back()

    def _give_back(self) -> None:
        self._renewer.stop()
        if self._lease_lost.is_set():
            return
        try:
            self._store.revoke(self._lease.lease_id, timeout_s=self._rules.stop_timeout_s)
        except RegistryError as error:
            _log.warning("lease not given back; it ends by itself", lease=self._lease.lease_id, reason=str(error))

    def _on_lease_lost(self) -> None:
        self._lease_lost.set()
        self._interrupt()

    def _interrupt(self) -> None:
        watch = self._watch
        if watch is not None:
            watch.close()

    # the thread

    def _run(self) -> None:
        while not self._ending.is_set():
            try:
                self._take_part()
            except (CompactedError, StoreResetError, ConflictError) as error:
                _log.info("group is read anew", group=self._board.group, reason=str(error))
            except StoreUnavailableError as error:
                self._note_outage(error)
            except MembershipOverError as over:
                self._over(over.event, over.error)
                return
            except LeaseLostError as error:
                self._over(RankEvent.LOSE, error)
                return
            except Exception:  # noqa: BLE001 - the edge of the thread: whatever it was, the group goes on
                _log.exception("group thread failed; it begins anew", group=self._board.group, rank=self._board.rank)
            self._ending.wait(PAUSE_S)

    def _take_part(self) -> None:
        self._check_lease()
        prefix = group_prefix(self._board.group)
        self._participant.begin_anew()
        snapshot = self._store.snapshot(prefix, timeout_s=CALL_S)
        picture = GroupPicture.of(self._board.group, snapshot)
        with self._store.watch(prefix, after=picture.revision) as watch:
            self._watch = watch  # from here on whoever ends this closes it
            while not self._ending.is_set():
                self._check_lease()
                look_in_s = self._participant.look(picture)
                batch = watch.next(self._rules.interval_s if look_in_s is None else look_in_s)
                while batch is not None:  # what came together is looked at once
                    picture = picture.after(batch)
                    batch = watch.next(0.0)

    def _check_lease(self) -> None:
        if self._lease_lost.is_set():
            raise LeaseLostError(
                "this rank's lease has ended: join_group() again",
                group=self._board.group,
                rank=self._board.rank,
                lease=self._lease.lease_id,
            )

    def _note_outage(self, error: StoreUnavailableError) -> None:
        if self._ending.is_set() or self._lease_lost.is_set():
            return  # this side has closed the watch
        self._board.count(outages=1)
        _log.warning("group's store does not answer; going on as it is", group=self._board.group, reason=str(error))

    def _over(self, event: RankEvent, error: RegistryError) -> None:
        if event is not RankEvent.LEAVE:  # which is this rank's own: its thread may see it before `leave` has ended it
            _log.warning("this rank is not in its group any more", group=self._board.group, reason=str(error))
        self._give_back()  # before anybody hears of it: who joins again finds the rank free
        self._board.end(event, error)
