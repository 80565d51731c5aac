from __future__ import annotations

import json
import json.decoder

import pytest

from ucxx_transport import membership
from ucxx_transport.late_names import late_names


def test_a_name_is_fetched_when_it_is_asked_for_and_kept() -> None:
    namespace: dict[str, object] = {"__name__": "json"}
    fetch, _ = late_names("json", namespace, {"decoder": ("JSONDecoder",)})
    assert "JSONDecoder" not in namespace
    assert fetch("JSONDecoder") is json.decoder.JSONDecoder
    assert namespace["JSONDecoder"] is json.decoder.JSONDecoder


def test_an_unknown_name_is_an_attribute_error_that_names_it() -> None:
    fetch, _ = late_names("json", {}, {"decoder": ("JSONDecoder",)})
    with pytest.raises(AttributeError, match=r"module 'json' has no attribute 'nonsense'"):
        fetch("nonsense")
    with pytest.raises(ImportError):
        exec("from ucxx_transport.membership import nonsense", {})  # noqa: S102 - as any caller would write it


def test_names_not_fetched_yet_are_listed() -> None:
    _, names = late_names("json", {"here": 1}, {"decoder": ("JSONDecoder",), "encoder": ("JSONEncoder",)})
    assert names() == ["JSONDecoder", "JSONEncoder", "here"]


def test_every_public_name_of_the_registry_is_to_be_had() -> None:
    assert set(membership.__all__) <= set(dir(membership))
    for name in membership.__all__:
        assert getattr(membership, name).__name__ == name
