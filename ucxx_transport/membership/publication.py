"""Publication: one life of a worker's record in the store, from its lease to its end.

For one thread, and another that withdraws it.

| step      | what                                        | when it fails                |
|-----------|---------------------------------------------|------------------------------|
| epoch     | the worker id's counter, one more than ever | try again                    |
| lease     | granted by the store                        | try again                    |
| visible   | the record, "starting", if there is none    | wait for its end, or give up |
| bound     | the source serves                           | try again, still "starting"  |
| ready     | the record, "ready", if it is still ours    | another's: start over        |
| stale     | the record, "stale", and back               | as ready                     |
| withdrawn | "stale", then the lease is revoked          | the lease runs out by itself |
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

from ucxx_transport.errors import ConflictError, LeaseLostError, TransportError
from ucxx_transport.membership.keys import epoch_key, source_key
from ucxx_transport.membership.publishable import Offer
from ucxx_transport.membership.source_record import SourceRecord, SourceStatus
from ucxx_transport.membership.store import Lease, Store


class Publication:
    """The record of one epoch, as this worker keeps it.

    Attributes:
        record: as it was written last. lease: what it lives under.
    """

    def __init__(self, store: Store, record: SourceRecord, lease: Lease, revision: int) -> None:
        self._store = store
        self._key = source_key(record.worker_id)
        self._revision = revision
        self._withdrawn = False
        self.record = record
        self.lease = lease

    @classmethod
    def begin(cls, store: Store, record: SourceRecord, *, ttl_s: float) -> Publication:
        """Make a record visible, "starting", under a lease of its own.

        Args:
            store: where.
            record: what it says; its epoch is the one to have, see `next_epoch`.
            ttl_s: how long the lease is to live.

        Raises:
            ConflictError: there is a record of this worker id already.
            StoreUnavailableError, StorePermissionError, LeaseLostError: as the store says. No lease is left behind
                as far as the store can be reached.
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

    def say(self, status: SourceStatus, offer: Offer | None = None) -> bool:
        """Write the record again where it says something else now.

        Args:
            status: what may be expected of the source.
            offer: where it is; None: as before.

        Returns:
            Whether there was something new to write.

        Raises:
            ConflictError, LeaseLostError: the record is not ours any more, or it was withdrawn.
        """
        # Before the look: with what a withdrawal by another thread leaves behind nothing could be overwritten.
        revision = self._revision
        if self._withdrawn:
            raise LeaseLostError("the record was withdrawn", key=self._key)
        record = replace(self.record, status=status)
        if offer is not None:
            record = replace(record, host=offer.host, ports=offer.ports)
        if record == self.record:
            return False
        self._put(record, revision, None)
        return True

    def require_there(self) -> None:
        """Look whether the store still has it as written last.

        Raises:
            LeaseLostError: it has not.
        """
        entry = self._store.get(self._key)
        if entry is None or entry.value != self.record.to_bytes():
            raise LeaseLostError("the record is not in the store any more", key=self._key)

    def withdraw(self, timeout_s: float) -> None:
        """Say "stale", then end the lease, and the record with it. Nothing is said any more after that.

        Raises:
            TransportError: the store could not be told; then the lease runs out by itself.
        """
        self._withdrawn = True
        with suppress(ConflictError, LeaseLostError):
            self._put(replace(self.record, status=SourceStatus.STALE), self._revision, timeout_s / 2)
        self._store.revoke(self.lease.lease_id, timeout_s=timeout_s / 2)

    def _put(self, record: SourceRecord, expected: int, timeout_s: float | None) -> None:
        raw = record.to_bytes()
        try:
            self._revision = self._store.put(
                self._key, raw, lease_id=self.lease.lease_id, expected=expected, timeout_s=timeout_s
            )
        except ConflictError:
            entry = self._store.get(self._key, timeout_s=timeout_s)
            if entry is None or entry.value != raw:
                raise
            self._revision = entry.revision  # an earlier try had arrived, its answer had not
        self.record = record


def next_epoch(store: Store, worker_id: str, *, known: int) -> int:
    """A new epoch for a worker id, larger than any before.

    Args:
        store: keeps the last one.
        worker_id: whose.
        known: the last this worker has had: a wiped store does not know it any more.

    Raises:
        ConflictError: another publisher of this worker id was faster; look again.
    """
    key = epoch_key(worker_id)
    entry = store.get(key)
    last = int(entry.value) if entry is not None and entry.value.isdigit() else 0
    epoch = max(last, known) + 1
    store.put(key, str(epoch).encode(), expected=0 if entry is None else entry.revision)
    return epoch
