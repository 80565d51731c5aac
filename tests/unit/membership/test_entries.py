"""Keys below a namespace, as stores know them."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ucxx_transport.errors import ConfigError
from ucxx_transport.membership.entries import MAX_KEY_BYTES, Namespace
from ucxx_transport.membership.store import MAX_TTL_S, checked_ttl_s

keys = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40).filter(
    lambda key: not key.startswith("/")
)


def test_keys_lie_below_the_package_and_the_namespace() -> None:
    assert Namespace("job-7").stored("sources/a") == b"/ucxx_transport/job-7/sources/a"
    assert Namespace("job-7").bounds("") == (b"/ucxx_transport/job-7/", b"/ucxx_transport/job-70")
    assert Namespace("job-7").bounds("sources/")[1] == b"/ucxx_transport/job-7/sources0"


@given(key=keys)
def test_a_key_comes_back(key: str) -> None:
    namespace = Namespace("job")
    assert namespace.key(namespace.stored(key)) == key


@given(key=keys, prefix=st.just("") | keys)
def test_the_bounds_of_a_prefix_hold_exactly_what_begins_with_it(key: str, prefix: str) -> None:
    namespace = Namespace("job")
    first, end = namespace.bounds(prefix)
    assert (first <= namespace.stored(key) < end) == key.startswith(prefix)
    assert not first <= Namespace("job0").stored(key) < end
    assert not first <= Namespace("jo").stored(key) < end


@given(one=keys, other=keys)
def test_stored_keys_have_the_order_of_the_keys(one: str, other: str) -> None:
    namespace = Namespace("job")
    assert (namespace.stored(one) < namespace.stored(other)) == (one < other)


@pytest.mark.parametrize("key", ["", "/a", "\ud800", "ü" * (MAX_KEY_BYTES // 2) + "x"])
def test_what_is_no_key_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match="key"):
        Namespace("job").stored(key)


def test_a_time_to_live_is_a_number_above_zero() -> None:
    wrong: list[Any] = [0, -1, math.nan, math.inf, 2 * MAX_TTL_S, True, "5", None]
    for ttl_s in wrong:
        with pytest.raises(ConfigError, match="ttl_s") as caught:
            checked_ttl_s(ttl_s)
        assert repr(ttl_s) in str(caught.value)
