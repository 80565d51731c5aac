"""The demo's learning: hand-written gradients against finite differences, in float64."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from cartpole.policy import Adam, Array, Network, advantages_and_targets, log_softmax, policy_loss


def _check_gradients(network: Network, loss: Callable[[], float], gradients: list[Array]) -> None:
    step = 1e-6
    for parameter, gradient in zip(network.parameters, gradients, strict=True):
        numeric = np.zeros_like(parameter)
        for index in np.ndindex(parameter.shape):
            kept = parameter[index]
            parameter[index] = kept + step
            above = loss()
            parameter[index] = kept - step
            numeric[index] = (above - loss()) / (2.0 * step)
            parameter[index] = kept
        np.testing.assert_allclose(gradient, numeric, rtol=1e-5, atol=1e-7)


def _network(rng: np.random.Generator, *sizes: int) -> Network:
    network = Network(sizes, rng, dtype=np.float64)
    for parameter in network.parameters:
        parameter[...] += 0.1 * rng.standard_normal(parameter.shape)
    return network


def test_backward_matches_finite_differences_of_a_squared_error() -> None:
    rng = np.random.default_rng(1)
    network = _network(rng, 3, 7, 5, 2)
    inputs, wanted = rng.standard_normal((11, 3)), rng.standard_normal((11, 2))
    output, layers = network.forward(inputs)
    gradients = network.backward(layers, output - wanted)
    _check_gradients(network, lambda: float(0.5 * ((network.forward(inputs)[0] - wanted) ** 2).sum()), gradients)


@pytest.mark.parametrize("entropy_weight", [0.0, 0.3])
def test_policy_gradient_matches_finite_differences_inside_and_outside_the_clip(entropy_weight: float) -> None:
    rng = np.random.default_rng(2)
    network = _network(rng, 4, 6, 3)
    inputs, actions, advantages = rng.standard_normal((40, 4)), rng.integers(0, 3, 40), rng.standard_normal(40)
    now = log_softmax(network.forward(inputs)[0])[np.arange(40), actions]
    old = now + rng.uniform(-0.6, 0.6, 40)  # ratios from 0.55 to 1.8: within and beyond 1 ± 0.2, on both sides

    def loss() -> float:
        return policy_loss(network.forward(inputs)[0], actions, advantages, old, entropy_weight=entropy_weight)[0]

    logits, layers = network.forward(inputs)
    _, gradient, _ = policy_loss(logits, actions, advantages, old, entropy_weight=entropy_weight)
    _check_gradients(network, loss, network.backward(layers, gradient))


def test_on_fresh_data_the_gradient_is_plain_reinforce() -> None:
    rng = np.random.default_rng(3)
    logits, actions, advantages = rng.standard_normal((20, 4)), rng.integers(0, 4, 20), rng.standard_normal(20)
    log_probabilities = log_softmax(logits)
    old = log_probabilities[np.arange(20), actions]
    _, gradient, divergence = policy_loss(logits, actions, advantages, old, entropy_weight=0.0)
    expected = -advantages[:, None] * (np.eye(4)[actions] - np.exp(log_probabilities)) / 20
    np.testing.assert_allclose(gradient, expected, atol=1e-12)
    assert divergence == pytest.approx(0.0, abs=1e-12)


def test_adam_finds_the_minimum_of_a_bowl() -> None:
    place = np.array([4.0, -3.0])
    optimiser = Adam([place], rate=0.05, max_norm=1.0)
    for _ in range(1000):
        optimiser.step([2.0 * (place - np.array([1.0, 2.0]))])
    np.testing.assert_allclose(place, [1.0, 2.0], atol=1e-3)


def test_a_network_acts_like_the_one_whose_weights_it_took_and_refuses_those_of_another_shape() -> None:
    rng = np.random.default_rng(4)
    sent, received, inputs = Network((4, 8, 2), rng), Network((4, 8, 2), rng), rng.standard_normal((5, 4))
    received.load(sent.parameters)
    np.testing.assert_array_equal(received.forward(inputs)[0], sent.forward(inputs)[0])
    with pytest.raises(ValueError, match="broadcast"):
        received.load(Network((4, 9, 2), rng).parameters)


@pytest.mark.parametrize("terminated", [True, False])
def test_with_a_full_trace_the_advantage_is_the_discounted_return_less_the_baseline(*, terminated: bool) -> None:
    rng = np.random.default_rng(0)
    rewards, values = rng.standard_normal(9), rng.standard_normal(10)
    advantages, targets = advantages_and_targets(rewards, values, terminated=terminated, discount=0.97, trace=1.0)
    following = 0.0 if terminated else values[-1]
    for step in range(8, -1, -1):
        following = rewards[step] + 0.97 * following
        assert targets[step] == pytest.approx(following), step
    np.testing.assert_allclose(advantages, targets - values[:-1])


def test_without_a_trace_the_advantage_is_the_one_step_error() -> None:
    rewards, values = np.array([1.0, 2.0]), np.array([0.5, 0.25, 8.0])
    advantages, _ = advantages_and_targets(rewards, values, terminated=False, discount=0.5, trace=0.0)
    np.testing.assert_allclose(advantages, [1.0 + 0.5 * 0.25 - 0.5, 2.0 + 0.5 * 8.0 - 0.25])
