"""What is compared with what, and what is made of it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from bench.core.command import QUESTIONS, chosen_questions
from bench.core.figures import Figures, Row, percentile_us
from bench.core.payloads import PayloadPattern
from bench.targets import TARGETS, Target, Verdict, judge
from tests.support.rows import row
from ucxx_transport import ConfigError

RATIO = next(target for target in TARGETS if len(target.rows) == 2 and target.sense == "≥")


def rows_for(target: Target, *values: list[float]) -> list[Row]:
    return [
        Row(question=target.question, subject=subject, case=case, figures={target.figure: of})
        for (subject, case), of in zip(target.rows, values, strict=True)
    ]


def verdict(target: Target, rows: list[Row], **more: Any) -> Verdict:
    return next(found for found in judge(rows, [target.question], **more) if found.target is target)


def test_ratios_pair_neighbours_in_time_rather_than_medians() -> None:
    found = verdict(RATIO, rows_for(RATIO, [10.0, 40.0, 20.0], [1.0, 8.0, 1.0]))
    assert found.figure is not None
    assert (found.figure.median, found.figure.min, found.figure.max) == (10.0, 5.0, 20.0)


def test_a_target_is_met_at_its_bound_and_missed_beyond_it() -> None:
    for target in TARGETS:
        if len(target.rows) != 2:
            continue
        beyond = target.bound * (0.99 if target.sense == "≥" else 1.01)
        for value, word in ((target.bound, "met"), (beyond, "missed")):
            with row(target=target, value=value):
                assert verdict(target, rows_for(target, [value], [1.0]), cores=target.cores[0]).word == word


def test_what_was_not_measured_says_why_and_is_neither_met_nor_missed() -> None:
    (subject, case), _ = RATIO.rows
    skipped = [Row(question=RATIO.question, subject=subject, case=case, skipped="not installed")]
    for rows, more, reason in (
        ([], {}, "not part of this run"),
        ([], {"reasons": {RATIO.question: "no GPU"}}, "no GPU"),
        (skipped, {}, "not installed"),
    ):
        with row(rows=rows, more=more):
            found = verdict(RATIO, rows, **more)
            assert (found.word, found.figure) == ("not measured here", None)
            assert reason in found.reason


def test_what_peers_reach_in_the_same_run_is_shown_beside_a_target() -> None:
    target = next(target for target in TARGETS if target.beside)
    [(subject, case)] = target.rows
    measured, skipped = target.beside[:2]
    rows = [
        Row(question=target.question, subject=subject, case=case, figures={target.figure: [target.bound]}),
        Row(question=target.question, subject=measured, case=case, figures={target.figure: [0.1, 0.3, 0.2]}),
        Row(question=target.question, subject=skipped, case=case, skipped="not installed"),
    ]
    found = verdict(target, rows)
    assert {peer: spread.median for peer, spread in found.beside.items()} == {measured: 0.2}
    assert found.word == "met", "whatever the peers reach"
    assert found.to_dict()["beside"] == {measured: {"median": 0.2, "min": 0.1, "max": 0.3}}


def test_a_target_of_larger_machines_is_not_held_against_a_small_one() -> None:
    large = next(target for target in TARGETS if 2 not in target.cores)
    found = verdict(large, rows_for(large, [1.0], [1.0]), cores=2)
    assert (found.word, found.reason) == ("not measured here", "asked of other machines than one of 2 cores")
    assert verdict(large, rows_for(large, [1.0], [1.0]), cores=large.cores[0]).word == "missed"


def test_microseconds_are_scaled_to_a_call_of_70_ns() -> None:
    of = Row(question="q", case="", subject="s", figures={"us": [10.0, 30.0], "call_ns": [35.0, 140.0]})
    assert Figures([of], {}).scaled(of, "us").max == 20.0
    assert Figures([of], {}).scaled(of, "us").min == 15.0


def test_targets_name_a_question_that_there_is_and_verdicts_go_into_json() -> None:
    assert set(QUESTIONS) - {target.question for target in TARGETS} == {"stores", "steps"}
    for found in judge(rows_for(RATIO, [1.0], [2.0]), QUESTIONS):
        assert json.loads(json.dumps(found.to_dict()))["verdict"] == found.word


def test_percentile_is_the_nearest_rank() -> None:
    latencies_ns = [1000 * number for number in range(100, 0, -1)]
    assert (percentile_us(latencies_ns, 0.5), percentile_us(latencies_ns, 0.99)) == (50.0, 99.0)
    assert percentile_us([7000], 0.99) == 7.0


def test_questions_are_chosen_by_name_and_asked_in_their_order() -> None:
    assert chosen_questions([]) == list(QUESTIONS)
    assert chosen_questions(["ring,read", "idle"]) == ["read", "ring", "idle"]
    with pytest.raises(ConfigError, match="read, batch"):
        chosen_questions(["banana"])


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
