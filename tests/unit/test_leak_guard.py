"""The guard itself: each kind of leak is seen, worded, and forgiven once it goes away."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.support import leaks
from tests.support.leaks import leaks_since, snapshot
from tests.support.segment_folder import SegmentFolder
from ucxx_transport.ring.segment import segment_path


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaks, "SETTLE_S", 0.05)


def test_nothing_new_is_no_leak() -> None:
    assert leaks_since(snapshot()) == {}


def test_an_open_descriptor_is_named_with_what_it_points_at(tmp_path: Path) -> None:
    before = snapshot()
    with (tmp_path / "left_open").open("wb"):
        (found,) = leaks_since(before)["descriptors"]
    assert "left_open" in found


def test_a_running_thread_is_named() -> None:
    before = snapshot()
    end = threading.Event()
    thread = threading.Thread(target=end.wait, name="forgotten")
    thread.start()
    found = leaks_since(before)
    end.set()
    thread.join()
    assert "forgotten" in found["threads"][0]
    assert leaks_since(before) == {}


def test_a_child_is_named_with_its_command() -> None:
    before = snapshot()
    with subprocess.Popen([sys.executable, "-c", "input()", "a child"], stdin=subprocess.PIPE) as child:
        found = leaks_since(before, allowed=["descriptors"])
        child.communicate(b"\n")
    assert "a child" in found["processes"][0]


def test_an_orphan_of_a_dead_child_is_found_too() -> None:
    before = snapshot()
    parent = (
        "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'input()', 'an orphan']); print(flush=True)"
    )
    reader, writer = os.pipe()
    with os.fdopen(writer, "wb") as keeps_the_orphan:
        try:
            subprocess.run([sys.executable, "-c", parent], stdin=reader, stdout=subprocess.DEVNULL, check=True)
        finally:
            os.close(reader)
        found = leaks_since(before, allowed=["descriptors"])
        keeps_the_orphan.write(b"\n")
    assert "an orphan" in found["processes"][0]


def test_a_segment_in_this_run_s_folder_is_found_and_a_neighbour_s_is_not() -> None:
    before = snapshot()
    neighbour = SegmentFolder("neighbour")
    mine, foreign = segment_path("guard"), segment_path("guard", neighbour.path)
    mine.touch()
    foreign.touch()
    try:
        assert leaks_since(before, allowed=["descriptors"])["segments"] == [mine.name]
    finally:
        mine.unlink()
        neighbour.remove()


def test_the_folder_of_a_killed_run_is_removed_by_the_next_and_a_living_run_s_is_not() -> None:
    living = SegmentFolder("living")
    program = (
        "import os, signal; from tests.support.segment_folder import SegmentFolder;"
        "print(SegmentFolder('killed').path, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    killed = Path(done.stdout.strip())
    assert killed.is_dir()
    try:
        SegmentFolder("next").remove()
        assert living.path.exists()
        assert not killed.exists()
    finally:
        living.remove()


def test_what_is_allowed_is_not_looked_at(tmp_path: Path) -> None:
    before = snapshot()
    with (tmp_path / "left_open").open("wb"):
        assert leaks_since(before, allowed=["descriptors"]) == {}
