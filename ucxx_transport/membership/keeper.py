"""LeaseKeeper: who renews a lease while its owner does something else."""

from __future__ import annotations

from typing import Protocol

from ucxx_transport.errors import LeaseLostError
from ucxx_transport.membership.store import Store


class LeaseKeeper(Protocol):
    """Keeps one lease at a time."""

    def keep(self, lease_id: int | None) -> None:
        """Keep this lease from now on, or none."""

    def keeps(self, lease_id: int) -> bool:
        """Whether it has renewed this lease, and goes on; before that its owner must.

        Raises:
            LeaseLostError: it has found that the lease has ended.
        """


def keep_twice(store: Store, lease_id: int, *, timeout_s: float | None = None) -> None:
    """Renew a lease; one answer that there is none is evidence, two are the verdict.

    Raises:
        LeaseLostError: the store answered twice that there is no such lease.
        StoreUnavailableError: it did not answer.
    """
    try:
        store.keep_alive(lease_id, timeout_s=timeout_s)
    except LeaseLostError:
        store.keep_alive(lease_id, timeout_s=timeout_s)
