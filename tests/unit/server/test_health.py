"""Whether a server is healthy: every port listens, and its loop turns."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from tests.support.waiting import wait_until
from ucxx_transport.config import RingConfig, ServerConfig
from ucxx_transport.ring import SharedRingBuffer
from ucxx_transport.server import UCXXServer
from ucxx_transport.server.counters import BEAT, PORT, PortCounters
from ucxx_transport.testing import MemoryNetwork

HOUR = 3600.0
THIS_MOMENT_S = 1e-9


@pytest.fixture
def ring() -> Iterator[SharedRingBuffer]:
    with SharedRingBuffer.create(RingConfig(slots=2, slot_bytes=64, prefault=False)) as made:
        yield made


def server_of(ring: SharedRingBuffer) -> UCXXServer:
    network = MemoryNetwork()
    config = ServerConfig(mode="thread", host="127.0.0.1", ports=2)
    return UCXXServer(ring, config, link_factory=network.link)


def test_a_server_is_healthy_while_it_serves(ring: SharedRingBuffer) -> None:
    server = server_of(ring)
    assert not server.is_healthy(HOUR)
    with server:
        wait_until(lambda: server.is_healthy(HOUR), 60, what="every loop has turned")
    assert not server.is_healthy(HOUR)


def test_a_loop_that_turned_too_long_ago_is_unhealthy(ring: SharedRingBuffer) -> None:
    with server_of(ring) as server:
        wait_until(lambda: server.is_healthy(HOUR), 60, what="every loop has turned")
        assert not server.is_healthy(THIS_MOMENT_S)


def test_loops_go_on_turning_though_nobody_reads(ring: SharedRingBuffer) -> None:
    with server_of(ring):
        ports = [PortCounters(ring.server_words, index) for index in range(2)]
        began_ns = time.monotonic_ns()
        wait_until(lambda: all(port.words[BEAT] > began_ns for port in ports), 60, what="both loops turn")


def test_one_port_that_is_not_listening_makes_it_unhealthy(ring: SharedRingBuffer) -> None:
    with server_of(ring) as server:
        wait_until(lambda: server.is_healthy(HOUR), 60, what="every loop has turned")
        second = PortCounters(ring.server_words, 1)
        port = second.words[PORT]
        second.words[PORT] = 0  # as its owner says when it has stopped
        assert not server.is_healthy(HOUR)
        second.words[PORT] = port
        assert server.is_healthy(HOUR)


def test_a_server_whose_ring_is_closed_is_unhealthy(ring: SharedRingBuffer) -> None:
    server = server_of(ring)
    server.start()
    server.stop()
    ring.close()
    assert not server.is_healthy(HOUR)
