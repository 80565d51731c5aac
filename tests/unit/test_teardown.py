"""Teardown: it ends, whatever a step does, and says of each step what became of it."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from ucxx_transport.teardown import Step, StepOutcome, dump_stacks, teardown, teardown_async

ROOT = Path(__file__).resolve().parents[2]
LONG_S = 30.0
SHORT_S = 0.05


class Gate:
    """What a step hangs at until the test's end."""

    def __init__(self) -> None:
        self.opened, self.passed = threading.Event(), threading.Event()
        self.dumps = 0

    def hang(self) -> None:
        self.opened.wait(LONG_S)
        self.passed.set()

    def dump(self) -> None:
        self.dumps += 1


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.opened.set()


@contextmanager
def black_hole() -> Iterator[tuple[str, int]]:
    """A listener that lets whoever comes in, and never says a word."""
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


def fails() -> None:
    raise ValueError("no such thing")


def words(events: list[MutableMapping[str, Any]]) -> list[tuple[str, str]]:
    return [(event["step"], event["event"].removeprefix("teardown step ").partition(";")[0]) for event in events]


def test_steps_run_in_order_and_are_reported(log_events: list[MutableMapping[str, Any]]) -> None:
    done: list[str] = []
    report = teardown(
        [("flag", lambda: done.append("flag"), LONG_S), Step(name="join", call=lambda: done.append("join"), bound_s=1)],
        name="worker",
    )
    assert done == ["flag", "join"]
    assert [(step.name, step.outcome, step.error) for step in report.steps] == [
        ("flag", StepOutcome.DONE, None),
        ("join", StepOutcome.DONE, None),
    ]
    assert report.is_clean
    assert report.name == "worker"
    assert report.elapsed_s >= report.of("flag").elapsed_s >= 0
    assert words(log_events) == [("flag", "begins"), ("flag", "done"), ("join", "begins"), ("join", "done")]
    assert {event["teardown"] for event in log_events} == {"worker"}
    with pytest.raises(KeyError):
        report.of("other")


def test_what_fails_is_reported_and_the_next_step_runs(log_events: list[MutableMapping[str, Any]]) -> None:
    done: list[str] = []
    report = teardown([("bad", fails, LONG_S), ("exit", sys.exit, LONG_S), ("good", lambda: done.append("good"), 1.0)])
    assert done == ["good"]
    assert [step.outcome.value for step in report.steps] == ["failed", "failed", "done"]
    assert isinstance(report.of("bad").error, ValueError)
    assert isinstance(report.of("exit").error, SystemExit)
    assert not report.is_clean
    assert words(log_events)[1] == ("bad", "failed")


def test_what_hangs_is_left_behind_with_all_stacks_and_the_next_step_runs(
    gate: Gate, log_events: list[MutableMapping[str, Any]]
) -> None:
    done: list[str] = []
    report = teardown([("stuck", gate.hang, SHORT_S), ("after", lambda: done.append("after"), LONG_S)], dump=gate.dump)
    assert not gate.passed.is_set(), "it was not waited for"
    assert done == ["after"]
    assert [step.outcome for step in report.steps] == [StepOutcome.HUNG, StepOutcome.DONE]
    assert report.of("stuck").elapsed_s >= SHORT_S
    assert gate.dumps == 1
    assert ("stuck", "hangs") in words(log_events)


def test_a_peer_that_answers_nobody_costs_its_steps_their_bounds_and_no_more(
    gate: Gate, log_events: list[MutableMapping[str, Any]]
) -> None:
    done: list[str] = []

    def ask(address: tuple[str, int]) -> bytes:
        with socket.create_connection(address) as connection:
            connection.sendall(b"POST /v3/lease/revoke HTTP/1.1\r\n\r\n")
            return connection.recv(1)

    with black_hole() as address:
        report = teardown(
            [
                ("flag", lambda: done.append("flag"), LONG_S),
                ("stale", lambda: ask(address), SHORT_S),
                ("revoke", lambda: ask(address), SHORT_S),
                ("server", lambda: done.append("server"), LONG_S),
            ],
            name="publisher",
            dump=gate.dump,
        )
        assert [step.outcome.value for step in report.steps] == ["done", "hung", "hung", "done"]
        assert done == ["flag", "server"]
        logged = words(log_events)
        for step, outcome in [("flag", "done"), ("stale", "hangs"), ("revoke", "hangs"), ("server", "done")]:
            assert logged.index((step, "begins")) < logged.index((step, outcome))


