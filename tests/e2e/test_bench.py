"""The benchmarks measure what they say: tiny runs of the real commands, and a verification that sees a wrong byte."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.core.payloads import PayloadPattern
from bench.core.results import FIGURES, Result, Round, paired_ratio, percentile_us
from bench.targets import check_targets

ROOT = Path(__file__).resolve().parents[2]
SIZES = [4096, 65536]
OWN_SUBJECTS = {
    "view_async": "view",
    "view_sync": "view",
    "view_read_sync": "view",
    "copy_async": "copy",
    "copy_sync": "copy",
    "ucx_shm_async": "ucx",
    "ucx_shm_sync": "ucx",
    "ucx_tcp_async": "ucx",
    "ucx_tcp_sync": "ucx",
    "memcpy": "memcpy",
}
pytestmark = pytest.mark.exhaustive

TINY = ["--sizes", "4KiB,64KiB", "--rounds", "1", "--turn-s", "0", "--max-slots", "8"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False, timeout=240
    )


def assert_measured(document: dict[str, Any], subjects: dict[str, str], sizes: list[int]) -> None:
    assert document["sizes_bytes"] == sizes
    assert {subject["name"] for subject in document["subjects"]} == set(subjects)
    assert {"cpu", "cores", "kernel", "python", "versions", "date"} <= set(document["host"])
    assert set(FIGURES) <= set(document["units"])
    assert {"server", "client"} <= set(document["settings"])
    measured = {(result["subject"], result["size_bytes"]): result for result in document["results"]}
    assert set(measured) == {(name, size) for name in subjects for size in sizes}
    for (name, size), result in measured.items():
        (entry,) = result["rounds"]
        assert entry["transport"] == subjects[name]
        assert entry["verified"] == entry["reads"] == document["slots"][str(size)]
        assert 0 < entry["p50_us"] <= entry["p99_us"]
        assert result["summary"]["gb_per_s"]["median"] == entry["gb_per_s"] > 0


def test_short_form_measures_every_subject_and_verifies_every_byte() -> None:
    done = run("-m", "ucxx_transport", "bench", "--json", *TINY)
    assert done.returncode == 0, done.stderr
    assert_measured(json.loads(done.stdout), OWN_SUBJECTS, SIZES)


def test_throughput_adds_its_peers_and_the_check_fails_where_a_target_was_not_measured(tmp_path: Path) -> None:
    done = run("bench/throughput.py", *TINY, "--sizes", "4KiB", "--idle-s", "0.2", "--check", "--out", str(tmp_path))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "not measured" in done.stdout
    document = json.loads((tmp_path / "throughput.json").read_text())
    assert_measured(document, OWN_SUBJECTS | {"naive": "ucxx, stock endpoints", "socket": "socket"}, SIZES[:1])
    assert (document["idle_cpu"]["ports"], document["idle_cpu"]["connections"]) == (4, 16)
    assert [entry["mode"] for entry in document["busy_worker"]] == ["process", "thread"]
    assert {target["met"] for target in document["targets"] if target["figure"] is None} == {False}
    assert (tmp_path / "throughput.png").read_bytes().startswith(b"\x89PNG")


def test_trainer_takes_the_ways_it_is_told_and_counts_what_it_could_not_measure_as_not_met(tmp_path: Path) -> None:
    ways = ["view_ahead", "ucx_on_demand", "queue"]
    options = ("--sizes", "1MiB", "--rounds", "1", "--turn-s", "0", "--check", "--out", str(tmp_path))
    done = run("bench/trainer.py", *options, "--ways", ",".join(ways))
    assert done.returncode == 1, done.stdout + done.stderr
    document = json.loads((tmp_path / "trainer.json").read_text())
    assert [(result["way"], result["size_bytes"]) for result in document["results"]] == [(way, 1 << 20) for way in ways]
    for result in document["results"]:
        (turn,) = result["turns"]
        assert turn["verified"] == 4 * document["batch"]
        assert turn["episodes_per_s"] > 0
        assert 0 < turn["waiting_share"] < 1
    unmeasured = [target for target in document["targets"] if target["figure"] is None]
    assert [target["met"] for target in unmeasured] == [False, False]
    assert ["Ray" in target["what"] for target in unmeasured] == [False, True]


def test_a_size_that_is_none_is_a_usage_or_settings_error() -> None:
    done = run("-m", "ucxx_transport", "bench", "--sizes", "4KiB,banana")
    assert done.returncode in (1, 2)
    assert "banana" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("wrong", ["flipped", "neighbour", "short"])
def test_verification_sees_a_payload_that_is_not_the_one_written(wrong: str) -> None:
    pattern = PayloadPattern(4096)
    came = bytearray(pattern.payload(7))
    pattern.check(7, memoryview(came))
    if wrong == "flipped":
        came[4000] ^= 1
    elif wrong == "neighbour":
        came = bytearray(pattern.payload(8))
    else:
        came = came[:-1]
    with pytest.raises(ValueError, match="payload 7"):
        pattern.check(7, memoryview(came))


def result(subject: str, size_bytes: int, rates: list[float], p50_us: float = 1.0) -> Result:
    rounds = [
        Round(
            number=number,
            reads=1,
            verified=1,
            gb_per_s=rate,
            p50_us=p50_us,
            p99_us=p50_us,
            reader_cpu_s_per_gb=0.0,
            source_cpu_s_per_gb=0.0,
            reader_cpu_us_per_read=0.0,
            source_cpu_us_per_read=0.0,
            foreign_cores=0.0,
            transport="",
        )
        for number, rate in enumerate(rates)
    ]
    return Result(subject=subject, size_bytes=size_bytes, rounds=tuple(rounds))


def test_percentile_is_the_nearest_rank() -> None:
    latencies_ns = [1000 * number for number in range(100, 0, -1)]
    assert (percentile_us(latencies_ns, 0.5), percentile_us(latencies_ns, 0.99)) == (50.0, 99.0)
    assert percentile_us([7000], 0.99) == 7.0


def test_ratios_pair_neighbours_in_time_rather_than_medians() -> None:
    slow_then_fast, beside = result("a", 1, [10.0, 40.0, 20.0]), result("b", 1, [1.0, 8.0, 1.0])
    assert paired_ratio(slow_then_fast, beside, "gb_per_s").median == 10.0


@pytest.mark.parametrize(("rate", "met"), [(8.0, True), (7.9, False)])
def test_a_target_is_met_at_its_bound_and_not_below(rate: float, *, met: bool) -> None:
    mebibyte = 1 << 20
    targets = check_targets([result("ucx_tcp_async", mebibyte, [rate]), result("naive", mebibyte, [1.0])])
    (target,) = [target for target in targets if "1 MiB" in target.what]
    assert target.met is met
