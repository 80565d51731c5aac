"""The sidecar process: what it loads, and how it sees the worker's end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.support.waiting import wait_until
from ucxx_transport.machine import is_stopped, owner_alive, process_start
from ucxx_transport.sidecar import main
from ucxx_transport.sidecar.main import worker_of


class Parent:
    """What `getppid` answers."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def __call__(self) -> int:
        return self.pid


@pytest.fixture
def worker() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"]) as process:
        yield process
        process.kill()


@pytest.fixture
def parent(worker: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch) -> Parent:
    parent = Parent(worker.pid)
    monkeypatch.setattr(os, "getppid", parent)
    return parent


def test_a_worker_whose_children_have_another_parent_is_there_until_its_last_thread_has_ended(
    worker: subprocess.Popen[bytes], parent: Parent
) -> None:
    owner = worker_of(worker.pid)
    parent.pid = 1  # as when its main thread has ended and the others are about to
    assert owner_alive(*owner)
    worker.kill()
    wait_until(lambda: not owner_alive(*owner), 60, what="it is gone")


def test_a_worker_that_had_ended_before_is_gone_though_its_pid_is_another_s_now(
    worker: subprocess.Popen[bytes], parent: Parent
) -> None:
    parent.pid = 1
    assert not owner_alive(*worker_of(worker.pid))


@pytest.mark.usefixtures("parent")
def test_a_worker_s_end_shows_at_once_though_a_process_that_it_has_forked_keeps_its_end_of_the_pipe(
    worker: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(main, "LOOK_S", 1e6)
    pidfd = os.pidfd_open(worker.pid)
    monkeypatch.setattr(os, "pidfd_open", {worker.pid: pidfd}.__getitem__)
    kept, near = socket.socketpair(type=socket.SOCK_SEQPACKET)
    with kept, near, ThreadPoolExecutor() as pool:
        end = pool.submit(main._Main(near.fileno(), worker.pid)._obey)  # noqa: SLF001 - else a process, and its LOOK_S
        worker.kill()
        try:
            assert end.result(60) == "dead"
        finally:
            kept.send(b"")
    os.close(pidfd)


def test_a_stopped_worker_is_seen_to_be_stopped(worker: subprocess.Popen[bytes]) -> None:
    assert not is_stopped(worker.pid)
    worker.send_signal(signal.SIGSTOP)
    wait_until(lambda: is_stopped(worker.pid), 60, what="it is seen to be stopped")
    assert owner_alive(worker.pid, process_start(worker.pid))


@pytest.mark.parametrize(
    ("modules", "spared"),
    [
        (("ucxx_transport.sidecar.main",), {"asyncio", "http", "numpy", "sqlite3"}),
        (
            ("ucxx_transport.sidecar.main", "ucxx_transport.server.port", "ucxx_transport.ring"),
            {
                "anyio",
                "asyncio",
                "http",
                "psutil",
                "rich",
                "sqlite3",
                "ucxx_transport.membership",
                "ucxx_transport.server.server",
            },
        ),
        (
            (
                "ucxx_transport.sidecar.main",
                "ucxx_transport.membership.renewal",
                "ucxx_transport.membership.local_store",
            ),
            {"http", "numpy", "psutil", "rich"},
        ),
    ],
    ids=["neither", "serve", "renew"],
)
def test_a_sidecar_loads_no_more_than_its_roles_need(modules: tuple[str, ...], spared: set[str]) -> None:
    run = subprocess.run(
        [sys.executable, "-c", f"import sys, {', '.join(modules)}; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = set(run.stdout.split())
    assert set(modules) <= loaded
    assert not spared & loaded
