"""Workers of torch's `DataLoader`, by each start method, over two epochs and with few descriptors."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.namespaces import small_shared_memory
from tests.support.rows import row
from tests.support.segment_folder import VARIABLE

pytest.importorskip("torch", exc_type=ImportError)

PROGRAMS = Path(__file__).parent / "programs"
SLOW = ("spawn", "forkserver")


def test_persistent_workers_read_each_episode_once_an_epoch_whatever_starts_them() -> None:
    cases = [f"{method}:epochs" for method in ("fork", "spawn", "forkserver")]
    found, said = found_with_few_descriptors(*cases)  # of one program: importing torch takes longest
    assert "Traceback" not in said, said
    for case in cases:
        with row(case=case):
            assert found[case] == {"epochs": [[0, 1, 2, 3, 4, 5]] * 2, "states": ["FREE"]}


@pytest.mark.parametrize("method", ["fork", *(pytest.param(each, marks=pytest.mark.exhaustive) for each in SLOW)])
def test_a_trainer_that_keeps_items_needs_descriptors_unless_it_clones_or_its_workers_share_by_files(
    method: str,
) -> None:
    """By the file system: under fork a strategy of the trainer's is its workers', else it has to be set in them."""
    enough = ["kept-cloned", "kept-strategy-of-workers", *(["kept-strategy"] if method == "fork" else [])]
    few = ["kept", *(["kept-strategy"] if method != "fork" else [])]
    found, _ = found_with_few_descriptors(*(f"{method}:{case}" for case in (*enough, *few)))
    for case in enough:
        with row(case=case):
            assert found[f"{method}:{case}"] == {"numbers": True}
    for case in few:
        with row(case=case):
            assert found[f"{method}:{case}"]["error"].startswith("Too many open files")


def found_with_few_descriptors(*cases: str) -> tuple[dict[str, Any], str]:
    """What the program prints, and what it and its workers wrote to standard error."""
    few = ("bash", "-c", 'ulimit -n 128; exec "$@"', "bash")
    command = [*few, sys.executable, str(PROGRAMS / "data_loader.py"), *cases]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.exhaustive)])
def test_a_small_shared_memory_is_an_error_with_its_cause_in_the_trainer_and_nothing_waits_for_ever(
    method: str,
) -> None:
    prefix = small_shared_memory("32m")
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    expected = {
        "ring": ("ConfigError", r"a ring of \d.* does not fit /dev/shm, which has \d.* free: lower ring.slots"),
        "episode": ("ConfigError", r"an item of 2097152 bytes over in /dev/shm, which has \d+ bytes free: enlarge it"),
    }
    if method == "fork":
        # what is not looked into is torch's to drop: then the loader's `timeout` ends the wait, as the documents say
        expected["boxed"] = ("RuntimeError", "DataLoader timed out after 10 seconds")
    command = [*prefix, sys.executable, str(PROGRAMS / "little_shared_memory.py"), method, *expected]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    if method == "fork":
        assert "No space left on device" in done.stderr
    ends = json.loads(done.stdout)
    for case, (error, said) in expected.items():
        with row(case=case, ended=ends[case]):
            assert ends[case]["error"] == error
            assert re.search(said, ends[case]["said"])
