"""Publication: one life of a worker's record in the store, from its lease to its end; and what is published.

The publisher's state is where it is in that:

```
            start            visible             bound
 NEW ──────► PUBLISHING ──────► STARTING ──────► LIVE ⇄ UNWELL
                ▲  │ refused, a rival,             │
                │  └────────► FAILED               │ lease lost, store wiped, record gone
                └──────────────────────────────────┘
 stop, from anywhere: STOPPED
```
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, Protocol

from ucxx_transport.errors import ConflictError, LeaseLostError, TransportError
from ucxx_transport.membership.entries import Lease, epoch_key, source_key
from ucxx_transport.membership.renewal import renew
from ucxx_transport.membership.sources import Offer, SourceRecord, SourceStatus
from ucxx_transport.membership.store import Store

if TYPE_CHECKING:
    from ucxx_transport.sidecar.launch import Sidecar


class Publishable(Protocol):
    """What can be published: a ring with or without a server; `UCXXServer` is one."""

    @property
    def sidecar(self) -> Sidecar | None:
        """A process beside this one that may renew the lease of what is published, None where there is none."""

    def offer(self) -> Offer:
        """What can be read now."""

    def hold(self) -> None:
        """There is no epoch: answer NOT_READY until `bind`."""

    def bind(self) -> None:
        """There is an epoch: serve. Raises a `TransportError` when it cannot be done now; then it holds on."""

    def discard_old(self) -> int:
        """Drop what an ended epoch has left; returns how much of it is still in use."""

    def release(self) -> None:
        """Nothing is published any more, by wish: serve as if there were no store."""

    def is_healthy(self, within_s: float) -> bool:
        """Whether it has shown, within the last `within_s` seconds, that it serves."""


class PublisherState(Enum):
    """Where a publisher is; see the module's picture."""

    NEW = "new"
    PUBLISHING = "publishing"
    STARTING = "starting"
    LIVE = "live"
    UNWELL = "unwell"
    FAILED = "failed"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True, kw_only=True)
class PublisherStatistics:
    """What a publisher has done, as of one moment.

    Attributes:
        epoch: the last one, 0 before the first.
        attempts: to publish, of which `publications` have succeeded.
        losses: publications that ended unasked.
        outages: times that the store stopped answering.
        keeper_restarts: of the process that renews the lease.
        keeper_keeps: whether it does; its start takes a second, and so long the publisher's thread renews.
    """

    state: PublisherState = PublisherState.NEW
    epoch: int = 0
    attempts: int = 0
    publications: int = 0
    losses: int = 0
    outages: int = 0
    keeper_restarts: int = 0
    keeper_keeps: bool = False


class Publication:
    """The record of one epoch, as it was written last, and its lease. For one thread."""

    def __init__(self, store: Store, record: SourceRecord, lease: Lease, revision: int) -> None:
        self._store, self._key, self._revision = store, source_key(record.worker_id), revision
        self._call_s = lease.ttl_s / 3  # a call that takes longer would keep the next renewal waiting too long
        self.record, self.lease = record, lease

    @classmethod
    def begin(cls, store: Store, record: SourceRecord, *, ttl_s: float) -> Publication:
        """Make a record visible, "starting", under a lease of its own; its epoch is of `next_epoch`.

        A ConflictError: there is a record of this worker id already. Where that or the store's answer is raised, no
        lease is left behind as far as the store can be reached.
        """
        lease = store.grant(ttl_s)
        first = replace(record, status=SourceStatus.STARTING, ttl_s=float(lease.ttl_s))
        try:
            revision = store.put(source_key(record.worker_id), first.to_bytes(), lease_id=lease.lease_id, expected=0)
        except TransportError:
            with suppress(TransportError):
                store.revoke(lease.lease_id)  # it may have been written, the answer alone lost
            raise
        return cls(store, first, lease, revision)

    def renew(self) -> None:
        """Renew the lease; a LeaseLostError: it has ended."""
        renew(self._store, self.lease.lease_id, timeout_s=self._call_s)

    def update(self, status: SourceStatus, offer: Offer | None = None) -> bool:
        """Write the record again where it has changed; returns whether it had. Without an `offer`, that is as before.

        A ConflictError or LeaseLostError: the record is not ours any more.
        """
        record = replace(self.record, status=status, **({} if offer is None else asdict(offer)))
        if record == self.record:
            return False
        self._put(record, self._call_s)
        return True

    def require_there(self) -> None:
        """Raise a LeaseLostError unless the store still has the record as it was written last."""
        entry = self._store.get(self._key, timeout_s=self._call_s)
        if entry is None or entry.value != self.record.to_bytes():
            raise LeaseLostError("the record is not in the store any more", key=self._key)

    def withdraw(self, timeout_s: float) -> None:
        """Write "stale", then end the lease, and the record with it, also where no write is taken.

        A TransportError: the store did not answer; then the lease runs out by itself.
        """
        try:
            with suppress(ConflictError, LeaseLostError):
                self._put(replace(self.record, status=SourceStatus.STALE), timeout_s / 2)
        finally:
            self._store.revoke(self.lease.lease_id, timeout_s=timeout_s / 2)

    def _put(self, record: SourceRecord, timeout_s: float) -> None:
        raw, lease_id, expected = record.to_bytes(), self.lease.lease_id, self._revision
        try:
            revision = self._store.put(self._key, raw, lease_id=lease_id, expected=expected, timeout_s=timeout_s)
        except ConflictError:
            entry = self._store.get(self._key, timeout_s=timeout_s)
            if entry is None or entry.value != raw:
                raise
            revision = entry.revision  # an earlier try had arrived, its answer had not
        self._revision, self.record = revision, record


def next_epoch(store: Store, worker_id: str, *, known: int) -> int:
    """A new epoch for a worker id, larger than any before, and than `known`: a wiped store has forgotten that.

    A ConflictError: another publisher of this worker id was faster; look again.
    """
    key = epoch_key(worker_id)
    entry = store.get(key)
    last = int(entry.value) if entry is not None and entry.value.isdigit() else 0
    epoch = max(last, known) + 1
    store.put(key, str(epoch).encode(), expected=0 if entry is None else entry.revision)
    return epoch
