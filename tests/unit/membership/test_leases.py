"""When a lease is over, and when a watcher reads again."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ucxx_transport.errors import ConfigError
from ucxx_transport.membership.leases import MAX_TTL_S, checked_ttl_s, is_over, pause_s, whole_seconds

times = st.floats(min_value=0, max_value=1e9, allow_nan=False)


def test_a_time_to_live_is_a_number_above_zero() -> None:
    wrong: list[Any] = [0, -1, math.nan, math.inf, 2 * MAX_TTL_S, True, "5", None]
    for ttl_s in wrong:
        with pytest.raises(ConfigError, match="ttl_s") as caught:
            checked_ttl_s(ttl_s)
        assert repr(ttl_s) in str(caught.value)


def test_whole_seconds_are_not_less_than_asked_for() -> None:
    assert [whole_seconds(ttl_s) for ttl_s in (0.001, 0.5, 1, 1.0, 1.001, 5.9, 6)] == [1, 1, 1, 1, 2, 6, 6]


def test_a_lease_is_over_at_its_deadline_and_not_before() -> None:
    assert not is_over(103.0, 102.999)
    assert is_over(103.0, 103.0)
    assert not is_over(None, 1e9)


def test_a_watcher_wakes_for_its_caller_for_a_lease_and_for_changes() -> None:
    assert pause_s(now=10, until=20, first_deadline=None, poll_s=0.05) == 0.05
    assert pause_s(now=10, until=10.01, first_deadline=None, poll_s=0.05) == pytest.approx(0.01)
    assert pause_s(now=10, until=20, first_deadline=10.02, poll_s=0.05) == pytest.approx(0.02)
    assert pause_s(now=10, until=20, first_deadline=9.0, poll_s=0.05) == 0.05  # another process is ending it
    assert pause_s(now=10, until=9, first_deadline=None, poll_s=0.05) == 0.0


@given(now=times, until=times, first_deadline=st.none() | times, poll_s=st.floats(min_value=0.001, max_value=10))
def test_a_pause_is_never_negative_nor_too_long(
    now: float, until: float, first_deadline: float | None, poll_s: float
) -> None:
    pause = pause_s(now=now, until=until, first_deadline=first_deadline, poll_s=poll_s)
    assert 0 <= pause <= poll_s
    assert pause <= max(0.0, until - now)
    if first_deadline is not None and first_deadline > now:
        assert pause <= first_deadline - now
