"""A lease that a sidecar renews, with real processes on a store that is a file."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.clock import Clock
from tests.support.memory_store import MemoryStore
from tests.support.stopping import stop_process
from tests.support.waiting import wait_until
from ucxx_transport.config import PublisherConfig, StoreConfig
from ucxx_transport.errors import LeaseLostError
from ucxx_transport.membership.local_store import LocalStore
from ucxx_transport.membership.renewal import FRESH, Renewal
from ucxx_transport.sidecar.launch import Sidecar

MINUTE = 60.0
TTL_S = 600.0
CONFIG = PublisherConfig(interval_s=0.05)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[LocalStore]:
    with LocalStore(tmp_path / "store.db") as opened:
        yield opened


@pytest.fixture
def renewal(store: LocalStore) -> Iterator[Renewal]:
    renewal = Renewal(store, StoreConfig(), CONFIG)
    yield renewal
    renewal.close()


def pid_of(renewal: Renewal, other_than: int | None = None) -> int:
    pid = wait_until(lambda: renewal.pid not in (None, other_than) and renewal.pid, MINUTE, what="a sidecar is up")
    assert isinstance(pid, int)
    return pid


def test_a_lease_is_renewed_until_it_is_lost(store: LocalStore, renewal: Renewal) -> None:
    lease_id = store.grant(TTL_S).lease_id
    assert not renewal.keeps(lease_id)
    renewal.start()
    renewal.keep(lease_id)
    wait_until(lambda: renewal.keeps(lease_id), MINUTE, what="it is renewed")
    assert renewal.is_kept
    store.revoke(lease_id)
    with pytest.raises(LeaseLostError):
        wait_until(lambda: not renewal.keeps(lease_id), MINUTE, what="its end is reported")
    other = store.grant(TTL_S).lease_id
    renewal.keep(other)
    wait_until(lambda: renewal.keeps(other), MINUTE, what="the next one is renewed")


def test_a_sidecar_that_died_is_not_believed_and_another_goes_on(store: LocalStore, renewal: Renewal) -> None:
    lease_id = store.grant(TTL_S).lease_id
    renewal.start()
    renewal.keep(lease_id)
    wait_until(lambda: renewal.keeps(lease_id), MINUTE, what="it is renewed")
    dead = pid_of(renewal)
    os.kill(dead, signal.SIGKILL)
    wait_until(lambda: renewal.restarts == 1, MINUTE, what="its death is noticed")
    assert pid_of(renewal, other_than=dead) != dead
    wait_until(lambda: renewal.keeps(lease_id), MINUTE, what="the other one renews")


def test_a_sidecar_that_is_stopped_is_not_believed(store: LocalStore, renewal: Renewal) -> None:
    lease_id = store.grant(TTL_S).lease_id
    renewal.start()
    renewal.keep(lease_id)
    wait_until(lambda: renewal.keeps(lease_id), MINUTE, what="it is renewed")
    pid = pid_of(renewal)
    stop_process(pid)
    try:
        wait_until(lambda: not renewal.keeps(lease_id), MINUTE, what="its last renewal is too long ago")
    finally:
        os.kill(pid, signal.SIGCONT)
    wait_until(lambda: renewal.keeps(lease_id), MINUTE, what="it goes on")
    assert renewal.restarts == 0


def test_where_no_process_can_be_made_the_owner_renews(
    store: LocalStore, renewal: Renewal, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise BlockingIOError("too many processes")

    lease_id = store.grant(TTL_S).lease_id
    with monkeypatch.context() as without:
        without.setattr("subprocess.Popen", refuse)
        renewal.start()
        renewal.keep(lease_id)
        wait_until(lambda: renewal.restarts > 0, MINUTE, what="it could not be started")
        assert not renewal.keeps(lease_id)
    wait_until(lambda: renewal.keeps(lease_id), MINUTE, what="one can be made again")


def test_it_is_closed_before_it_has_begun(store: LocalStore, renewal: Renewal) -> None:
    lease_id = store.grant(TTL_S).lease_id
    renewal.start()
    renewal.keep(lease_id)
    renewal.close()
    renewal.close()
    assert renewal.pid is None
    assert store.keep_alive(lease_id) == TTL_S, "the lease is its owner's"


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def news() -> list[str]:
    return []


@pytest.fixture
def hosted(clock: Clock, news: list[str]) -> Renewal:
    """One whose sidecar is never started: the test is its reports."""
    found = Renewal(MemoryStore(), StoreConfig(), PublisherConfig(), on_news=lambda: news.append("news"), clock=clock)
    found.start(idle())
    return found


def idle() -> Sidecar:
    return Sidecar("server", pauses_s=(1.0, 1.0))


def test_a_renewal_counts_for_a_little_longer_than_an_interval(hosted: Renewal, clock: Clock) -> None:
    hosted.keep(7)
    assert not hosted.keeps(7)
    hosted.hear({"lease_id": 7, "renewed_s": clock.now_s - 0.5})
    assert hosted.keeps(7)
    clock.now_s += 2.0 * FRESH - 0.6
    assert hosted.keeps(7)
    clock.now_s += 0.2
    assert not hosted.keeps(7), "counted from the call of the store, not from the report's arrival"


def test_a_report_of_another_lease_or_of_a_dead_process_does_not_count(hosted: Renewal, clock: Clock) -> None:
    hosted.keep(7)
    hosted.hear({"lease_id": 6, "renewed_s": clock.now_s})
    hosted.hear({"lease_id": 6, "lost": "of the one before"})
    assert not hosted.keeps(7)
    hosted.hear({"lease_id": 7, "renewed_s": clock.now_s})
    hosted.hear(None)
    assert not hosted.keeps(7)
    assert hosted.restarts == 1


def test_news_is_what_changes_the_answer(hosted: Renewal, clock: Clock, news: list[str]) -> None:
    hosted.keep(7)
    hosted.hear({"lease_id": 7, "renewed_s": clock.now_s})
    assert len(news) == 1
    hosted.hear({"lease_id": 7, "renewed_s": clock.now_s})
    assert len(news) == 1
    hosted.hear(None)
    assert len(news) == 2
    hosted.hear({"lease_id": 7, "lost": "gone"})
    assert len(news) == 3


def test_a_sidecar_that_has_a_lease_already_is_not_given_another() -> None:
    host = idle()
    first, second, third = (Renewal(MemoryStore(), StoreConfig(), PublisherConfig()) for _ in range(3))
    first.start(host)
    assert not host.is_running, "its owner starts it"
    assert not host.keep(second.hear, second.order)
    first.close()
    third.start(host)
    assert not host.is_running
    first.close()
    assert not host.keep(second.hear, second.order), "a second close takes nothing from another"
    third.close()


def test_without_a_process_each_call_renews(store: LocalStore) -> None:
    renewal = Renewal(store, StoreConfig(), PublisherConfig(keeper="thread"))
    renewal.start()
    lease_id = store.grant(TTL_S).lease_id
    renewal.keep(lease_id)
    assert not renewal.keeps(lease_id)
    renewal.renew(lease_id)
    assert renewal.pid is None
    store.revoke(lease_id)
    with pytest.raises(LeaseLostError):
        renewal.renew(lease_id)
    renewal.close()
