"""The worker's side of its sidecar: when it is started again, and how a start fails."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from tests.support.waiting import wait_until
from ucxx_transport.config import RingConfig, ServerConfig, StoreConfig
from ucxx_transport.errors import ConfigError, DeadlineExceededError, TransportError
from ucxx_transport.membership import open_store
from ucxx_transport.ring import SharedRingBuffer
from ucxx_transport.ring.segment import segment_folder
from ucxx_transport.sidecar.launch import Order, Sidecar

MINUTE = 60.0
AT_ONCE = (0.0, 0.0)


def soon() -> float:
    return time.monotonic() + MINUTE


def order_of(ring_name: str, port: int = 0) -> Order:
    config = ServerConfig(host="127.0.0.1", ports=1)
    return {
        "ring_name": ring_name,
        "ring_folder": segment_folder(),
        "descriptor": None,
        "index": 0,
        "port": port,
        "settings": config,
    }


def test_what_kept_the_ports_from_listening_is_raised_here_by_its_class() -> None:
    with SharedRingBuffer.create(RingConfig(slots=2, slot_bytes=64)) as ring:
        first = Sidecar("first", pauses_s=AT_ONCE, serve=lambda: order_of(ring.name))
        first.start()
        try:
            port = first.up.result(MINUTE)
            second = Sidecar("second", pauses_s=AT_ONCE, serve=lambda: order_of(ring.name, port))
            second.start()
            with pytest.raises(ConfigError, match=str(port)):
                second.up.result(MINUTE)
            second.stop(soon())
            assert second.restarts == 0, "one that never came up is its caller's to start again"
        finally:
            first.stop(soon())
        assert first.pid is None


def test_a_ring_that_is_gone_is_an_error_of_the_start() -> None:
    sidecar = Sidecar("server", pauses_s=AT_ONCE, serve=lambda: order_of("gone"))
    sidecar.start()
    with pytest.raises(TransportError, match="gone"):
        sidecar.up.result(MINUTE)
    sidecar.stop(soon())


def test_one_that_is_not_up_in_time_is_an_error_of_the_start() -> None:
    sidecar = Sidecar("server", pauses_s=AT_ONCE, serve=lambda: order_of("r"), start_timeout_s=0.01)
    sidecar.start()
    with pytest.raises(DeadlineExceededError):
        sidecar.up.result(MINUTE)
    sidecar.stop(soon())


def test_one_that_dies_is_started_again() -> None:
    died = threading.Event()
    sidecar = Sidecar("lease", pauses_s=AT_ONCE, on_death=died.set)
    sidecar.start()
    dead = wait_until(lambda: sidecar.pid, MINUTE, what="it is up")
    assert dead is not None
    os.kill(dead, signal.SIGKILL)
    assert died.wait(MINUTE)
    wait_until(lambda: sidecar.pid not in (None, dead), MINUTE, what="another one is up")
    assert (sidecar.restarts, sidecar.up.result()) == (1, None)
    sidecar.stop(soon())
    sidecar.stop(soon())
    assert sidecar.pid is None


def test_a_stopped_one_can_be_started_again() -> None:
    sidecar = Sidecar("lease", pauses_s=AT_ONCE)
    for _ in range(2):
        sidecar.start()
        assert sidecar.up.result(MINUTE) is None
        sidecar.stop(soon())
        assert sidecar.pid is None


def test_one_that_does_not_answer_its_close_frame_is_killed() -> None:
    sidecar = Sidecar("lease", pauses_s=AT_ONCE)
    sidecar.start()
    sidecar.up.result(MINUTE)
    pid = wait_until(lambda: sidecar.pid, MINUTE, what="it is up")
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    sidecar.stop(time.monotonic())
    assert sidecar.pid is None


def test_orders_to_one_that_is_stopped_are_carried_out_when_it_goes_on(tmp_path: Path) -> None:
    """The newest of each lease, however many there were: its socket takes some hundred."""
    with open_store(f"local://{tmp_path}/store.db") as store:
        order: Order = {"url": store.url, "config": StoreConfig(), "interval_s": 0.2}
        given_up, kept = store.grant(3.0).lease_id, store.grant(MINUTE).lease_id
        store.put("given up", b"", lease_id=given_up)
        sidecar = Sidecar("lease", pauses_s=AT_ONCE)
        sidecar.start()
        try:
            sidecar.keep(given_up, order)
            wait_until(lambda: given_up in sidecar.kept, MINUTE, what="it renews")
            assert sidecar.pid is not None
            os.kill(sidecar.pid, signal.SIGSTOP)
            for other in range(10**9, 10**9 + 3000):
                sidecar.keep(other, None)
            sidecar.keep(given_up, None)
            sidecar.keep(kept, None)
            sidecar.keep(kept, order)
            os.kill(sidecar.pid, signal.SIGCONT)
            wait_until(lambda: kept in sidecar.kept, MINUTE, what="it renews what it was ordered last")
            wait_until(lambda: store.get("given up") is None, MINUTE, what="nobody renews that any more")
        finally:
            sidecar.stop(soon())
