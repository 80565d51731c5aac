"""A lease that a sidecar renews, with real processes on a store that is a file."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.support.waiting import wait_until
from ucxx_transport.config import PublisherConfig
from ucxx_transport.membership.local_store import LocalStore
from ucxx_transport.membership.renewal import Keeper
from ucxx_transport.sidecar.launch import Sidecar

MINUTE = 60.0
TTL_S = 600.0
CONFIG = PublisherConfig(interval_s=0.05)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[LocalStore]:
    with LocalStore(tmp_path / "store.db") as opened:
        yield opened


@pytest.fixture
def keeper(store: LocalStore) -> Iterator[Keeper]:
    keeper = Keeper(store, CONFIG)
    yield keeper
    keeper.close()


def test_one_lease_after_the_other_is_renewed_whatever_became_of_the_one_before(
    store: LocalStore, keeper: Keeper
) -> None:
    lease_id = store.grant(TTL_S).lease_id
    keeper.start()
    assert not keeper.keeps
    keeper.keep(lease_id)
    wait_until(lambda: keeper.keeps, MINUTE, what="it is renewed")
    store.revoke(lease_id)
    keeper.keep(store.grant(TTL_S).lease_id)
    wait_until(lambda: keeper.keeps, MINUTE, what="the next one is renewed")


def test_a_sidecar_that_died_is_not_believed_and_another_goes_on(store: LocalStore, keeper: Keeper) -> None:
    keeper.start()
    keeper.keep(store.grant(TTL_S).lease_id)
    wait_until(lambda: keeper.keeps, MINUTE, what="it is renewed")
    dead = keeper.host.pid
    assert dead is not None
    os.kill(dead, signal.SIGKILL)
    wait_until(lambda: keeper.host.restarts == 1, MINUTE, what="its death is noticed")
    wait_until(lambda: keeper.keeps, MINUTE, what="the other one renews")
    assert keeper.host.pid not in (None, dead)


def test_where_no_process_can_be_made_that_is_tried_again(
    store: LocalStore, keeper: Keeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    was_refused = threading.Event()

    def refuse(*_: object, **__: object) -> None:
        was_refused.set()
        raise BlockingIOError("too many processes")

    with monkeypatch.context() as without:
        without.setattr("subprocess.Popen", refuse)
        keeper.start()
        keeper.keep(store.grant(TTL_S).lease_id)
        assert was_refused.wait(MINUTE)
        assert not keeper.keeps
    wait_until(lambda: keeper.keeps, MINUTE, what="one can be made again")


def test_it_is_closed_before_it_has_begun(store: LocalStore, keeper: Keeper) -> None:
    lease_id = store.grant(TTL_S).lease_id
    keeper.start()
    keeper.keep(lease_id)
    keeper.close()
    keeper.close()
    assert keeper.host.pid is None
    assert store.keep_alive(lease_id) == TTL_S, "the lease is its owner's"


def test_a_sidecar_that_has_other_work_renews_all_leases_that_it_is_given(store: LocalStore) -> None:
    host = Sidecar("server", pauses_s=(0.0, 0.0))
    first, second = (Keeper(store, CONFIG) for _ in range(2))
    for keeper in (first, second):
        keeper.start(host)
        keeper.keep(store.grant(TTL_S).lease_id)
    host.start()
    try:
        for keeper in (first, second):
            wait_until(partial(getattr, keeper, "keeps"), MINUTE, what="it is renewed")
        first.close()
        assert host.pid is not None, "it is its owner's to stop"
        host.kept.clear()
        wait_until(lambda: second.keeps, MINUTE, what="the other one is renewed on")
    finally:
        second.close()
        host.stop(0.0)


def test_without_a_process_its_owner_alone_renews(store: LocalStore) -> None:
    keeper = Keeper(store, PublisherConfig(keeper="thread"))
    keeper.start()
    keeper.keep(store.grant(TTL_S).lease_id)
    assert (keeper.host.pid, keeper.keeps, keeper.host.restarts) == (None, False, 0)
    assert "ucxx-sidecar" not in {thread.name for thread in threading.enumerate()}, "none is started either"
    keeper.close()
