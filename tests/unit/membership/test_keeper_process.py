"""The worker's side of its keeper, with real processes on a store that is a file."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.waiting import wait_until
from ucxx_transport.config import StoreConfig
from ucxx_transport.errors import LeaseLostError
from ucxx_transport.membership import keeper_process
from ucxx_transport.membership.keeper_process import KeeperProcess
from ucxx_transport.membership.local import LocalStore

MINUTE = 60.0
TTL_S = 600.0


class Clock:
    """Seconds that pass when a test says so."""

    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[LocalStore]:
    with LocalStore(tmp_path / "store.db") as opened:
        yield opened


@pytest.fixture
def keeper(store: LocalStore, clock: Clock) -> Iterator[KeeperProcess]:
    keeper = KeeperProcess(store.url, StoreConfig(), interval_s=0.05, clock=clock)
    yield keeper
    keeper.close()


def kill(keeper: KeeperProcess) -> None:
    """Kill it, and wait until the end of its words is there to be heard, behind those words."""
    assert keeper.pid is not None
    assert keeper.descriptor is not None
    os.kill(keeper.pid, signal.SIGKILL)
    ended = select.poll()
    ended.register(keeper.descriptor, select.POLLHUP)
    wait_until(lambda: any(bits & select.POLLHUP for _, bits in ended.poll(0)), MINUTE, what="its end is heard")


def test_it_keeps_what_it_is_told_and_says_what_is_lost(store: LocalStore, keeper: KeeperProcess) -> None:
    lease_id = store.grant(TTL_S).lease_id
    keeper.keep(lease_id)
    wait_until(lambda: keeper.keeps(lease_id), MINUTE, what="it keeps")
    store.revoke(lease_id)
    with pytest.raises(LeaseLostError):
        wait_until(lambda: not keeper.keeps(lease_id), MINUTE, what="it says so")


def test_what_a_dead_one_had_said_is_not_believed(store: LocalStore, keeper: KeeperProcess) -> None:
    lease_id = store.grant(TTL_S).lease_id
    keeper.keep(lease_id)
    assert keeper.descriptor is not None
    assert select.select([keeper.descriptor], [], [], MINUTE)[0], "it has said that it keeps"
    kill(keeper)
    assert not keeper.keeps(lease_id), "nobody does"


def test_the_first_that_dies_is_replaced_at_once_and_those_that_die_young_ever_later(
    store: LocalStore, keeper: KeeperProcess, clock: Clock
) -> None:
    lease_id = store.grant(TTL_S).lease_id
    keeper.keep(lease_id)
    pauses = []
    for death in range(6):
        kill(keeper)
        keeper.keeps(lease_id)
        pause_s = 0.0
        while keeper.pid is None:
            clock.now_s += 0.25
            pause_s += 0.25
            assert not keeper.keeps(lease_id), "its owner renews meanwhile"
        pauses.append(pause_s)
        assert keeper.restarts == death + 1
    assert pauses[0] == 0
    for pause_s, bound_s in zip(pauses[1:], (1, 2, 4, 8, 16), strict=True):
        assert bound_s / 2 <= pause_s <= bound_s + 0.25
    clock.now_s += 3600
    kill(keeper)
    keeper.keeps(lease_id)
    assert keeper.pid is not None, "one that lived long is replaced at once"
    wait_until(lambda: keeper.keeps(lease_id), MINUTE, what="it keeps")


def test_where_no_process_can_be_made_its_owner_is_told_nothing_but_that_it_does_not_keep(
    store: LocalStore, keeper: KeeperProcess, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise BlockingIOError("too many processes")

    lease_id = store.grant(TTL_S).lease_id
    with monkeypatch.context() as without:
        without.setattr(keeper_process, "start_companion", refuse)
        keeper.keep(lease_id)
        assert not keeper.keeps(lease_id)
        assert keeper.pid is None
    clock.now_s += 3600
    wait_until(lambda: keeper.keeps(lease_id), MINUTE, what="one can be made again")


def test_it_is_closed_before_it_has_begun(store: LocalStore, keeper: KeeperProcess) -> None:
    lease_id = store.grant(TTL_S).lease_id
    keeper.keep(lease_id)
    keeper.close()
    keeper.close()
    assert keeper.pid is None
    assert store.keep_alive(lease_id) == TTL_S, "the lease is its owner's"
