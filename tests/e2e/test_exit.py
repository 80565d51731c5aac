"""Processes that end without a word: nothing hangs, nothing is left, nobody else is hurt."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import psutil
import pytest

from tests.e2e.programs.exits import OBJECTS
from tests.support.programs import ROOT, program
from tests.support.rows import row
from tests.support.served_ring import client_of, served_ring
from tests.support.waiting import wait_until
from ucxx_transport import SlotRef, SlotState
from ucxx_transport.ring.segment import segment_path


def segment_exists(name: str) -> bool:
    return segment_path(name).exists()


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid)


@pytest.mark.parametrize("mode", ["process", "thread"])
def test_worker_that_forgets_to_stop_ends_well_and_takes_everything_along(mode: str) -> None:
    with program("forgetful", f"worker-{mode}") as worker:
        facts = worker.hear()
        with client_of() as client, client.read(SlotRef.from_bytes(bytes.fromhex(facts["ref"]))) as payload:
            assert bytes(payload.buffer) == bytes(1000)
            worker.end_input()
            assert worker.wait() == 0
        assert not segment_exists(facts["ring"])
        if mode == "process":
            wait_until(lambda: all(map(gone, facts["servers"])), 60)


@pytest.mark.parametrize("kind", ["sync", "async", "feed"])
def test_trainer_that_forgets_to_close_ends_well_and_its_payload_counts(kind: str) -> None:
    with served_ring() as served:
        ref = served.ring.write_raw(bytes(500))
        with program("forgetful", f"trainer-{kind}") as trainer:
            assert trainer.ask(ref=ref.to_bytes().hex()) == {"nbytes": 500}
            assert trainer.wait() == 0
        wait_until(lambda: served.ring.slot_state(ref.slot) is SlotState.FREE, 60)
        wait_until(lambda: served.server.statistics().total("connections") == 0, 60)


@pytest.mark.parametrize("mode", ["process", "thread"])
def test_ctrl_c_ends_a_worker_and_its_server(mode: str) -> None:
    with program("forgetful", f"worker-{mode}") as worker:
        facts = worker.hear()
        os.killpg(worker.pid, signal.SIGINT)
        assert worker.wait() == -signal.SIGINT
        wait_until(lambda: not segment_exists(facts["ring"]), 60)
        if mode == "process":
            wait_until(lambda: all(map(gone, facts["servers"])), 60)


STATUS = {"falls-off": 0, "reads-on": 0, "raises": 1, "exits": 3, "exits-loop": 3, "interrupted": -2, "terminated": -15}
"""How a program ends by itself; see `programs.exits`."""

OWN_WORDS = {"raises": ["ValueError: the program's own"], "interrupted": ["KeyboardInterrupt"]}


def check_that_it_ends_by_itself(end: str, last: str, folder: Path, *names: str) -> None:
    """With its own status and its own traceback, whatever it has open and does in its last moments."""
    words = [sys.executable, "-m", "tests.e2e.programs.exits", end, last, f"local://{folder}/{end}-{last}.db", *names]
    with row(end=end, last=last, objects=names):
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == STATUS[end], done.stderr
        last_lines = re.findall(r"^Traceback .*\n(?:[ ].*\n)+(.*)$", done.stderr, re.MULTILINE)
        assert [line.rstrip() for line in last_lines] == OWN_WORDS.get(end, []), done.stderr
        assert not re.search("ignored in|RuntimeError|ExceptionGroup|Fatal|teardown_(failed|hung)", done.stderr), (
            done.stderr
        )
        assert ("closed in __del__" in done.stderr) == (last == "deleted"), done.stderr


def test_program_with_everything_open_ends_as_it_would_without_us(tmp_path: Path) -> None:
    rows = [
        ("falls-off", "deleted"),
        ("falls-off", "made-late"),
        ("falls-off", "made-beside"),
        ("reads-on", "nothing"),
        ("raises", "used-late"),
        ("exits", "closed-first"),
        ("exits-loop", "used-first"),
        ("interrupted", "closed-late"),
        ("terminated", "nothing"),
    ]
    with ThreadPoolExecutor(3) as pool:
        for ended in [pool.submit(check_that_it_ends_by_itself, *each, tmp_path) for each in rows]:
            ended.result()


@pytest.mark.exhaustive
def test_each_object_alone_ends_with_its_program(tmp_path: Path) -> None:
    lasts = ("nothing", "used-first", "used-late", "closed-first", "closed-late", "deleted", "made-late", "made-beside")
    with ThreadPoolExecutor(3) as pool:
        rows = [
            (end, last, tmp_path / name, name)
            for name, last in product(OBJECTS, lasts)
            for end in ("falls-off", "exits")
        ]
        for each in {folder for _, _, folder, _ in rows}:
            each.mkdir()
        for ended in [pool.submit(check_that_it_ends_by_itself, *each) for each in rows]:
            ended.result()
