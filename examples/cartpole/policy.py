"""The softmax policy: sampling for the rollout workers, the objective and its gradient for the trainer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cartpole.network import Array

__all__ = ["PolicyLoss", "log_softmax", "policy_loss", "sample_actions"]


def log_softmax(logits: Array) -> Array:
    """Log-probabilities of shape (batch, actions) from logits of the same shape."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def sample_actions(logits: Array, rng: np.random.Generator) -> Array:
    """Draw one action a row by the Gumbel trick: argmax(logits + Gumbel noise) is a draw from their softmax.

    Args:
        logits: shape (batch, actions).
        rng: the worker's generator.

    Returns:
        Actions of shape (batch,), int64.
    """
    return np.asarray((logits + rng.gumbel(size=logits.shape)).argmax(axis=1))


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyLoss:
    """The objective of one batch and what its gradient is.

    Attributes:
        loss: the number that is minimised, entropy bonus included.
        logits_gradient: dloss/dlogits, shape (batch, actions).
        entropy: mean entropy in nats.
        divergence: estimate of KL(behaviour || policy), mean over the batch, in nats (Schulman's k3 estimator).
    """

    loss: float
    logits_gradient: Array
    entropy: float
    divergence: float


def policy_loss(
    logits: Array,
    actions: Array,
    advantages: Array,
    behaviour_log_probabilities: Array,
    *,
    clip: float,
    entropy_weight: float,
) -> PolicyLoss:
    """The clipped policy gradient (Schulman et al., 2017), with an entropy bonus.

    Rollout workers run a few weight versions behind the trainer. The ratio pi/behaviour corrects for that; the clip
    bounds how far one batch may pull the policy. On fresh data the ratio is 1 and this is REINFORCE with a baseline.

    Args:
        logits: of the policy now, shape (batch, actions).
        actions: what was done, shape (batch,), integers.
        advantages: shape (batch,).
        behaviour_log_probabilities: of `actions` under the policy that chose them, shape (batch,).
        clip: half-width of the ratio's band round 1.
        entropy_weight: what a nat of entropy is worth.
    """
    batch = len(actions)
    rows = np.arange(batch)
    log_probabilities = log_softmax(logits)
    probabilities = np.exp(log_probabilities)
    log_ratio = log_probabilities[rows, actions] - behaviour_log_probabilities
    ratio = np.exp(log_ratio)
    unclipped = ratio * advantages
    clipped = np.clip(ratio, 1.0 - clip, 1.0 + clip) * advantages
    entropies = -(probabilities * log_probabilities).sum(axis=1)
    loss = -np.minimum(unclipped, clipped).mean() - entropy_weight * entropies.mean()

    # d ratio / d logits = ratio * (onehot - p) while the unclipped term is the smaller one, else 0.
    weight = np.where(unclipped <= clipped, unclipped, 0.0)[:, None]
    gradient = weight * probabilities
    gradient[rows, actions] -= weight[:, 0]
    # d entropy / d logits = -p * (log p + entropy).
    gradient += entropy_weight * probabilities * (log_probabilities + entropies[:, None])
    gradient /= batch
    return PolicyLoss(
        loss=float(loss),
        logits_gradient=gradient.astype(logits.dtype),
        entropy=float(entropies.mean()),
        divergence=float((ratio - 1.0 - log_ratio).mean()),
    )
