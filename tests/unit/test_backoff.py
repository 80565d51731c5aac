"""Pauses double up to their bound, and jitter takes off at most a half."""

from __future__ import annotations

import pytest

from ucxx_transport.backoff import pause_s


def pauses(attempts: int, jitter: float) -> list[float]:
    return [pause_s(attempt, first_s=0.1, longest_s=5.0, jitter=jitter) for attempt in range(1, attempts + 1)]


def test_pauses_double_up_to_the_longest() -> None:
    assert pauses(8, 0.0) == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]


def test_jitter_takes_off_at_most_a_half() -> None:
    least = pauses(8, 1.0)
    assert least == [pause / 2 for pause in pauses(8, 0.0)]
    assert all(low < drawn < high for low, drawn, high in zip(least, pauses(8, 0.5), pauses(8, 0.0), strict=True))


def test_a_pause_is_neither_zero_nor_too_long_after_any_number_of_failures() -> None:
    assert pause_s(10**9, first_s=0.1, longest_s=5.0) == 5.0
    assert pause_s(10**9, first_s=1e-30, longest_s=5.0, jitter=0.99) > 0


def test_a_first_pause_longer_than_the_longest_is_cut() -> None:
    assert pause_s(1, first_s=9.0, longest_s=5.0) == pytest.approx(5.0)
