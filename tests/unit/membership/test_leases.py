"""When a lease is over, and when a watcher looks again."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ucxx_transport.errors import ConfigError
from ucxx_transport.membership.leases import (
    MAX_TTL_S,
    checked_ttl_s,
    deadline_of,
    is_over,
    left_s,
    over,
    pause_s,
    whole_seconds,
)

times = st.floats(min_value=0, max_value=1e9, allow_nan=False)


@pytest.mark.parametrize("ttl_s", [0, -1, math.nan, math.inf, 2 * MAX_TTL_S, True, "5", None])
def test_a_time_to_live_is_a_number_above_zero(ttl_s: Any) -> None:
    with pytest.raises(ConfigError, match="ttl_s"):
        checked_ttl_s(ttl_s)


def test_whole_seconds_are_not_less_than_asked_for() -> None:
    assert [whole_seconds(ttl_s) for ttl_s in (0.001, 0.5, 1, 1.0, 1.001, 5.9, 6)] == [1, 1, 1, 1, 2, 6, 6]


def test_a_lease_is_over_at_its_deadline_and_not_before() -> None:
    deadline = deadline_of(100.0, 3.0)
    assert not is_over(deadline, 102.999)
    assert is_over(deadline, 103.0)
    assert not is_over(None, 1e9)
    assert left_s(deadline, 101.0) == 2.0
    assert left_s(deadline, 200.0) == 0.0


def test_leases_end_in_the_order_of_their_deadlines() -> None:
    leases = [(1, 30.0), (2, 10.0), (3, 40.0), (4, 20.0), (5, 10.0)]
    assert over(leases, 30.0) == (2, 5, 4, 1)
    assert over(leases, 9.0) == ()
    assert over([], 9.0) == ()


def test_a_watcher_wakes_for_its_caller_for_a_lease_and_for_changes() -> None:
    assert pause_s(now=10, until=20, first_deadline=None, poll_s=0.05) == 0.05
    assert pause_s(now=10, until=10.01, first_deadline=None, poll_s=0.05) == pytest.approx(0.01)
    assert pause_s(now=10, until=20, first_deadline=10.02, poll_s=0.05) == pytest.approx(0.02)
    assert pause_s(now=10, until=20, first_deadline=9.0, poll_s=0.05) == 0.05  # it is being ended by somebody
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


@given(leases=st.lists(st.tuples(st.integers(min_value=1), times), unique_by=lambda lease: lease[0]), now=times)
def test_exactly_the_leases_whose_deadline_has_come_are_over(leases: list[tuple[int, float]], now: float) -> None:
    assert set(over(leases, now)) == {lease_id for lease_id, deadline in leases if deadline <= now}
