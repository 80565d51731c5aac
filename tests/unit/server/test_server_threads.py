"""UCXXServer in thread mode over the in-memory link: what it binds, publishes, counts and takes back."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, MutableMapping
from pathlib import Path
from typing import Any, NoReturn

import pytest

from tests.support.raw_peer import RawPeer
from tests.support.rows import row
from tests.support.waiting import wait_until
from ucxx_transport.config import RingConfig, ServerConfig
from ucxx_transport.errors import ConfigError, DeadlineExceededError, TransportError
from ucxx_transport.link.endpoint import Link
from ucxx_transport.link.reactor import LinkFactory, Reactor
from ucxx_transport.ring import SharedRingBuffer, SlotState
from ucxx_transport.server import UCXXServer
from ucxx_transport.testing import MemoryLink, MemoryNetwork

LOOPBACK = "127.0.0.1"
ROOT = Path(__file__).parents[3]


@pytest.fixture
def ring() -> Iterator[SharedRingBuffer]:
    with SharedRingBuffer.create(RingConfig(slots=2, slot_bytes=4096, prefault=False)) as made:
        yield made


@pytest.fixture
def another_ring() -> Iterator[SharedRingBuffer]:
    with SharedRingBuffer.create(RingConfig(slots=1, slot_bytes=64, prefault=False)) as made:
        yield made


@pytest.fixture
def network() -> MemoryNetwork:
    return MemoryNetwork()


@pytest.fixture
def factory(network: MemoryNetwork) -> LinkFactory:
    """Opens links on the one network; each lives in its own port's thread."""
    return network.link


def server_of(ring: SharedRingBuffer, factory: LinkFactory, **settings: Any) -> UCXXServer:
    config = ServerConfig(**{"mode": "thread", "host": LOOPBACK, "ports": 2, **settings})
    return UCXXServer(ring, config, link_factory=factory)


def connected(server: UCXXServer, ring: SharedRingBuffer, reactor: Reactor) -> RawPeer:
    """One that has said nothing yet."""

    def run_until(condition: Callable[[], bool]) -> None:
        wait_until(lambda: (reactor.poll(), condition())[1], 60)

    peer = RawPeer(run_until, ring.ring_id)
    peer.endpoint = reactor.link.connect(LOOPBACK, server.ports[0], peer)
    return peer


def peer_of(server: UCXXServer, ring: SharedRingBuffer, reactor: Reactor) -> RawPeer:
    """One that is greeted."""
    peer = connected(server, ring, reactor)
    peer.greet()
    return peer


def test_references_carry_the_address_while_the_server_runs_and_not_after(
    ring: SharedRingBuffer, factory: LinkFactory
) -> None:
    assert ring.write_raw(b"before").ports == ()
    with server_of(ring, factory) as server:
        ref = ring.write_raw(b"while")
        assert (ref.host, ref.ports) == (LOOPBACK, server.ports)
        assert len(set(server.ports)) == 2
        assert server.address == LOOPBACK
    after = ring.write_raw(b"after")
    assert (after.host, after.ports) == (None, ())
    assert server.ports == ()
    assert server.address is None


def test_each_port_has_a_thread_of_its_own_and_none_is_left(ring: SharedRingBuffer, factory: LinkFactory) -> None:
    def port_threads() -> list[str]:
        return sorted(thread.name for thread in threading.enumerate() if thread.name.startswith("ucxx-port"))

    with server_of(ring, factory, ports=3):
        assert port_threads() == ["ucxx-port-0", "ucxx-port-1", "ucxx-port-2"]
    assert port_threads() == []


LIMITED = """
import json, resource, sys
from tests.unit.server.test_server_threads import Reactor, connected, server_of
from ucxx_transport import RingConfig, SharedRingBuffer
from ucxx_transport.link.base import PER_CONNECTION, SPARE, descriptors_in_use
from ucxx_transport.logs import log_to_stderr
from ucxx_transport.testing import MemoryNetwork
from ucxx_transport.wire.frames import Status
ports, room, asked = map(int, sys.argv[1:])
log_to_stderr("limited")
network = MemoryNetwork()
with SharedRingBuffer.create(RingConfig(slots=1, slot_bytes=64, prefault=False)) as ring:
    reactor = Reactor(network.link)
    server = server_of(ring, network.link, ports=ports, max_connections=asked, start_timeout_s=60.0)
    limit = descriptors_in_use() + SPARE + PER_CONNECTION * room
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    with server:
        admitted = 0
        while (last := connected(server, ring, reactor).greet().status) is Status.OK:
            admitted += 1
        print(json.dumps({"limit": limit, "admitted": admitted, "last": last.name}))
    reactor.close()
"""


def test_a_port_without_descriptors_for_all_says_so_once_and_answers_the_rest_busy() -> None:
    for ports, room, asked in ((1, 40, 256), (2, 40, 256), (1, 40, 8)):
        with row(ports=ports, room=room, asked=asked):
            command = [sys.executable, "-c", LIMITED, *map(str, (ports, room, asked))]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
            assert done.returncode == 0, done.stderr
            said, events = json.loads(done.stdout), re.findall(r"connections_limited .*", done.stderr)
            admitted = said["admitted"]
            assert said["last"] == "BUSY"
            if asked < room:
                assert (events, admitted) == ([], asked)
                continue
            limits = f"asked={asked} descriptors={said['limit']} see='ulimit -n'"
            assert len(events) == ports
            assert all(event.endswith(limits) for event in events)
            assert events[0] == f"connections_limited connections={admitted} {limits}"
            assert room // ports - 4 <= admitted <= room // ports  # less what a port has opened for itself


