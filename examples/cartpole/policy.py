"""The learning, in numpy: a small network, Adam, and the clipped policy gradient with a learnt baseline.

Nothing here knows of the transport.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["Adam", "Array", "Experience", "Learner", "Network", "advantages_and_targets", "log_softmax", "policy_loss"]

Array = npt.NDArray[Any]

_HIDDEN = (64, 64)
_DISCOUNT = 0.99
_TRACE = 0.95
_PASSES = 4
_MINIBATCH_STEPS = 512
_MAX_DIVERGENCE = 0.03


class Network:
    """Fully connected layers with tanh between them: x_i = tanh(x_{i-1} W_i + b_i), the last one linear.

    Args:
        sizes: widths of input, hidden layers and output.
        rng: draws the weights: orthogonal ones (Saxe et al., 2013).
        output_gain: scale of the last layer's weights.
        dtype: of the parameters.

    Attributes:
        parameters: [W_1, b_1, W_2, b_2, …]; the optimiser changes them in place.
    """

    def __init__(
        self, sizes: Sequence[int], rng: np.random.Generator, *, output_gain: float = 1.0, dtype: Any = np.float32
    ) -> None:
        self.parameters: list[Array] = []
        for width, next_width in pairwise(sizes):
            basis, _ = np.linalg.qr(rng.standard_normal((max(width, next_width), min(width, next_width))))
            weights = basis if width >= next_width else basis.T
            self.parameters += [(np.sqrt(2.0) * weights).astype(dtype), np.zeros(next_width, dtype)]
        self.parameters[-2] *= output_gain / np.sqrt(2.0)

    def forward(self, inputs: Array) -> tuple[Array, list[Array]]:
        """The output of a batch, shape (batch, sizes[-1]), and the input of every layer, which `backward` needs."""
        layers = [inputs]
        for index in range(0, len(self.parameters) - 2, 2):
            layers.append(np.tanh(layers[-1] @ self.parameters[index] + self.parameters[index + 1]))
        return layers[-1] @ self.parameters[-2] + self.parameters[-1], layers

    def backward(self, layers: Sequence[Array], gradient: Array) -> list[Array]:
        """The gradient of each parameter, in the order of `parameters`.

        Args:
            layers: what `forward` gave for this batch.
            gradient: of the loss by the output, shape (batch, sizes[-1]).
        """
        gradients: list[Array] = []
        for layer in range(len(layers) - 1, -1, -1):
            inputs = layers[layer]
            gradients += [gradient.sum(axis=0), inputs.T @ gradient]
            if layer > 0:
                gradient = (gradient @ self.parameters[2 * layer].T) * (1.0 - inputs * inputs)
        return gradients[::-1]

    def load(self, parameters: Sequence[Array]) -> None:
        """Copy the parameters of a network of the same sizes."""
        for mine, other in zip(self.parameters, parameters, strict=True):
            mine[...] = other


class Adam:
    """Adam (Kingma and Ba, 2015) on a list of parameters, with a limit on the gradient's global norm."""

    def __init__(self, parameters: Sequence[Array], *, rate: float, max_norm: float) -> None:
        self._parameters = list(parameters)
        self._moments = [(np.zeros_like(parameter), np.zeros_like(parameter)) for parameter in parameters]
        self._rate = rate
        self._max_norm = max_norm
        self._steps = 0

    def step(self, gradients: Sequence[Array]) -> None:
        """Move the parameters against the gradients, in place."""
        norm = float(np.sqrt(sum(float(np.vdot(gradient, gradient)) for gradient in gradients)))
        scale = min(1.0, self._max_norm / (norm + 1e-12))
        self._steps += 1
        rate, correction = self._rate / (1.0 - 0.9**self._steps), 1.0 - 0.999**self._steps
        for parameter, gradient, (mean, variance) in zip(self._parameters, gradients, self._moments, strict=True):
            mean[...] += 0.1 * (gradient * scale - mean)
            variance[...] += 0.001 * ((gradient * scale) ** 2 - variance)
            parameter[...] -= rate * mean / (np.sqrt(variance / correction) + 1e-5)


def policy_network(width: int, actions: int, rng: np.random.Generator) -> Network:
    """A policy that first acts at random: its last layer starts near zero."""
    return Network((width, *_HIDDEN, actions), rng, output_gain=0.01)


