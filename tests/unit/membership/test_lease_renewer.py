from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

import pytest

from tests.support.memory_store import MemoryData, MemoryStore
from tests.support.waiting import wait_until
from ucxx_transport.errors import LeaseLostError, StoreUnavailableError
from ucxx_transport.membership.renewal import LeaseRenewer

TTL_S = 60.0
INTERVAL_S = 0.02
MINUTE = 60.0


class CountingStore(MemoryStore):
    """Counts renewals, and what becomes of them."""

    def __init__(self) -> None:
        super().__init__(MemoryData())
        self.renewals = self.failures = 0
        self.before_renewal: Callable[[], object] = lambda: None

    def keep_alive(self, lease_id: int, *, timeout_s: float | None = None) -> float:
        self.before_renewal()
        try:
            ttl_s = super().keep_alive(lease_id, timeout_s=timeout_s)
        except StoreUnavailableError:
            self.failures += 1
            raise
        self.renewals += 1
        return ttl_s


class Renewed:
    """A lease with its renewer, which has started."""

    def __init__(self) -> None:
        self.store = CountingStore()
        self.lease_id = self.store.grant(TTL_S).lease_id
        self.lost = threading.Event()
        self.losses = 0
        self.renewer = LeaseRenewer(lambda: self.store, self.lease_id, INTERVAL_S, on_lost=self.note)

    def note(self) -> None:
        self.losses += 1
        self.renewer.stop(MINUTE)  # a callback may do that
        self.lost.set()


@pytest.fixture
def renewed() -> Iterator[Renewed]:
    renewed = Renewed()
    yield renewed
    renewed.renewer.stop(MINUTE)


def test_a_lease_is_renewed_until_the_renewer_is_stopped(renewed: Renewed) -> None:
    _, end = renewed.store.data.leases[renewed.lease_id]
    renewed.renewer.start()
    wait_until(lambda: renewed.store.data.leases[renewed.lease_id][1] > end, what="it is renewed")
    renewed.renewer.stop(MINUTE)
    renewed.renewer.stop(MINUTE)
    assert all(thread.name != "ucxx-lease" for thread in threading.enumerate())
    assert renewed.lease_id in renewed.store.data.leases
    assert renewed.losses == 0


def test_a_lost_lease_is_reported_once(renewed: Renewed) -> None:
    renewed.renewer.start()
    renewed.store.data.kill(renewed.lease_id)
    assert renewed.lost.wait(60)
    renewed.renewer.stop(MINUTE)
    assert renewed.losses == 1


def test_one_answer_that_there_is_no_lease_is_no_lost_lease(renewed: Renewed) -> None:
    def mistaken() -> None:
        renewed.store.before_renewal = lambda: None
        raise LeaseLostError("no such lease", lease_id=renewed.lease_id)

    renewed.store.before_renewal = mistaken
    renewed.renewer.start()
    wait_until(lambda: renewed.store.renewals >= 2 or renewed.losses, what="it goes on, or does not")
    renewed.renewer.stop(MINUTE)
    assert renewed.losses == 0


def test_a_store_that_does_not_answer_is_asked_again_and_is_no_lost_lease(
    renewed: Renewed, log_events: list[MutableMapping[str, Any]]
) -> None:
    renewed.store.cut_off()
    renewed.renewer.start()
    wait_until(lambda: renewed.store.failures >= 3)
    renewed.store.reachable = True
    wait_until(lambda: len(log_events) >= 2, what="it goes on, and says so")
    renewed.renewer.stop(MINUTE)
    assert renewed.losses == 0
    words = [event["event"] for event in log_events]
    assert words == ["lease_not_renewed", "lease_renewed_again"], "once each, however often it was tried"


def test_a_stopped_renewer_reports_nothing_and_its_stop_is_bounded(renewed: Renewed) -> None:
    is_asked, go_on = threading.Event(), threading.Event()

    def slowly() -> None:
        is_asked.set()
        go_on.wait(30)

    renewed.store.before_renewal = slowly
    renewed.renewer.start()
    assert is_asked.wait(60)
    renewed.renewer.stop(0.0)
    renewed.store.data.kill(renewed.lease_id)
    go_on.set()
    wait_until(lambda: all(thread.name != "ucxx-lease" for thread in threading.enumerate()), what="its thread ends")
    assert renewed.losses == 0


def test_nothing_is_renewed_while_that_is_held_and_it_goes_on_afterwards() -> None:
    store, held = CountingStore(), [True, True, True]
    renewals: list[int] = []

    def is_held() -> bool:
        renewals.append(store.renewals)
        return bool(held and held.pop())

    renewer = LeaseRenewer(lambda: store, store.grant(TTL_S).lease_id, INTERVAL_S, is_held=is_held)
    renewer.start()
    wait_until(lambda: store.renewals, what="it goes on")
    renewer.stop(MINUTE)
    assert renewals[:4] == [0, 0, 0, 0]
