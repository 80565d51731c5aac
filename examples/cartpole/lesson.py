"""What the learner keeps of an episode once its payload has been given back."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cartpole.features import FeatureMap
from cartpole.network import Array
from cartpole.policy import log_softmax
from cartpole.trajectory import Episode

__all__ = ["Lesson"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lesson:
    """Copies, none of them a view of the payload.

    Attributes:
        inputs: policy inputs, shape (T + 1, width).
        actions: shape (T,). rewards: shape (T,).
        log_probabilities: of the actions under the policy that chose them, shape (T,).
        terminated: the episode ended there, rather than at a limit.
    """

    inputs: Array
    actions: Array
    rewards: Array
    log_probabilities: Array
    terminated: bool

    @classmethod
    def of(cls, episode: Episode, features: FeatureMap) -> Lesson:
        """Reduce an episode, whose arrays may be views of shared memory, straight to what is learnt from."""
        actions = np.array(episode.actions, dtype=np.int64)
        chosen = log_softmax(np.asarray(episode.logits))[np.arange(len(actions)), actions]
        return cls(
            inputs=features.episode_inputs(np.asarray(episode.obs)),
            actions=actions,
            rewards=np.array(episode.rewards),
            log_probabilities=chosen,
            terminated=bool(episode.terminated[0]),
        )

    @property
    def steps(self) -> int:
        """T, the number of steps."""
        return len(self.actions)