def log_softmax(logits: Array) -> Array:
    """Log-probabilities of shape (batch, actions) from logits of that shape."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def sample_actions(logits: Array, rng: np.random.Generator) -> Array:
    """One action a row, shape (batch,): argmax(logits + Gumbel noise) is a draw from their softmax."""
    return np.asarray((logits + rng.gumbel(size=logits.shape)).argmax(axis=1))


def policy_loss(
    logits: Array, actions: Array, advantages: Array, old: Array, *, clip: float = 0.2, entropy_weight: float = 0.005
) -> tuple[float, Array, float]:
    """The clipped policy gradient (Schulman et al., 2017) with an entropy bonus.

    Workers act with weights that are a few versions old; the ratio of new to old probability corrects for that. Where
    both are equal this is REINFORCE with a baseline.

    Args:
        logits: of the policy now, shape (batch, actions).
        actions: that were taken, shape (batch,), integers.
        advantages: shape (batch,).
        old: log-probabilities of `actions` under the policy that took them, shape (batch,).
        clip: half-width of the band around ratio 1 outside of which a sample stops pulling.
        entropy_weight: of the bonus.

    Returns:
        The loss; its gradient by the logits, shape (batch, actions); an estimate of KL(old || new) in nats.
    """
    rows = np.arange(len(actions))
    log_probabilities = log_softmax(logits)
    probabilities = np.exp(log_probabilities)
    log_ratio = log_probabilities[rows, actions] - old
    ratio = np.exp(log_ratio)
    gain, clipped = ratio * advantages, np.clip(ratio, 1.0 - clip, 1.0 + clip) * advantages
    entropies = -(probabilities * log_probabilities).sum(axis=1)
    loss = -np.minimum(gain, clipped).mean() - entropy_weight * entropies.mean()
    # d ratio / d logits = ratio (onehot - p), where the unclipped term is the smaller one; d entropy / d logits =
    # -p (log p + entropy).
    weight = np.where(gain <= clipped, gain, 0.0)
    gradient = weight[:, None] * probabilities
    gradient[rows, actions] -= weight
    gradient += entropy_weight * probabilities * (log_probabilities + entropies[:, None])
    divergence = (ratio - 1.0 - log_ratio).mean()  # Schulman's k3 estimator
    return float(loss), (gradient / len(actions)).astype(logits.dtype), float(divergence)


def advantages_and_targets(
    rewards: Array, values: Array, *, terminated: bool, discount: float = _DISCOUNT, trace: float = _TRACE
) -> tuple[Array, Array]:
    """Generalised advantage estimation (Schulman et al., 2016) of one episode.

    delta_t = r_t + discount v_{t+1} - v_t;  A_t = delta_t + discount trace A_{t+1}.

    Args:
        rewards: shape (T,).
        values: the baseline's, shape (T + 1,): the last one is of the state after the last step.
        terminated: the episode ended there, so that this state is worth 0, rather than at a limit.
        discount: gamma in [0, 1].
        trace: lambda in [0, 1]; 1 is the discounted return less the baseline.

    Returns:
        Advantages and value targets (advantage + value), both of shape (T,), float64.
    """
    following = np.array(values[1:], np.float64)
    if terminated:
        following[-1] = 0.0
    advantages = rewards + discount * following - values[:-1]
    for step in range(len(advantages) - 2, -1, -1):
        advantages[step] += discount * trace * advantages[step + 1]
    return advantages, advantages + values[:-1]


class Experience(NamedTuple):
    """What is learnt from one episode of T steps.

    Attributes:
        inputs: policy inputs, shape (T + 1, width), float32; the last one follows the last step.
        actions: shape (T,), int64.
        rewards: shape (T,), float32.
        log_probabilities: of the actions under the policy that took them, shape (T,), float32.
        terminated: the episode ended there, rather than at a limit.
    """

    inputs: Array
    actions: Array
    rewards: Array
    log_probabilities: Array
    terminated: bool


class Learner:
    """Policy and baseline with their optimisers. The defaults solve CartPole-v1 on every seed tried.

    Args:
        width: of a policy input.
        actions: how many there are.
        seed: of the weights.
        rate: learning rate of the policy.

    Attributes:
        policy: the network whose weights the rollout workers act with.
        version: of these weights: the number of updates made.
    """

    def __init__(self, width: int, actions: int, *, seed: int, rate: float = 1e-3) -> None:
        self._rng = np.random.default_rng(seed)
        self.policy = policy_network(width, actions, self._rng)
        self._baseline = Network((width, *_HIDDEN, 1), self._rng)
        self._policy_optimiser = Adam(self.policy.parameters, rate=rate, max_norm=0.5)
        self._baseline_optimiser = Adam(self._baseline.parameters, rate=3e-3, max_norm=5.0)
        self.version = 0

    def update(self, episodes: Sequence[Experience]) -> None:
        """Learn from whole episodes, at least one."""
        estimates = []
        for episode in episodes:
            values = self._baseline.forward(episode.inputs)[0][:, 0]
            estimates.append(advantages_and_targets(episode.rewards, values, terminated=episode.terminated))
        advantages, targets = (np.concatenate(column).astype(np.float32) for column in zip(*estimates, strict=True))
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        inputs = np.concatenate([episode.inputs[:-1] for episode in episodes])
        actions = np.concatenate([episode.actions for episode in episodes])
        old = np.concatenate([episode.log_probabilities for episode in episodes])
        for _ in range(_PASSES):
            order, divergences = self._rng.permutation(len(actions)), []
            for rows in np.array_split(order, max(1, len(actions) // _MINIBATCH_STEPS)):
                logits, layers = self.policy.forward(inputs[rows])
                _, gradient, divergence = policy_loss(logits, actions[rows], advantages[rows], old[rows])
                self._policy_optimiser.step(self.policy.backward(layers, gradient))
                values, layers = self._baseline.forward(inputs[rows])
                gradient = (values - targets[rows, None]) / len(rows)
                self._baseline_optimiser.step(self._baseline.backward(layers, gradient))
                divergences.append(divergence)
            if np.mean(divergences) > _MAX_DIVERGENCE:
                break
        self.version += 1
