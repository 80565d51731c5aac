from __future__ import annotations

import numpy as np
import pytest

from cartpole.returns import advantages_and_targets, discounted_returns


def test_discounted_returns_of_a_short_episode_by_hand() -> None:
    returns = discounted_returns(np.array([1.0, 2.0, 3.0]), discount=0.5)
    np.testing.assert_allclose(returns, [1.0 + 0.5 * (2.0 + 0.5 * 3.0), 2.0 + 0.5 * 3.0, 3.0])


def test_bootstrap_counts_as_the_return_after_the_last_step() -> None:
    returns = discounted_returns(np.array([1.0, 1.0]), discount=0.9, bootstrap=10.0)
    np.testing.assert_allclose(returns, [1.0 + 0.9 * (1.0 + 9.0), 1.0 + 9.0])


@pytest.mark.parametrize("terminated", [True, False])
def test_with_a_full_trace_the_advantage_is_the_return_less_the_baseline(*, terminated: bool) -> None:
    rng = np.random.default_rng(0)
    rewards, values = rng.standard_normal(9), rng.standard_normal(10)
    advantages, targets = advantages_and_targets(rewards, values, terminated=terminated, discount=0.97, trace=1.0)
    returns = discounted_returns(rewards, discount=0.97, bootstrap=0.0 if terminated else values[-1])
    np.testing.assert_allclose(targets, returns)
    np.testing.assert_allclose(advantages, returns - values[:-1])


def test_without_a_trace_the_advantage_is_the_one_step_error() -> None:
    advantages, _ = advantages_and_targets(
        np.array([1.0, 2.0]), np.array([0.5, 0.25, 8.0]), terminated=False, discount=0.5, trace=0.0
    )
    np.testing.assert_allclose(advantages, [1.0 + 0.5 * 0.25 - 0.5, 2.0 + 0.5 * 8.0 - 0.25])


def test_a_perfect_baseline_leaves_no_advantage() -> None:
    rewards = np.ones(6)
    values = np.append(discounted_returns(rewards, discount=0.9), 123.0)  # the last one is not used: it terminated
    advantages, _ = advantages_and_targets(rewards, values, terminated=True, discount=0.9, trace=0.95)
    np.testing.assert_allclose(advantages, 0.0, atol=1e-12)
