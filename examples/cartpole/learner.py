"""The trainer's half of the learning: batches of episodes in, better weights out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cartpole.adam import Adam
from cartpole.environment import EnvironmentFacts
from cartpole.lesson import Lesson
from cartpole.network import Array, Network
from cartpole.policy import policy_loss
from cartpole.returns import advantages_and_targets

__all__ = ["Learner", "LearnerSettings", "UpdateReport", "policy_network"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerSettings:
    """Hyper-parameters; the defaults solve CartPole-v1 on every seed tried."""

    hidden: tuple[int, ...] = (64, 64)
    policy_rate: float = 1e-3
    value_rate: float = 3e-3
    discount: float = 0.99
    trace: float = 0.95
    clip: float = 0.2
    entropy_weight: float = 0.005
    max_gradient_norm: float = 0.5
    passes: int = 4
    minibatch_steps: int = 512
    max_divergence: float = 0.03
    batch_steps: int = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateReport:
    """What one update did: mean entropy and divergence in nats, the steps learnt from, passes made over them."""

    version: int
    steps: int
    passes: int
    entropy: float
    divergence: float
    value_loss: float


def policy_network(facts: EnvironmentFacts, settings: LearnerSettings, rng: np.random.Generator) -> Network:
    """The policy for an environment; its last layer starts near zero, so that it first acts at random."""
    return Network((facts.features.width, *settings.hidden, facts.actions), rng, output_gain=0.01)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Batch:
    """Steps of several episodes, one after another."""

    inputs: Array
    actions: Array
    log_probabilities: Array
    advantages: Array
    targets: Array


class Learner:
    """Policy and baseline, and their optimisers.

    Attributes:
        policy: the network whose weights go to the rollout workers.
        version: number of updates made, which is the version of these weights.
    """

    def __init__(self, facts: EnvironmentFacts, settings: LearnerSettings, *, seed: int) -> None:
        """Draw both networks from `seed`."""
        self._rng = np.random.default_rng(seed)
        self._features = facts.features
        self._settings = settings
        self.policy = policy_network(facts, settings, self._rng)
        self._baseline = Network((facts.features.width, *settings.hidden, 1), self._rng)
        norm = settings.max_gradient_norm
        self._policy_optimiser = Adam(
            self.policy.parameters, learning_rate=settings.policy_rate, max_gradient_norm=norm
        )
        self._value_optimiser = Adam(
            self._baseline.parameters, learning_rate=settings.value_rate, max_gradient_norm=10.0 * norm
        )
        self.version = 0

    def update(self, lessons: Sequence[Lesson]) -> UpdateReport:
        """Learn from whole episodes, at least one."""
        settings = self._settings
        batch = self._prepare(lessons)
        steps = len(batch.actions)
        entropies: list[float] = []
        divergence = value_loss = 0.0
        done = 0
        for _ in range(settings.passes):
            order = self._rng.permutation(steps)
            divergences: list[float] = []
            for chosen in np.array_split(order, max(1, steps // settings.minibatch_steps)):
                entropy, step_divergence, value_loss = self._step(batch, chosen)
                entropies.append(entropy)
                divergences.append(step_divergence)
            done += 1
            divergence = float(np.mean(divergences))
            if divergence > settings.max_divergence:
                break
        self.version += 1
        return UpdateReport(
            version=self.version,
            steps=steps,
            passes=done,
            entropy=float(np.mean(entropies)),
            divergence=divergence,
            value_loss=value_loss,
        )

    def _prepare(self, lessons: Sequence[Lesson]) -> _Batch:
        settings = self._settings
        advantages, targets = [], []
        for lesson in lessons:
            advantage, target = advantages_and_targets(
                lesson.rewards,
                self._baseline.forward(lesson.inputs)[0][:, 0],
                terminated=lesson.terminated,
                discount=settings.discount,
                trace=settings.trace,
            )
            advantages.append(advantage)
            targets.append(target)
        advantage = np.concatenate(advantages)
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        return _Batch(
            inputs=np.concatenate([lesson.inputs[:-1] for lesson in lessons]),
            actions=np.concatenate([lesson.actions for lesson in lessons]),
            log_probabilities=np.concatenate([lesson.log_probabilities for lesson in lessons]),
            advantages=advantage.astype(np.float32),
            targets=np.concatenate(targets).astype(np.float32),
        )

    def _step(self, batch: _Batch, chosen: Array) -> tuple[float, float, float]:
        """One step of both optimisers; returns entropy, divergence and value loss."""
        settings = self._settings
        inputs = batch.inputs[chosen]
        logits, layers = self.policy.forward(inputs)
        loss = policy_loss(
            logits,
            batch.actions[chosen],
            batch.advantages[chosen],
            batch.log_probabilities[chosen],
            clip=settings.clip,
            entropy_weight=settings.entropy_weight,
        )
        self._policy_optimiser.step(self.policy.backward(layers, loss.logits_gradient))
        values, layers = self._baseline.forward(inputs)
        errors = values[:, 0] - batch.targets[chosen]
        self._value_optimiser.step(self._baseline.backward(layers, (errors / len(chosen))[:, None]))
        return loss.entropy, loss.divergence, float(0.5 * np.mean(errors * errors))
