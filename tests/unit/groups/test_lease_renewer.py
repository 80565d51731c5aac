from __future__ import annotations

import threading
from collections.abc import Iterator, MutableMapping
from typing import Any

import pytest

from tests.support.memory_store import MemoryData, MemoryStore
from tests.support.waiting import wait_until
from ucxx_transport.errors import LeaseLostError
from ucxx_transport.groups.lease_renewer import LeaseRenewer

TTL_S = 1.5
INTERVAL_S = 0.02


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore(MemoryData())


class Kept:
    """A lease with its renewer."""

    def __init__(self, store: MemoryStore) -> None:
        self.store = store
        self.lost = threading.Event()
        self.losses = 0
        self.lease = store.grant(TTL_S)
        self.renewer = LeaseRenewer(store, INTERVAL_S, self.note)

    def note(self) -> None:
        self.losses += 1
        self.renewer.stop()  # as who is told may well do
        self.lost.set()


@pytest.fixture
def kept(store: MemoryStore) -> Iterator[Kept]:
    kept = Kept(store)
    yield kept
    kept.renewer.stop()


def test_a_lease_is_renewed_until_the_renewer_is_stopped(kept: Kept) -> None:
    _, end = kept.store.data.leases[kept.lease.lease_id]
    kept.renewer.start(kept.lease.lease_id)
    wait_until(lambda: kept.store.data.leases[kept.lease.lease_id][1] > end, what="it is renewed")
    kept.renewer.stop()
    renewals = kept.renewer.renewals
    kept.renewer.stop()
    assert renewals >= 1
    assert kept.lease.lease_id in kept.store.data.leases
    assert kept.losses == 0


def test_a_lost_lease_is_told_once(kept: Kept) -> None:
    kept.renewer.start(kept.lease.lease_id)
    kept.store.data.kill(kept.lease.lease_id)
    assert kept.lost.wait(10)
    kept.renewer.stop()
    assert kept.losses == 1


class Mistaken(MemoryStore):
    """Says once, of the first renewal, that there is no such lease."""

    has_said_so = False

    def keep_alive(self, lease_id: int, *, timeout_s: float | None = None) -> float:
        if not self.has_said_so:
            self.has_said_so = True
            raise LeaseLostError("no such lease", lease_id=lease_id)
        return super().keep_alive(lease_id, timeout_s=timeout_s)


def test_one_answer_that_there_is_no_lease_is_no_lost_lease() -> None:
    kept = Kept(Mistaken(MemoryData()))
    kept.renewer.start(kept.lease.lease_id)
    wait_until(lambda: kept.renewer.renewals >= 2 or kept.losses, what="it goes on, or does not")
    kept.renewer.stop()
    assert kept.losses == 0


def test_a_store_that_does_not_answer_is_asked_again_and_is_no_lost_lease(
    kept: Kept, log_events: list[MutableMapping[str, Any]]
) -> None:
    kept.store.cut_off()
    kept.renewer.start(kept.lease.lease_id)
    wait_until(lambda: kept.renewer.failures >= 3)
    kept.store.reachable = True
    wait_until(lambda: kept.renewer.renewals >= 1)
    assert kept.losses == 0
    words = [event["event"] for event in log_events]
    assert words == ["lease not renewed; trying on", "lease renewed again"], "once each, however often it was tried"


class SlowStore(MemoryStore):
    """Renews when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.is_asked, self.go_on = threading.Event(), threading.Event()

    def keep_alive(self, lease_id: int, *, timeout_s: float | None = None) -> float:
        self.is_asked.set()
        self.go_on.wait(30)
        return super().keep_alive(lease_id, timeout_s=timeout_s)


def test_a_renewer_that_was_stopped_tells_nothing_and_its_stop_is_bounded(
    log_events: list[MutableMapping[str, Any]],
) -> None:
    store = SlowStore()
    kept = Kept(store)
    kept.renewer.start(kept.lease.lease_id)
    assert store.is_asked.wait(10)
    kept.renewer.stop()
    assert [event["event"] for event in log_events] == ["lease renewer did not stop in time"]
    store.data.kill(kept.lease.lease_id)
    store.go_on.set()
    wait_until(lambda: all(thread.name != "ucxx-lease" for thread in threading.enumerate()), what="its thread ends")
    assert kept.losses == 0


def test_what_is_told_may_fail(store: MemoryStore, log_events: list[MutableMapping[str, Any]]) -> None:
    def fails() -> None:
        raise ValueError

    lease = store.grant(TTL_S)
    renewer = LeaseRenewer(store, INTERVAL_S, fails)
    store.data.kill(lease.lease_id)
    renewer.start(lease.lease_id)
    wait_until(lambda: any(event["event"] == "what is told of a lost lease failed" for event in log_events))
    renewer.stop()
