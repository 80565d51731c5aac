"""Pauses double up to their bound, and jitter takes off at most a half."""

from __future__ import annotations

import pytest

from ucxx_transport.backoff import pause_s, random_pause_s


def test_pauses_double_up_to_the_longest() -> None:
    pauses = [pause_s(attempt, first_s=0.1, longest_s=5.0) for attempt in range(1, 9)]
    assert pauses == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]


def test_jitter_takes_off_at_most_a_half() -> None:
    for attempt in range(1, 9):
        whole = pause_s(attempt, first_s=0.1, longest_s=5.0)
        drawn = {random_pause_s(attempt, first_s=0.1, longest_s=5.0) for _ in range(100)}
        assert whole / 2 <= min(drawn) < max(drawn) <= whole


def test_a_pause_is_neither_zero_nor_too_long_after_any_number_of_failures() -> None:
    assert pause_s(10**9, first_s=0.1, longest_s=5.0) == 5.0
    assert random_pause_s(10**9, first_s=1e-30, longest_s=5.0) > 0


def test_a_first_pause_longer_than_the_longest_is_cut() -> None:
    assert pause_s(1, first_s=9.0, longest_s=5.0) == pytest.approx(5.0)
