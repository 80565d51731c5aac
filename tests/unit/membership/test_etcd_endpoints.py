"""Which endpoint of etcd is asked, and for how long."""

from __future__ import annotations

import time
from contextlib import suppress

import pytest

from ucxx_transport.errors import StoreUnavailableError
from ucxx_transport.membership.etcd_store import EtcdStore

ONE, TWO, THREE = ("a:1", "b:1", "c:1")


def asked(store: EtcdStore, *answering: str) -> list[str]:
    """The endpoints that are asked, in order, while these answer."""
    found: list[str] = []

    def ask(endpoint: str, _share: float) -> None:
        found.append(endpoint)
        if endpoint not in answering:
            raise StoreUnavailableError("away")

    with suppress(StoreUnavailableError):
        store.first(ask, time.monotonic() + 60.0)
    return found


def test_the_endpoint_that_answered_is_asked_first() -> None:
    store = EtcdStore((ONE, TWO, THREE))
    assert asked(store, TWO) == [ONE, TWO]
    assert asked(store, TWO, THREE) == [TWO]
    store.failed(ONE)  # not the one in front
    assert asked(store, ONE, THREE) == [TWO, THREE]
    store.failed(THREE)
    assert asked(store, ONE) == [ONE]
    assert asked(store) == [ONE, TWO, THREE]


def test_endpoints_share_the_time_that_is_left() -> None:
    store = EtcdStore((ONE, TWO, THREE))
    until = time.monotonic() + 60.0
    shares: list[float] = []

    def ask(_endpoint: str, share: float) -> None:
        shares.append(share)
        raise StoreUnavailableError("away")

    with pytest.raises(StoreUnavailableError):
        store.first(ask, until)
    assert all(0 < share <= 60.0 / others for share, others in zip(shares, (3, 2, 1), strict=True))
    assert shares[0] < shares[1] < shares[2]
    with pytest.raises(StoreUnavailableError):
        store.first(ask, time.monotonic() - 1.0)
    assert shares[3:] == [0.0]