def test_the_stacks_of_all_threads_go_to_standard_error() -> None:
    program = (
        "import threading; from ucxx_transport.teardown import teardown\n"
        "def waits_for_ever(): threading.Event().wait()\n"
        "report = teardown([('stuck', waits_for_ever, 0.05)])\n"
        "print(report.of('stuck').outcome.value)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=60, check=False
    )
    assert ran.returncode == 0, "a step that is left behind keeps nobody from ending"
    assert ran.stdout.splitlines()[-1] == "hung"
    assert "waits_for_ever" in ran.stderr


def test_stacks_can_be_dumped_where_standard_error_is_no_file(capsys: pytest.CaptureFixture[str]) -> None:
    dump_stacks()
    assert capsys.readouterr().out == ""


@pytest.mark.anyio
async def test_in_a_loop_coroutines_run_in_it_and_other_calls_beside_it() -> None:
    done: list[tuple[str, bool]] = []
    main = threading.current_thread()

    def note(step: str) -> None:
        done.append((step, threading.current_thread() is main))

    async def drain() -> None:
        await anyio.lowlevel.checkpoint()
        note("drain")

    async def late(step: str) -> None:
        note(step)

    report = await teardown_async(
        [("flag", lambda: note("flag"), LONG_S), ("drain", drain, LONG_S), ("late", lambda: late("late"), LONG_S)]
    )
    assert done == [("flag", False), ("drain", True), ("late", True)]
    assert report.is_clean


@pytest.mark.anyio
async def test_in_a_loop_what_fails_or_hangs_is_left_behind_too(gate: Gate) -> None:
    done: list[str] = []
    stubborn_task: list[asyncio.Task[Any] | None] = []

    async def hangs() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            done.append("cancelled")

    async def bad() -> None:
        raise ValueError

    async def stubborn() -> None:
        stubborn_task.append(asyncio.current_task())
        while not gate.opened.is_set():
            try:
                await anyio.sleep(LONG_S)
            except asyncio.CancelledError:
                done.append("asked")
                if done.count("asked") == 2:
                    return

    report = await teardown_async(
        [
            ("hangs", hangs, SHORT_S),
            ("bad", bad, LONG_S),
            ("stuck", gate.hang, SHORT_S),
            ("worse", fails, LONG_S),
            ("stubborn", stubborn, SHORT_S),
            ("after", lambda: done.append("after"), LONG_S),
        ],
        dump=gate.dump,
    )
    assert [step.outcome.value for step in report.steps] == ["hung", "failed", "hung", "failed", "hung", "done"]
    assert done == ["cancelled", "asked", "after"]
    assert gate.dumps == 3
    (task,) = filter(None, stubborn_task)
    task.cancel()
    await task


@pytest.mark.anyio
@pytest.mark.parametrize("how", ["asyncio", "anyio"])
async def test_cancelled_it_still_gives_every_step_its_turn(how: str) -> None:
    done: list[str] = []
    began = asyncio.Event()
    go_on = asyncio.Event()

    async def first() -> None:
        began.set()
        await go_on.wait()
        done.append("first")

    async def ends() -> None:
        await teardown_async([("first", first, LONG_S), ("second", lambda: done.append("second"), LONG_S)])
        await anyio.lowlevel.checkpoint()
        done.append("went on")

    if how == "asyncio":
        task = asyncio.ensure_future(ends())
        await began.wait()
        task.cancel()
        await asyncio.sleep(0)
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task
    else:
        async with anyio.create_task_group() as group:
            group.start_soon(ends)
            await began.wait()
            group.cancel_scope.cancel()
            go_on.set()
    assert done == ["first", "second"]
