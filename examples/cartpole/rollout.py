"""Stepping a few environments side by side with one policy, and cutting whole episodes out of that."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cartpole.environment import EnvironmentFacts
from cartpole.network import Array, Network
from cartpole.policy import sample_actions
from cartpole.trajectory import Episode

__all__ = ["Recorder", "RolloutLanes"]


class Recorder:
    """The growing episode of one environment; its arrays are reused for the next one."""

    def __init__(self, facts: EnvironmentFacts, *, max_steps: int) -> None:
        """Reserve room for `max_steps` steps (address space: pages are touched only as episodes reach them)."""
        self._max_steps = max_steps
        self._obs = np.empty((max_steps + 1, *facts.features.shape), facts.observation_dtype)
        self._actions = np.empty(max_steps, np.int32)
        self._rewards = np.empty(max_steps, np.float32)
        self._logits = np.empty((max_steps, facts.actions), np.float32)
        self._versions = np.empty(max_steps, np.uint32)
        self._steps = 0

    @property
    def full(self) -> bool:
        """Whether there is no room for a further step."""
        return self._steps == self._max_steps

    def start(self, observation: Array) -> None:
        """Forget the last episode; the new one starts with `observation`."""
        self._steps = 0
        self._obs[0] = observation

    def add(self, action: int, reward: float, logits: Array, version: int, observation: Array) -> None:
        """Record one step and the observation after it."""
        step = self._steps
        self._actions[step] = action
        self._rewards[step] = reward
        self._logits[step] = logits
        self._versions[step] = version
        self._obs[step + 1] = observation
        self._steps = step + 1

    def episode(self, *, terminated: bool) -> Episode:
        """What was recorded, as views: valid until the next `start`."""
        steps = self._steps
        return Episode(
            obs=self._obs[: steps + 1],
            actions=self._actions[:steps],
            rewards=self._rewards[:steps],
            logits=self._logits[:steps],
            versions=self._versions[:steps],
            terminated=np.array([terminated]),
        )


class RolloutLanes:
    """Several environments of one worker, stepped in turn; one forward pass serves them all."""

    def __init__(self, environments: Sequence[Any], facts: EnvironmentFacts, *, max_steps: int, seed: int) -> None:
        """Reset each environment with a seed of its own; episodes are cut off after `max_steps` steps."""
        self._environments = list(environments)
        self._facts = facts
        self._rng = np.random.default_rng(seed)
        self._recorders = [Recorder(facts, max_steps=max_steps) for _ in environments]
        self._ended: list[int] = []
        first = [self._reset(lane, seed=seed * 1000 + lane) for lane in range(len(environments))]
        self._frames = np.concatenate(first)
        self._previous = self._frames.copy()

    def step(self, policy: Network, version: int) -> list[Episode]:
        """One step of every environment.

        Returns:
            Episodes that ended with it, as views that the next `step` overwrites: write them to the ring first.
        """
        self._restart_ended()
        logits, _ = policy.forward(self._facts.features.inputs(self._frames, self._previous))
        actions = sample_actions(logits, self._rng)
        self._previous[...] = self._frames
        ended: list[Episode] = []
        for lane, environment in enumerate(self._environments):
            action = int(actions[lane])
            observation, reward, terminated, truncated, _ = environment.step(action + self._facts.first_action)
            recorder = self._recorders[lane]
            recorder.add(action, float(reward), logits[lane], version, observation)
            if terminated or truncated or recorder.full:
                ended.append(recorder.episode(terminated=bool(terminated)))
                self._ended.append(lane)
            else:
                self._frames[lane] = self._facts.features.frames(np.asarray(observation)[None])[0]
        return ended

    def _restart_ended(self) -> None:
        for lane in self._ended:
            self._frames[lane] = self._reset(lane, seed=None)[0]
            self._previous[lane] = self._frames[lane]
        self._ended.clear()

    def _reset(self, lane: int, *, seed: int | None) -> Array:
        observation, _ = self._environments[lane].reset(seed=seed)
        self._recorders[lane].start(observation)
        return self._facts.features.frames(np.asarray(observation)[None])
