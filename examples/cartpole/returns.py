"""From rewards and value estimates to advantages."""

from __future__ import annotations

import numpy as np

from cartpole.network import Array

__all__ = ["advantages_and_targets", "discounted_returns"]


def discounted_returns(rewards: Array, *, discount: float, bootstrap: float = 0.0) -> Array:
    """G_t = r_t + discount * G_{t+1}, with G_T = `bootstrap`.

    Args:
        rewards: shape (T,).
        discount: gamma in [0, 1].
        bootstrap: value of the state after the last step; 0 when the episode really ended there.

    Returns:
        Returns of shape (T,), float64.
    """
    returns = np.empty(len(rewards), np.float64)
    running = float(bootstrap)
    for step in range(len(rewards) - 1, -1, -1):
        running = float(rewards[step]) + discount * running
        returns[step] = running
    return returns


def advantages_and_targets(
    rewards: Array, values: Array, *, terminated: bool, discount: float, trace: float
) -> tuple[Array, Array]:
    """Generalised advantage estimation (Schulman et al., 2016) of one episode.

    delta_t = r_t + discount * v_{t+1} - v_t;  A_t = delta_t + discount * trace * A_{t+1}.

    Args:
        rewards: shape (T,).
        values: the baseline's estimates, shape (T + 1,): the last one is of the state after the last step.
        terminated: the episode ended there (its last value is 0), rather than being cut off by a limit.
        discount: gamma in [0, 1].
        trace: lambda in [0, 1]; 1 is the plain return less the baseline.

    Returns:
        Advantages and value targets (advantage + value), both of shape (T,), float64.
    """
    following = np.array(values[1:], np.float64)
    if terminated:
        following[-1] = 0.0
    current = np.asarray(values[:-1], np.float64)
    deltas = np.asarray(rewards, np.float64) + discount * following - current
    advantages = discounted_returns(deltas, discount=discount * trace)
    return advantages, advantages + current
