"""Taking a rank: its member key, put under a new lease, while nobody alive has it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from ucxx_transport.errors import ConflictError, DeadlineExceededError, DuplicateSourceError, LeaseLostError
from ucxx_transport.groups.joining import Claim, judge_claim
from ucxx_transport.groups.member_record import MemberRecord
from ucxx_transport.groups.patience import Patience
from ucxx_transport.membership.keys import member_key
from ucxx_transport.membership.store import Entry, Lease, Store

__all__ = ["ClaimedRank", "claim_rank"]

MARGIN_S: Final = 1.0
"""How long after its lease's end a dead member's key may still be there: etcd takes up to 0.5 s, a local store less."""

LOOK_S: Final = 0.25
"""How often a rank whose lease may still end is looked at."""

_PHASE: Final = "taking the rank"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimedRank:
    """A rank that is this process's, as long as its lease is renewed.

    Attributes:
        record: what was published.
        lease: what it lives by.
    """

    record: MemberRecord
    lease: Lease


def claim_rank(
    store: Store, group: str, wanted: MemberRecord, patience: Patience, *, clock: Callable[[], float]
) -> ClaimedRank:
    """Publish a member, once its rank is free.

    A dead member has its rank until its lease ends, and that is waited for. One that is alive keeps it.

    Args:
        store: where.
        group: whose rank it is.
        wanted: the record; its `ttl_s` is what is asked of the lease.
        patience: how long.
        clock: seconds.

    Raises:
        DuplicateSourceError: a live member has the rank.
        DeadlineExceededError: the store did not answer, or it is not known yet whether the rank's holder lives.
        StorePermissionError, StoreResetError, ProtocolError: the store's answers.
    """
    key = member_key(group, wanted.rank)
    began = clock()
    first: MemberRecord | None = None
    looked = False
    while True:
        entry = patience.until_answered(lambda left_s: store.get(key, timeout_s=left_s), phase=_PHASE)
        holder = None if entry is None else MemberRecord.from_bytes(entry.value)
        first, looked = (first, True) if looked else (holder, True)
        claim = judge_claim(holder, first=first, waited_s=clock() - began, margin_s=MARGIN_S)
        if claim is Claim.REFUSE and holder is not None:
            raise _duplicate(group, holder)
        if claim is Claim.TAKE:
            claimed = _publish(store, key, wanted, patience)
            if claimed is not None:
                return claimed
            continue  # whoever came between the look and the put has come since the first look, so it is alive
        patience.pause(LOOK_S, phase=_PHASE)
        if patience.left_s <= 0:
            raise DeadlineExceededError(
                f"rank {wanted.rank} of {group!r} has a holder whose lease may still end; its life was not waited out",
                group=group,
                rank=wanted.rank,
                phase=_PHASE,
                waiting_for="the rank's holder",
            )


def _publish(store: Store, key: str, wanted: MemberRecord, patience: Patience) -> ClaimedRank | None:
    """Put the record under a new lease; None: somebody else was first."""
    lease = patience.until_answered(lambda left_s: store.grant(wanted.ttl_s, timeout_s=left_s), phase=_PHASE)
    record = replace(wanted, ttl_s=lease.ttl_s)
    try:
        patience.until_answered(
            lambda left_s: store.put(key, record.to_bytes(), lease_id=lease.lease_id, expected=0, timeout_s=left_s),
            phase=_PHASE,
        )
    except LeaseLostError:
        return _publish(store, key, wanted, patience)  # the store was away for longer than the lease lived
    except ConflictError:
        entry = patience.until_answered(lambda left_s: store.get(key, timeout_s=left_s), phase=_PHASE)
        if entry is None or not _is_by(entry, record):
            return None
    return ClaimedRank(record=record, lease=lease)


def _is_by(entry: Entry, record: MemberRecord) -> bool:
    """Whether a put whose answer was lost had been done after all."""
    return MemberRecord.from_bytes(entry.value).incarnation == record.incarnation


def _duplicate(group: str, holder: MemberRecord) -> DuplicateSourceError:
    return DuplicateSourceError(
        f"rank {holder.rank} of {group!r} is a live member: give this process another rank, or end that one",
        group=group,
        rank=holder.rank,
        incarnation=holder.incarnation,
        address=holder.address,
    )
