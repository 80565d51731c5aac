"""How a process beside a worker is started, and how it sees the worker's end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.support.waiting import wait_until
from ucxx_transport.companion import WorkerEnd, start_companion


class Parent:
    """Who `getppid` says is the parent."""

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


def let_go(end: WorkerEnd) -> None:
    os.close(end.pidfd)


def test_a_worker_whose_children_changed_hands_is_there_until_its_last_thread_has_ended(
    worker: subprocess.Popen[bytes], parent: Parent
) -> None:
    end = WorkerEnd(worker.pid)
    parent.pid = 1  # as when its main thread has ended and the others are about to
    assert not end.is_gone
    assert not end.wait_until_gone(0.0)
    worker.kill()
    assert end.wait_until_gone(60)
    let_go(end)


def test_a_worker_that_had_ended_before_is_gone_whoever_has_its_pid_now(
    worker: subprocess.Popen[bytes], parent: Parent
) -> None:
    parent.pid = 1
    end = WorkerEnd(worker.pid)
    assert end.is_gone
    assert end.wait_until_gone(0.0)
    assert end.pidfd == -1


def test_without_a_pidfd_the_parent_is_looked_at(
    worker: subprocess.Popen[bytes], parent: Parent, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(_: int) -> int:
        raise OSError("no such system call")

    monkeypatch.setattr(os, "pidfd_open", none)
    end = WorkerEnd(worker.pid)
    assert not end.is_gone
    parent.pid = 1
    assert end.is_gone


def test_a_stopped_worker_is_known_for_one(worker: subprocess.Popen[bytes], parent: Parent) -> None:
    end = WorkerEnd(parent.pid)
    assert not end.is_stopped
    worker.send_signal(signal.SIGSTOP)
    wait_until(lambda: end.is_stopped, 60, what="it is seen to be stopped")
    assert not end.is_gone
    let_go(end)


def test_a_companion_is_given_its_words_and_what_only_people_need_is_not_there() -> None:
    with start_companion("tests.e2e.programs.what_a_companion_sees", "7", "x", stdout=subprocess.PIPE) as process:
        said, _ = process.communicate()
    assert process.returncode == 0
    assert json.loads(said) == {"name": "__main__", "words": ["7", "x"], "rich": False}


@pytest.mark.parametrize(
    ("module", "spared"),
    [
        (
            "ucxx_transport.server.child",
            {"psutil", "pydantic", "ucxx_transport.config", "ucxx_transport.server.server"},
        ),
        ("ucxx_transport.membership.keeper_child", {"httpx", "numpy", "psutil"}),
    ],
    ids=["server", "keeper"],
)
def test_a_companion_loads_no_more_than_it_needs(module: str, spared: set[str]) -> None:
    run = subprocess.run(
        [sys.executable, "-c", f"import sys, {module}; print(*sys.modules)"], capture_output=True, text=True, check=True
    )
    loaded = set(run.stdout.split())
    assert module in loaded
    assert not spared & loaded
