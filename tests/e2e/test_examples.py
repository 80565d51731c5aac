"""The scripts of examples/, at reduced size."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


NEEDS_TORCH = pytest.mark.skipif(find_spec("torch") is None, reason="torch is not installed")


def run(example: str, *options: str) -> str:
    done = subprocess.run(
        [sys.executable, f"examples/{example}.py", *options],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # other tests have the other cores
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def last_number(output: str) -> float:
    found = re.findall(r"last (?:ten )?batches: (\d+\.\d+)", output)
    assert found, output
    return float(found[-1])


def test_groups_of_completions_are_learnt_from_and_old_ones_dropped() -> None:
    output = run("llm_groups", "--tensor-bytes", "256KiB", "--steps", "120", "--max-staleness", "3")
    assert last_number(output) > 0.3  # at random: 0.03
    assert set(re.findall(r"'(\w+)'", output)) == {"too_old"}


@NEEDS_TORCH
def test_a_torch_policy_learns() -> None:
    output = run("torch_policy", "--env", "CartPole-v1", "--steps", "50", "--batch", "8")
    assert last_number(output) > 30  # at random: 22
    assert "lost {}" in output


@NEEDS_TORCH
@pytest.mark.exhaustive
def test_a_torch_policy_ends_whose_last_weights_no_worker_takes() -> None:
    """They are 230 KB, and a pipe holds 64 KiB."""
    assert "mean return" in run("torch_policy", "--units", "8192", "--steps", "2", "--batch", "2")


@NEEDS_TORCH
@pytest.mark.parametrize(
    ("on_missing", "sizes"),
    [("refill", "{0: 1, 4: 29}"), pytest.param("shrink", "{0: 1, 3: 10, 4: 19}", marks=pytest.mark.exhaustive)],
)
def test_ranks_that_lose_different_episodes_do_as_many_passes(on_missing: str, sizes: str) -> None:
    output = run("data_parallel", "--steps", "30", "--on-missing", on_missing)
    assert f"rank 0: batches by size {sizes}, lost {{}}, off by 0.0" in output
    assert f"rank 1: batches by size {sizes}, lost {{'too_old': 14}}, off by 0.0" in output
