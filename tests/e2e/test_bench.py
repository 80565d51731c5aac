"""The benchmarks measure what they say: tiny runs of the real command, of every question."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.core.command import QUESTIONS
from bench.targets import TARGETS
from tests.support.rows import row

ROOT = Path(__file__).resolve().parents[2]
TINY = ["--quick", "--rounds", "1", "--turn-s", "0", "--json", "--check"]
MAY_BE_SKIPPED = ("gpu",)


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ucxx_transport", "bench", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600)


def assert_answered(done: subprocess.CompletedProcess[str], questions: tuple[str, ...]) -> dict[str, Any]:
    """What a run says is whole, and its exit status is what its verdicts say."""
    assert "Traceback" not in done.stderr, done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    assert document["failed"] == {}
    assert {"cpu", "cores", "kernel", "python", "versions", "date", "call_ns"} <= set(document["host"])
    rows = document["rows"]
    answered = {entry["question"] for entry in rows} | set(document["skipped"])
    assert answered == set(questions)
    for entry in rows:
        with row(**entry):
            assert bool(entry["figures"]) != bool(entry["skipped"])
            for figure, values in entry["figures"].items():
                assert entry["summary"][figure]["min"] <= min(values)
    targets = document["targets"]
    assert [target["question"] for target in targets] == [of.question for of in TARGETS if of.question in questions]
    assert done.returncode == int(any(target["verdict"] == "missed" for target in targets))
    return document


def test_a_question_is_answered_in_json_and_the_check_says_what_was_missed() -> None:
    document = assert_answered(bench("--only", "ring", *TINY), ("ring",))
    assert {target["verdict"] for target in document["targets"]} <= {"met", "missed"}


def test_a_question_that_there_is_not_is_a_settings_error() -> None:
    done = bench("--only", "read,banana")
    assert done.returncode == 1
    assert "banana" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.exhaustive
@pytest.mark.parametrize("question", [question for question in QUESTIONS if question != "ring"])
def test_every_question_is_answered_beside_its_peers(question: str) -> None:
    document = assert_answered(bench("--only", question, *TINY), (question,))
    assert set(document["skipped"]) <= set(MAY_BE_SKIPPED)
    for entry in document["rows"]:
        if "p50_us" in entry["figures"]:
            with row(**entry):
                (p50_us,), (p99_us,) = entry["figures"]["p50_us"], entry["figures"]["p99_us"]
                assert 0 < p50_us <= p99_us
