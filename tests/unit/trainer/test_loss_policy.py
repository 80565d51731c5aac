from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.support.rows import row
from ucxx_transport import ProtocolError, SlotRef
from ucxx_transport.schema.episode_record import EpisodeRecord
from ucxx_transport.trainer.loss_policy import is_ours, key_of, record_of

REF = SlotRef(ring_id=bytes(16), ring_name="r", slot=3, generation=7, nbytes=1, host_id="h")
RECORD = EpisodeRecord(worker_id="w", sequence=5, ref=REF, policy_version=2)


def test_a_record_is_ours_in_every_form_and_in_a_rollout() -> None:
    form = RECORD.to_dict()
    for output in (RECORD, form, json.dumps(form), SimpleNamespace(output=form), {"completion": RECORD}):
        with row(output=output):
            assert is_ours(output)
            assert record_of(output) == RECORD
            assert key_of(output, RECORD) == REF.name


def test_a_reference_alone_is_an_episode_of_which_only_the_place_is_known() -> None:
    for output in (REF, RECORD.to_dict()["ref"], REF.to_bytes()):
        with row(output=output):
            assert is_ours(output)
            assert record_of(output) == EpisodeRecord(worker_id="r", sequence=7, ref=REF)


def test_what_was_a_record_and_cannot_be_read_back_is_malformed_rather_than_passed_on() -> None:
    form = RECORD.to_dict()
    text = json.dumps(form)
    cut = (text[:-1], text[:200].encode(), json.dumps(form, indent=1)[:99], f"{text}\n{text}", str(text.encode()))
    for output in (str(form), repr(RECORD), str(form["ref"]), str(REF), [RECORD], (form, form), *cut):
        with row(output=output):
            assert is_ours(output)
            assert isinstance(record_of(output), ProtocolError)


def test_what_says_why_a_record_could_not_be_read_is_taken_as_it_is() -> None:
    error = ProtocolError("what?")
    assert record_of(error) is error


@pytest.mark.parametrize(
    "output",
    [
        None,
        "text",
        3,
        {},
        {"obs": np.zeros(3)},
        [3],
        b"{",
        '{"ucxx_transport"',
        np.zeros(3),
        SimpleNamespace(ucxx_transport=1),
        {1: 2},
    ],
)
def test_anything_else_is_not(output: Any) -> None:
    assert not is_ours(output)


@pytest.mark.parametrize(
    "wrong", [{"ref": 3}, {"worker_id": ""}, {"ucxx_transport": 99}, {"more": 1}], ids=lambda wrong: next(iter(wrong))
)
def test_what_claims_to_be_a_record_and_is_none_is_malformed(wrong: dict[str, object]) -> None:
    output = {**RECORD.to_dict(), **wrong}
    assert is_ours(output)
    error = record_of(output)
    assert isinstance(error, ProtocolError)
    assert key_of(output, error) != key_of(dict(output), error)


def test_an_episode_without_a_payload_is_found_by_its_own_record_alone() -> None:
    dropped = EpisodeRecord(worker_id="w", sequence=6, dropped="why")
    first, second = dropped.to_dict(), dropped.to_dict()
    assert key_of(first, dropped) == key_of(first, dropped) != key_of(second, dropped)
