from __future__ import annotations

import pytest

from ucxx_transport.membership.backoff import pause_s

ALMOST_ONE = 1.0 - 2**-53


def pauses(draw: float, attempts: int = 8) -> list[float]:
    return [pause_s(attempt, first_s=0.1, most_s=5.0, draw=lambda: draw) for attempt in range(1, attempts + 1)]


def test_the_pause_doubles_up_to_its_bound() -> None:
    assert pauses(ALMOST_ONE) == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0])


def test_jitter_takes_half_of_it_at_most() -> None:
    for least, most in zip(pauses(0.0), pauses(ALMOST_ONE), strict=True):
        assert 0 < least == pytest.approx(most / 2)


def test_no_number_of_failures_is_too_large() -> None:
    assert pause_s(10**9, first_s=0.1, most_s=5.0, draw=lambda: 0.0) == 2.5
    assert pause_s(10**9, first_s=1e-30, most_s=5.0, draw=lambda: 0.0) > 0


def test_a_first_pause_above_the_bound_is_the_bound() -> None:
    assert pause_s(1, first_s=9.0, most_s=5.0, draw=lambda: 0.0) == 2.5
