"""The hand-written gradients against finite differences, in float64."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from cartpole.adam import Adam
from cartpole.network import Array, Network
from cartpole.policy import log_softmax, policy_loss

_STEP = 1e-6


def _numeric_gradient(value: Callable[[], float], parameter: Array) -> Array:
    gradient = np.zeros_like(parameter)
    for index in np.ndindex(parameter.shape):
        kept = parameter[index]
        parameter[index] = kept + _STEP
        above = value()
        parameter[index] = kept - _STEP
        below = value()
        parameter[index] = kept
        gradient[index] = (above - below) / (2.0 * _STEP)
    return gradient


def _network(rng: np.random.Generator, *sizes: int) -> Network:
    network = Network(sizes, rng, dtype=np.float64)
    for parameter in network.parameters:
        parameter[...] += 0.1 * rng.standard_normal(parameter.shape)
    return network


def test_backward_matches_finite_differences_of_a_squared_error() -> None:
    rng = np.random.default_rng(1)
    network = _network(rng, 3, 7, 5, 2)
    inputs, wanted = rng.standard_normal((11, 3)), rng.standard_normal((11, 2))

    def loss() -> float:
        return float(0.5 * ((network.forward(inputs)[0] - wanted) ** 2).sum())

    output, layers = network.forward(inputs)
    gradients = network.backward(layers, output - wanted)
    for parameter, gradient in zip(network.parameters, gradients, strict=True):
        np.testing.assert_allclose(gradient, _numeric_gradient(loss, parameter), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("entropy_weight", [0.0, 0.3])
def test_policy_gradient_matches_finite_differences_inside_and_outside_the_clip(entropy_weight: float) -> None:
    rng = np.random.default_rng(2)
    network = _network(rng, 4, 6, 3)
    inputs = rng.standard_normal((40, 4))
    actions = rng.integers(0, 3, 40)
    advantages = rng.standard_normal(40)
    now = log_softmax(network.forward(inputs)[0])[np.arange(40), actions]
    behaviour = now + rng.uniform(-0.6, 0.6, 40)  # ratios from 0.55 to 1.8: within and beyond 1 ± 0.2, on both sides

    def loss() -> float:
        logits = network.forward(inputs)[0]
        return policy_loss(logits, actions, advantages, behaviour, clip=0.2, entropy_weight=entropy_weight).loss

    logits, layers = network.forward(inputs)
    result = policy_loss(logits, actions, advantages, behaviour, clip=0.2, entropy_weight=entropy_weight)
    gradients = network.backward(layers, result.logits_gradient)
    for parameter, gradient in zip(network.parameters, gradients, strict=True):
        np.testing.assert_allclose(gradient, _numeric_gradient(loss, parameter), rtol=1e-5, atol=1e-8)


def test_on_fresh_data_the_gradient_is_plain_reinforce() -> None:
    rng = np.random.default_rng(3)
    logits = rng.standard_normal((20, 4))
    actions = rng.integers(0, 4, 20)
    advantages = rng.standard_normal(20)
    log_probabilities = log_softmax(logits)
    result = policy_loss(
        logits, actions, advantages, log_probabilities[np.arange(20), actions], clip=0.2, entropy_weight=0.0
    )
    onehot = np.eye(4)[actions]
    expected = -advantages[:, None] * (onehot - np.exp(log_probabilities)) / 20
    np.testing.assert_allclose(result.logits_gradient, expected, atol=1e-12)
    assert result.divergence == pytest.approx(0.0, abs=1e-12)


def test_adam_finds_the_minimum_of_a_bowl() -> None:
    place = np.array([4.0, -3.0])
    optimiser = Adam([place], learning_rate=0.05, max_gradient_norm=1.0)
    for _ in range(1000):
        optimiser.step([2.0 * (place - np.array([1.0, 2.0]))])
    np.testing.assert_allclose(place, [1.0, 2.0], atol=1e-3)


def test_weights_travel_as_bytes() -> None:
    rng = np.random.default_rng(4)
    sent, received = Network((4, 8, 2), rng), Network((4, 8, 2), rng)
    received.load_bytes(sent.to_bytes())
    inputs = rng.standard_normal((5, 4)).astype(np.float32)
    np.testing.assert_array_equal(received.forward(inputs)[0], sent.forward(inputs)[0])


def test_weights_of_another_network_are_refused() -> None:
    rng = np.random.default_rng(5)
    with pytest.raises(ValueError, match="weights arrived for a network of"):
        Network((4, 8, 2), rng).load_bytes(Network((4, 9, 2), rng).to_bytes())