def test_the_very_ports_that_are_named_are_bound(ring: SharedRingBuffer, factory: LinkFactory) -> None:
    with server_of(ring, factory, ports=[5001, 5003]) as server:
        assert server.ports == (5001, 5003)
        assert [port.port for port in server.statistics().ports] == [5001, 5003]
    assert [port.port for port in server.statistics().ports] == [0, 0]


def test_from_a_base_port_taken_ones_are_stepped_over(
    ring: SharedRingBuffer, another_ring: SharedRingBuffer, network: MemoryNetwork, factory: LinkFactory
) -> None:
    with (
        server_of(ring, factory, ports=[5001, 5002]),
        server_of(another_ring, factory, ports=3, base_port=5000) as second,
    ):
        assert sorted(second.ports) == [5000, 5003, 5004]  # two of them may meet at 5003
    with (
        server_of(ring, factory, ports=[*range(65530, 65536)]),
        pytest.raises(ConfigError, match=r"none of 6 ports from 65530 on.*choose another base_port.*port is in use"),
    ):
        server_of(another_ring, factory, ports=2, base_port=65530).start()
    assert network.listeners == {}


def test_a_port_whose_own_wait_was_in_vain_says_what_it_waited_for(ring: SharedRingBuffer) -> None:
    def waits(_: Reactor) -> NoReturn:
        raise DeadlineExceededError("the ring's lock was not to be had")

    with pytest.raises(DeadlineExceededError, match="lock"):
        server_of(ring, waits).start()


def test_a_port_that_is_taken_stops_the_start_and_leaves_none_of_the_others(
    ring: SharedRingBuffer, another_ring: SharedRingBuffer, network: MemoryNetwork, factory: LinkFactory
) -> None:
    with server_of(ring, factory, ports=[5001]):
        server = server_of(another_ring, factory, ports=[5000, 5001])
        with pytest.raises(ConfigError, match="5001"):
            server.start()
        assert server.address is None
        assert server.ports == ()
        assert another_ring.address() == (None, ())
        assert set(network.listeners) == {5001}


def test_a_link_that_cannot_be_opened_is_an_error_of_start(ring: SharedRingBuffer) -> None:
    def broken(_: Reactor) -> Link:
        raise ConfigError("pip install ucxx_transport[cu12]")

    with pytest.raises(ConfigError, match="pip install"):
        server_of(ring, broken).start()
    assert ring.address() == (None, ())


def test_it_starts_once_stops_as_often_as_one_likes_and_starts_again(
    ring: SharedRingBuffer, factory: LinkFactory
) -> None:
    server = server_of(ring, factory)
    server.stop()
    server.start()
    with pytest.raises(TransportError, match="running already"):
        server.start()
    server.stop()
    server.stop()
    server.start()
    assert len(server.ports) == 2
    server.stop()


def test_the_ring_may_be_closed_before_its_server_is_stopped(ring: SharedRingBuffer, factory: LinkFactory) -> None:
    server = server_of(ring, factory)
    server.start()
    ring.close()
    server.stop()
    assert server.ports == ()


def test_an_acknowledgement_that_arrived_before_the_stop_counts(
    ring: SharedRingBuffer, network: MemoryNetwork, factory: LinkFactory
) -> None:
    reactor = Reactor(network.link)
    with server_of(ring, factory, ports=1) as server:
        peer = peer_of(server, ring, reactor)
        ref = ring.write_raw(bytes(100))
        peer.fetch(ref)
        peer.end(peer.attempt)
    assert ring.slot_state(ref.slot) is SlotState.FREE
    assert server.statistics().total("delivered") == 1
    reactor.close()


class BreakingLink(MemoryLink):
    """A link with a fault that shows when the test says so."""

    is_broken = False

    def progress(self, spin_s: float = 0.0) -> bool:
        if self.is_broken:
            self.is_broken = False
            raise RuntimeError("a fault of the link")
        return super().progress(spin_s)


def test_a_port_that_dies_gives_back_what_it_was_sending(ring: SharedRingBuffer, network: MemoryNetwork) -> None:
    links: list[BreakingLink] = []

    def link_of(reactor: Reactor) -> Link:
        links.append(BreakingLink(network, reactor))
        return links[-1]

    reactor = Reactor(network.link)
    with server_of(ring, link_of, ports=1) as server:
        peer = peer_of(server, ring, reactor)
        ref = ring.write_raw(bytes(100))
        peer.fetch(ref)
        assert ring.slot_state(ref.slot) is SlotState.READING
        links[0].is_broken = True
        wait_until(lambda: ring.slot_state(ref.slot) is SlotState.READY, 60, what="the slot is given back")
        wait_until(lambda: not server.statistics().total("port"), 60, what="the port is gone")
        assert server.statistics().total("connections") == 0
        assert server.statistics().total("released") == 1
    reactor.close()


class UnclosableLink(MemoryLink):
    """A link whose close fails."""

    def close(self) -> None:
        super().close()
        raise RuntimeError("a fault of the link's close")


def test_a_port_whose_link_cannot_be_closed_says_so_in_the_log(
    ring: SharedRingBuffer, network: MemoryNetwork, log_events: list[MutableMapping[str, Any]]
) -> None:
    with server_of(ring, lambda reactor: UnclosableLink(network, reactor), ports=1):
        pass
    [died] = [event for event in log_events if event["event"] == "port_died"]
    assert "a fault of the link's close" in died["exception"]


@pytest.mark.anyio
async def test_it_is_an_async_context_manager_too(ring: SharedRingBuffer, factory: LinkFactory) -> None:
    async with server_of(ring, factory) as server:
        assert ring.address() == (LOOPBACK, server.ports)
        statistics = server.statistics()
        assert statistics.host == LOOPBACK
        assert statistics.restarts == 0
        assert set(statistics.pids) == {os.getpid()}
    assert ring.address() == (None, ())
    assert server.statistics().pids == ()
