"""The demo command itself, at a reduced size: real processes, real UCX, a real SIGKILL, a real Ctrl-C."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest

from cartpole.processes import processes_left
from tests.support.exhaustive import exhaustive
from ucxx_transport.ring.segment import list_segments, sweep_orphans

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 120.0
_RUN_MARK = b"DEMO_RUN_ID="


@contextmanager
def demo(out: Path, *options: str, folder: Path = ROOT) -> Iterator[subprocess.Popen[str]]:
    """The command, in a process group of its own; killed when the test leaves early."""
    command = [sys.executable, "-m", "ucxx_transport", "demo", "--json", "--out", str(out), *options]
    with subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def finish(process: subprocess.Popen[str]) -> tuple[int, dict[str, Any], str]:
    """Exit status, the one object on standard output, and standard error."""
    output, errors = process.communicate(timeout=LIMIT_S)
    assert output.count("\n") == 1, f"more or less than one line on stdout: {output!r}\n{errors}"
    return process.returncode, json.loads(output), errors


def read_until(stream: IO[str] | None, words: str) -> str:
    """The first line that has `words` in it; the demo prints one every second, and stops by its own time limit."""
    assert stream is not None
    for line in stream:
        if words in line:
            return line
    raise AssertionError(f"the demo ended without a word of {words!r}")


def children_of(process: subprocess.Popen[str]) -> dict[int, str]:
    """Pids of the processes it started, by the run that their environment names."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    runs: dict[int, str] = {}
    for pid in map(int, children):
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        for entry in environment:
            if entry.startswith(_RUN_MARK):
                runs[pid] = entry.removeprefix(_RUN_MARK).decode()
    return runs


def rings_of(run: str) -> list[str]:
    return [info.name for info in list_segments() if info.name.startswith(f"demo-{run}-")]


@pytest.mark.parametrize(("local", "transports"), [("mixed", {"view", "ucx"}), exhaustive("off", {"ucx"})])
def test_training_goes_on_after_a_worker_is_killed_and_nothing_is_left(
    tmp_path: Path, local: str, transports: set[str]
) -> None:
    out = tmp_path / "curve.png"
    with demo(out, "--local", local, "--goal", "none", "--episodes", "80", "--seconds", str(LIMIT_S)) as process:
        status, summary, errors = finish(process)
    assert status == 0, f"{summary['problems']}\n{errors}"
    assert summary["ok"]
    assert summary["reason"] == "episodes"
    assert summary["episodes"] >= 80
    assert summary["checksums"] == {"verified": summary["episodes"], "mismatched": 0}
    assert {reads["transport"] for reads in summary["reads"]} == transports
    assert sum(reads["reads"] for reads in summary["reads"]) == summary["episodes"]
    assert sum(reads["nbytes"] for reads in summary["reads"]) == summary["payload_bytes"] > 0
    assert summary["kill"]["episodes_of_its_replacement"] > 0
    assert [worker["state"] for worker in summary["workers"]] == ["stopped", "killed", "stopped"]
    assert summary["rings"]["written"] > 0
    assert summary["segments_left"] == summary["processes_left"] == []
    assert out.read_bytes().startswith(b"\x89PNG")


@pytest.mark.exhaustive
def test_workers_are_found_in_a_store_and_a_replacement_joins_late_while_training_goes_on(tmp_path: Path) -> None:
    store = f"local://{tmp_path}/store.db"
    options = ("--store", store, "--goal", "none", "--episodes", "150", "--seconds", str(LIMIT_S))
    with demo(tmp_path / "curve.png", *options) as process:
        status, summary, errors = finish(process)
    assert status == 0, f"{summary['problems']}\n{errors}"
    assert summary["store"] == {"url": store, "joined": 3, "left": 1}
    assert summary["kill"]["episodes_of_others_meanwhile"] > 0
    assert summary["kill"]["episodes_of_its_replacement"] > 0
    assert summary["checksums"] == {"verified": summary["episodes"], "mismatched": 0}
    assert summary["segments_left"] == summary["processes_left"] == []


@pytest.mark.exhaustive
def test_an_installed_package_runs_it_from_its_own_folder(tmp_path: Path) -> None:
    package, without_bytecode = tmp_path / "ucxx_transport", shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "ucxx_transport", package, ignore=without_bytecode)
    shutil.copytree(ROOT / "examples/cartpole", package / "_programs/cartpole", ignore=without_bytecode)
    with demo(tmp_path / "curve.png", "--goal", "none", "--episodes", "40", folder=tmp_path) as process:
        status, summary, errors = finish(process)
    assert status == 0, f"{summary['problems']}\n{errors}"
    assert (package / "_programs/cartpole/__pycache__").is_dir() or sys.dont_write_bytecode


@pytest.mark.exhaustive
def test_a_goal_out_of_reach_is_said_and_a_worker_that_dies_meanwhile_is_replaced(tmp_path: Path) -> None:
    with demo(tmp_path / "curve.png", "--goal", "100000", "--seconds", "15", "--no-kill") as process:
        started = read_until(process.stderr, "started as pid")
        read_until(process.stderr, "mean return")
        os.kill(int(started.partition("started as pid ")[2].partition(",")[0]), signal.SIGKILL)
        status, summary, _ = finish(process)
    assert status == 1
    assert summary["reason"] == "time"
    assert "the goal of 100000 was not reached within 15 s" in summary["problems"][0]
    assert [worker["state"] for worker in summary["workers"]] == ["killed", "stopped", "stopped"]
    assert [worker["worker"] for worker in summary["workers"]] == [0, 1, 0]
    assert summary["segments_left"] == summary["processes_left"] == []


@pytest.mark.parametrize(
    "words", [exhaustive(": started", id="while starting"), pytest.param("mean return", id="while training")]
)
def test_ctrl_c_exits_130_and_leaves_nothing_behind(tmp_path: Path, words: str) -> None:
    with demo(tmp_path / "curve.png", "--goal", "none", "--episodes", "1000000") as process:
        read_until(process.stderr, words)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the whole foreground group
        status, summary, errors = finish(process)
    assert status == 130, errors
    assert summary["reason"] == "interrupted", summary["problems"]
    assert summary["segments_left"] == summary["processes_left"] == []


@pytest.mark.exhaustive
def test_workers_die_with_the_trainer_and_their_rings_are_swept(tmp_path: Path) -> None:
    with demo(tmp_path / "curve.png", "--goal", "none", "--episodes", "1000000") as process:
        read_until(process.stderr, "mean return")
        children = children_of(process)
        (run,) = set(children.values())
        assert len(children) >= 2
        assert len(rings_of(run)) >= 2
        process.kill()
        process.wait(LIMIT_S)
        assert processes_left(run, limit_s=20.0) == []
    sweep_orphans()
    assert rings_of(run) == []
