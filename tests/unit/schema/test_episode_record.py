from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import msgpack
import pytest

from tests.support.rows import row
from ucxx_transport.errors import ConfigError, ProtocolError
from ucxx_transport.schema import SlotRef
from ucxx_transport.schema.episode_record import EpisodeRecord, RewardSummary, form_of

REF = SlotRef(ring_id=bytes(16), ring_name="r", slot=1, generation=2, nbytes=3, host_id="h", meta={"k": 1})
FULL = EpisodeRecord(
    worker_id="worker-0",
    sequence=7,
    ref=REF,
    episode_length=500,
    rewards=RewardSummary(total=10.0, mean=0.02, least=-1.0, most=1.0),
    policy_version=-3,
)
DROPPED = EpisodeRecord(worker_id="w", sequence=0, dropped="RingFullError: no slot")

MALFORMED: dict[str, list[Any]] = {
    "worker_id": [None, "", 7, "a\n", "x" * 129],
    "sequence": [None, -1, True, 1.0, 1 << 64],
    "episode_length": [-1, True, 0.5, "1"],
    "policy_version": [True, 0.5, "1", 1 << 63, -(1 << 63) - 1],
    "ref": ["text", [], {"version": 1}],
    "rewards": ["text", [], {"sum": 1.0}, {"sum": True, "mean": 1.0, "min": 1.0, "max": 1.0}],
}


@pytest.mark.parametrize("record", [FULL, DROPPED])
def test_a_record_travels_as_json_and_as_msgpack(record: EpisodeRecord) -> None:
    assert EpisodeRecord.from_dict(json.loads(json.dumps(record.to_dict()))) == record
    assert EpisodeRecord.from_dict(msgpack.unpackb(msgpack.packb(record.to_dict()))) == record


@pytest.mark.parametrize("number", [lambda text: int(float(text)), float])
def test_a_record_survives_a_json_whose_numbers_are_doubles(number: Any) -> None:
    text = json.dumps(FULL.to_dict()).replace("10.0", "10").replace("1.0", "1")  # as JavaScript writes them
    assert EpisodeRecord.from_dict(json.loads(text, parse_int=number)) == FULL


def test_a_record_is_known_among_other_values() -> None:
    assert form_of(FULL.to_dict()) is not None
    others: list[object] = [{}, {"ref": 1}, [], "ucxx_transport", None, b"{", '{"ucxx_transport"', '{"a": "ring_id"}']
    assert not any(form_of(other) for other in others)


def test_what_is_malformed_is_refused_by_name() -> None:
    for field, value in ((field, value) for field, values in MALFORMED.items() for value in values):
        with row(field=field, value=value):
            with pytest.raises(ProtocolError) as caught:
                EpisodeRecord.from_dict({**FULL.to_dict(), field: value})
            assert field in str(caught.value) or field in {"ref", "rewards"}


def test_another_version_is_refused() -> None:
    rows: list[object] = [0, 2, None, True, "1"]
    for version in rows:
        with row(version=version), pytest.raises(ProtocolError, match="format version"):
            EpisodeRecord.from_dict({**FULL.to_dict(), "ucxx_transport": version})


def test_a_field_that_is_missing_is_named() -> None:
    for key in list(FULL.to_dict()):
        with row(key=key):
            form = FULL.to_dict()
            del form[key]
            with pytest.raises(ProtocolError, match=key):
                EpisodeRecord.from_dict(form)


def test_a_field_too_many_is_named() -> None:
    with pytest.raises(ProtocolError, match="surprise"):
        EpisodeRecord.from_dict({**FULL.to_dict(), "surprise": 1})


def test_a_record_has_a_reference_or_a_reason() -> None:
    rows: list[dict[str, Any]] = [{}, {"ref": REF, "dropped": "why"}, {"dropped": ""}, {"dropped": "x" * 1001}]
    for facts in rows:
        with row(facts=facts), pytest.raises(ConfigError, match="dropped"):
            EpisodeRecord(worker_id="w", sequence=0, **facts)


def test_a_summary_is_of_finite_floats() -> None:
    rows: list[Any] = [float("nan"), float("inf"), True, "1", None]
    for value in rows:
        with row(value=value):
            summary = RewardSummary(total=0.0, mean=0.0, least=value, most=0.0)
            with pytest.raises(ConfigError, match="rewards must be"):
                replace(FULL, rewards=summary)
            with pytest.raises(ProtocolError, match="rewards must be"):
                EpisodeRecord.from_dict({**FULL.to_dict(), "rewards": summary.to_dict()})
