"""Starts, stops and restarts of a server process that do not go as planned: few resources, forks, cancellation."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import subprocess
from collections.abc import MutableMapping
from contextlib import ExitStack
from typing import Any

import pytest

from tests.support.programs import program
from tests.support.raw_peer import raw_peer
from tests.support.served_ring import client_of, open_ring, read_retrying, served_ring
from tests.support.waiting import wait_until
from ucxx_transport import RingConfig, ServerConfig, SharedRingBuffer, SlotRef, TransportError, UCXXServer
from ucxx_transport.wire.frames import Status

MINUTE = 60
POPEN = subprocess.Popen
CONFIG = ServerConfig(host="127.0.0.1", ports=1, start_timeout_s=60, stop_timeout_s=20)


class NoMemory:
    """`subprocess.Popen` on a machine that has none for a while."""

    def __init__(self, times: int) -> None:
        self.left = times

    def __call__(self, *arguments: Any, **settings: Any) -> subprocess.Popen[bytes]:
        if self.left > 0:
            self.left -= 1
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return POPEN(*arguments, **settings)


def test_restart_that_fails_for_want_of_resources_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with served_ring() as served, client_of(port_quarantine_s=0) as client:
        pid = served.server.statistics().pids[0]
        assert pid is not None
        popen = NoMemory(times=3)
        monkeypatch.setattr("subprocess.Popen", popen)
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: served.server.statistics().pids[0] not in {None, pid}, MINUTE, what="another server process")
        assert popen.left == 0
        read_retrying(client, served.ring.write_raw(b"after")).release()


def test_start_that_fails_for_want_of_resources_says_so_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subprocess.Popen", NoMemory(times=1))
    with open_ring() as ring:
        server = UCXXServer(ring, CONFIG)
        with pytest.raises(TransportError, match="could not be started"):
            server.start()
        assert (server.ports, ring.address()) == ((), (None, ()))


def test_a_port_takes_no_more_connections_than_it_has_descriptors_for_and_serves_those_it_has() -> None:
    few = ("sh", "-c", 'ulimit -n 128 && exec "$@"', "sh")
    with program("busy_worker", prefix=few) as worker, ExitStack() as stack:
        ref = SlotRef.from_bytes(bytes.fromhex(worker.hear()["refs"][0]))
        peers = [stack.enter_context(raw_peer(ref.ports[0], ref.ring_id)) for _ in range(24)]
        found = [peer.greet().status for peer in peers]
        admitted = found.index(Status.BUSY)
        assert admitted >= 8
        assert found == [Status.OK] * admitted + [Status.BUSY] * (24 - admitted)
        (answer,) = peers[0].fetch(ref)
        assert answer.body == bytes(1000)


def test_child_that_is_gone_before_its_order_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("multiprocessing.spawn._python_exe", b"/bin/false")
    with open_ring() as ring, pytest.raises(TransportError, match="died at its start"):
        UCXXServer(ring, CONFIG).start()


def test_server_stops_politely_although_its_worker_has_forked(log_events: list[MutableMapping[str, Any]]) -> None:
    with open_ring() as ring, UCXXServer(ring, CONFIG):
        child = os.fork()  # as a fork-based environment worker does; it holds every descriptor of this process
        if child == 0:
            signal.pause()
            os._exit(0)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert "sidecar_killed" not in [event["event"] for event in log_events]


def test_server_made_before_a_fork_and_started_in_the_child_stops_there() -> None:
    with open_ring() as ring:
        server = UCXXServer(ring, CONFIG)
        child = os.fork()
        if child == 0:
            server.start()
            came_up = bool(server.ports) and ring.address()[1] == server.ports
            server.stop()
            os._exit(7 if came_up and (server.ports, ring.address()) == ((), (None, ())) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_start_that_is_cancelled_leaves_no_server() -> None:
    async def scenario(ring: SharedRingBuffer) -> None:
        server = UCXXServer(ring, CONFIG)
        entering = asyncio.ensure_future(server.__aenter__())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        entering.cancel()
        with pytest.raises(asyncio.CancelledError):
            await entering
        assert server.ports == ()

    with SharedRingBuffer.create(RingConfig(slots=2, slot_bytes=64)) as ring:
        asyncio.run(scenario(ring))
        assert ring.address() == (None, ())
