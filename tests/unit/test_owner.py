from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.support.stopping import stop_process
from tests.support.waiting import wait_until
from ucxx_transport.machine import Owner, current_owner, owner_alive, process_start
from ucxx_transport.ring.handle import process_name
from ucxx_transport.ring.segment import host_id


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.wait()
    assert process.stdin is not None
    process.stdin.close()


def test_this_process_is_its_own_owner_and_alive() -> None:
    owner = current_owner()
    assert owner == Owner(os.getpid(), process_start(os.getpid()))
    assert owner_alive(*owner)


def test_a_pid_given_to_another_process_is_not_the_owner_any_more() -> None:
    pid, start = current_owner()
    assert not owner_alive(pid, start - 1)
    assert not owner_alive(pid, start + 1)


def test_a_stopped_process_is_alive_and_a_killed_one_is_dead_before_it_is_reaped(
    sleeper: subprocess.Popen[bytes],
) -> None:
    owner = Owner(sleeper.pid, process_start(sleeper.pid))
    stop_process(sleeper.pid)
    assert owner_alive(*owner)
    os.kill(sleeper.pid, signal.SIGKILL)
    wait_until(lambda: not owner_alive(*owner), what="the zombie counts as dead")
    assert state_of(sleeper.pid) == "Z"


def test_a_process_whose_main_thread_ended_first_is_alive() -> None:
    program = (
        "import ctypes, sys, threading\n"
        "def rest():\n"
        "    print('up', flush=True); sys.stdin.read(); import os; os._exit(0)\n"
        "threading.Thread(target=rest).start()\n"
        "ctypes.PyDLL(None).syscall(60, 0)\n"  # exit of this thread alone
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        try:
            owner = Owner(process.pid, process_start(process.pid))
            wait_until(lambda: state_of(process.pid) == "Z", what="the main thread is gone")
            assert owner_alive(*owner)
        finally:
            process.kill()


def test_a_process_is_named_by_what_it_runs() -> None:
    with subprocess.Popen(["/bin/cat"], stdin=subprocess.PIPE) as child:
        wait_until(lambda: process_name(child.pid) == f"pid {child.pid} (cat)", 60, what="its program")
        child.communicate()
    assert process_name(child.pid) == f"pid {child.pid}"


def test_nobody_is_dead() -> None:
    assert not owner_alive(2**22 + 1, 1)
    assert not owner_alive(2**63, 1)


def test_a_host_has_one_id_in_all_its_processes() -> None:
    program = "from ucxx_transport.ring.segment import host_id; print(host_id())"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip()
    assert found == host_id()
    assert len(found) == 32


def state_of(pid: int) -> str:
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0]
