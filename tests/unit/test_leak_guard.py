"""The guard itself: each kind of leak is seen, worded, and forgiven once it goes away."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support import leaks
from tests.support.leaks import leaks_since, snapshot
from ucxx_transport.ring.layout import CREATOR_PID_WORD, WORD_BYTES


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


def test_a_segment_of_a_dead_process_is_found_and_a_neighbours_is_not() -> None:
    before = snapshot()
    mine, foreign = (Path("/dev/shm", f"ucxx_transport-guard-{os.getpid()}-{name}") for name in ("mine", "foreign"))
    with kept(mine, creator=0), kept(foreign, creator=1):
        assert leaks_since(before, allowed=["descriptors"])["segments"] == [mine.name]


@contextmanager
def kept(path: Path, *, creator: int) -> Iterator[None]:
    """A file that names its creator, under the lock that keeps sweeps of other programs away from it."""
    with path.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(bytes(CREATOR_PID_WORD * WORD_BYTES) + creator.to_bytes(WORD_BYTES, "little"))
        file.flush()
        try:
            yield
        finally:
            path.unlink()


def test_what_is_allowed_is_not_looked_at(tmp_path: Path) -> None:
    before = snapshot()
    with (tmp_path / "left_open").open("wb"):
        assert leaks_since(before, allowed=["descriptors"]) == {}
