from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ucxx_transport import ProtocolError, SlotRef
from ucxx_transport.schema.episode_record import EpisodeRecord
from ucxx_transport.trainer.loss_policy import is_ours, key_of, record_of

REF = SlotRef(ring_id=bytes(16), ring_name="r", slot=3, generation=7, nbytes=1, host_id="h")
RECORD = EpisodeRecord(worker_id="w", sequence=5, ref=REF, policy_version=2)


@pytest.mark.parametrize("output", [RECORD, RECORD.to_dict()])
def test_a_record_is_ours_in_either_form(output: object) -> None:
    assert is_ours(output)
    assert record_of(output) == RECORD
    assert key_of(output, RECORD) == REF.name


def test_a_reference_alone_is_an_episode_of_which_only_the_place_is_known() -> None:
    assert is_ours(REF)
    assert record_of(REF) == EpisodeRecord(worker_id="r", sequence=7, ref=REF)


@pytest.mark.parametrize(
    "output",
    [None, "text", 3, {}, {"obs": np.zeros(3)}, [RECORD], np.zeros(3), SimpleNamespace(ucxx_transport=1), {1: 2}],
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
