"""Teardown: it ends whatever a step does, and reports how each step went."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest

from tests.support.rows import row
from ucxx_transport.teardown import Running, Teardown, dump_stacks

ROOT = Path(__file__).resolve().parents[2]
LONG_S = 30.0
SHORT_S = 0.05

Events = list[MutableMapping[str, Any]]


class Gate:
    """What a step hangs at until the test's end."""

    def __init__(self) -> None:
        self.opened, self.passed = threading.Event(), threading.Event()

    def hang(self) -> None:
        self.opened.wait(LONG_S)
        self.passed.set()


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.opened.set()


@contextmanager
def silent_peer() -> Iterator[tuple[str, int]]:
    """A listener that accepts every connection and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        accepted: list[socket.socket] = []

        def accept() -> None:
            while True:
                try:
                    accepted.append(listener.accept()[0])
                except OSError:
                    return

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield listener.getsockname()[:2]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(LONG_S)
            for connection in accepted:
                connection.close()


def run(teardown: Teardown, *steps: tuple[str, Callable[[], object], float]) -> list[str]:
    return [teardown.step(name, call, time.monotonic() + limit_s).outcome for name, call, limit_s in steps]


def fails() -> None:
    raise ValueError("no such thing")


def logged(events: Events) -> list[tuple[str, str]]:
    return [(event["step"], event["event"].removeprefix("teardown_")) for event in events]


def test_steps_run_in_order_and_are_reported(log_events: Events) -> None:
    done: list[str] = []
    teardown = Teardown("worker", ring="r")
    assert run(
        teardown, ("flag", lambda: done.append("flag"), LONG_S), ("join", lambda: done.append("join"), LONG_S)
    ) == ["done", "done"]
    assert done == ["flag", "join"]
    assert logged(log_events) == [("flag", "step"), ("flag", "done"), ("join", "step"), ("join", "done")]
    assert {(event["teardown"], event["ring"]) for event in log_events} == {("worker", "r")}


def test_what_fails_is_reported_and_the_next_step_runs(log_events: Events) -> None:
    done: list[str] = []
    teardown = Teardown("worker")
    outcomes = run(teardown, ("bad", fails, LONG_S), ("exit", sys.exit, LONG_S), ("good", lambda: done.append("x"), 1))
    assert outcomes == ["failed", "failed", "done"]
    assert type(teardown.step("bad", fails, time.monotonic() + LONG_S).error) is ValueError
    assert done == ["x"]
    assert logged(log_events)[1] == ("bad", "failed")
    assert log_events[1]["reason"] == "ValueError: no such thing"


def test_what_hangs_is_left_behind_with_all_stacks_and_the_next_step_runs(
    gate: Gate, log_events: Events, capfd: pytest.CaptureFixture[str]
) -> None:
    done: list[str] = []
    teardown = Teardown("worker", margin_s=0)
    outcomes = run(teardown, ("stuck", gate.hang, SHORT_S), ("after", lambda: done.append("after"), LONG_S))
    assert not gate.passed.is_set(), "it was not waited for"
    assert outcomes == ["hung", "done"]
    assert done == ["after"]
    assert "in hang\n" in capfd.readouterr().err
    assert ("stuck", "hung") in logged(log_events)


def test_a_call_that_keeps_its_own_deadline_is_not_taken_for_hanging() -> None:
    waits = threading.Event()
    outcomes = run(
        Teardown("worker", margin_s=LONG_S),
        ("bounded", lambda: waits.wait(SHORT_S), SHORT_S),
        ("late", lambda: waits.wait(SHORT_S), -LONG_S),
    )
    assert outcomes == ["done", "done"]


def test_a_peer_that_does_not_answer_costs_its_steps_their_bounds_and_no_more(log_events: Events) -> None:
    done: list[str] = []

    def ask(address: tuple[str, int]) -> bytes:
        with socket.create_connection(address) as connection:
            connection.sendall(b"POST /v3/lease/revoke HTTP/1.1\r\n\r\n")
            return connection.recv(1)

    with silent_peer() as address:
        outcomes = run(
            Teardown("publisher", margin_s=0),
            ("flag", lambda: done.append("flag"), LONG_S),
            ("stale", lambda: ask(address), SHORT_S),
            ("revoke", lambda: ask(address), SHORT_S),
            ("server", lambda: done.append("server"), LONG_S),
        )
        assert outcomes == ["done", "hung", "hung", "done"]
        assert done == ["flag", "server"]
        events = logged(log_events)
        for step, outcome in [("flag", "done"), ("stale", "hung"), ("revoke", "hung"), ("server", "done")]:
            assert events.index((step, "step")) < events.index((step, outcome))


def ran(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=60, check=False
    )


def test_the_stacks_of_all_threads_go_to_standard_error() -> None:
    done = ran(
        "import threading; from ucxx_transport.teardown import Teardown\n"
        "def waits_for_ever(): threading.Event().wait()\n"
        "print(Teardown('worker', margin_s=0).step('stuck', waits_for_ever, 0.0).outcome)\n"
    )
    assert done.returncode == 0, "a step that is left behind keeps no process from ending"
    assert done.stdout.splitlines()[-1] == "hung"
    assert "waits_for_ever" in done.stderr


def test_steps_run_also_while_the_interpreter_exits() -> None:
    done = ran(
        "import atexit, time; from ucxx_transport.teardown import Teardown\n"
        "def end(): print(Teardown('worker').step('last', lambda: print('ran'), time.monotonic() + 30).outcome)\n"
        "atexit.register(end)\n"
    )
    assert done.stdout.split() == ["ran", "done"]


def test_a_step_runs_in_place_where_no_thread_can_be_started() -> None:
    done = ran(
        "import time; from ucxx_transport.teardown import Teardown\n"
        "import threading\n"
        "class NoThread(threading.Thread):\n"
        '    def start(self): raise RuntimeError("can\'t start new thread")\n'
        "threading.Thread = NoThread\n"
        "print(Teardown('worker').step('last', lambda: print('ran'), time.monotonic() + 30).outcome)\n"
    )
    assert done.stdout.split() == ["ran", "done"]


def test_stacks_can_be_dumped_where_standard_error_is_no_file(capsys: pytest.CaptureFixture[str]) -> None:
    dump_stacks()
    assert capsys.readouterr().out == ""


class SlowStart(Running):
    """Runs once the gate is opened; what began it is to stop it."""

    def __init__(self) -> None:
        self.gate, self.begun, self.runs = threading.Event(), threading.Event(), False

    def start(self) -> None:
        self.begun.set()
        self.gate.wait(LONG_S)
        self.runs = True

    def stop(self) -> None:
        self.runs = False


@pytest.mark.anyio
async def test_what_comes_up_under_a_cancellation_does_not_stay() -> None:
    async def use(running: SlowStart, scope: anyio.CancelScope) -> None:
        with scope:
            async with running:
                pytest.fail("it was cancelled")

    for cancels in (["task"], ["task", "task"], ["scope"], ["scope", "task"]):
        with row(cancels=cancels):
            running, scope = SlowStart(), anyio.CancelScope()
            task = asyncio.ensure_future(use(running, scope))
            await asyncio.to_thread(running.begun.wait, LONG_S)
            for cancelled in cancels:
                (task if cancelled == "task" else scope).cancel()
                for _ in range(5):  # turns of the loop: it is delivered, where one is again and again
                    await asyncio.sleep(0)
                assert not task.done()
            running.gate.set()
            await asyncio.wait([task])
            assert not running.runs
            assert task.cancelled() == ("task" in cancels)
