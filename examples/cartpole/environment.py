"""Gymnasium environments: what must be known of one, and what the policy sees of its observations.

The raw observation goes through the transport; worker and trainer each make the policy's input of it:

| observation space   | frame                                      | policy input                  |
|---------------------|--------------------------------------------|-------------------------------|
| Box                 | flattened                                  | the frame                     |
| Box uint8 (H, W, C) | mean over C and blocks of 5 x 5, in [0, 1] | the frame and its last change |
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from cartpole.policy import Array
from ucxx_transport import ConfigError

__all__ = ["EnvironmentSpec", "inspect_environment", "make_environment"]

_BLOCK = 5  # 210 x 160 becomes 42 x 32: Pong's ball is still a visible change of its block's mean
_UNLIMITED_STEPS = 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvironmentSpec:
    """One environment: its name, shape and dtype of a raw observation, its actions, the step limit of an episode."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    actions: int
    first_action: int = 0
    max_steps: int

    @property
    def is_image(self) -> bool:
        """Whether observations are images: the table's second row."""
        return self.dtype == "uint8" and len(self.shape) == 3

    @property
    def frame_width(self) -> int:
        """Length of one frame."""
        return (self.shape[0] // _BLOCK) * (self.shape[1] // _BLOCK) if self.is_image else prod(self.shape)

    @property
    def width(self) -> int:
        """Length of one policy input."""
        return self.frame_width * (2 if self.is_image else 1)

    def frames(self, observations: Array) -> Array:
        """Frames of shape (N, frame_width), float32, of raw observations of shape (N, *shape)."""
        if not self.is_image:
            return observations.reshape(len(observations), -1).astype(np.float32)
        count, (height, width, channels) = len(observations), self.shape
        rows, columns = height // _BLOCK, width // _BLOCK
        cut = observations[:, : rows * _BLOCK, : columns * _BLOCK]
        bands = cut.reshape(count, rows, _BLOCK, columns * _BLOCK * channels).sum(axis=2, dtype=np.uint16)
        blocks = bands.reshape(count, rows * columns, _BLOCK * channels).astype(np.float32)
        return np.asarray(blocks.mean(axis=2) / (255 * _BLOCK))

    def inputs(self, frames: Array, previous: Array) -> Array:
        """Policy inputs of shape (N, width) of frames and of those one step before."""
        return np.concatenate([frames, frames - previous], axis=1) if self.is_image else frames

    def episode_inputs(self, observations: Array) -> Array:
        """Policy inputs of shape (T, width) of an episode's observations (T, *shape)."""
        frames = self.frames(observations)
        return self.inputs(frames, np.concatenate([frames[:1], frames[:-1]]))


def make_environment(name: str) -> Any:  # a gymnasium.Env; the extra is optional, so its type can't be named here
    """Make an environment.

    Raises:
        ConfigError: Gymnasium cannot make it.
        ModuleNotFoundError: Gymnasium or ale_py is not installed; each comes with an extra.
    """
    gymnasium = importlib.import_module("gymnasium")
    if name.startswith("ALE/"):
        gymnasium.register_envs(importlib.import_module("ale_py"))
    try:
        return gymnasium.make(name, disable_env_checker=True)
    except gymnasium.error.Error as exc:
        raise ConfigError(f"Gymnasium cannot make this environment: {exc}", field="--env", value=name) from exc


def inspect_environment(name: str) -> EnvironmentSpec:
    """Make an environment once to see what it is like.

    Raises:
        ConfigError: it cannot be made, its actions are not discrete, or its observations are not arrays.
        ModuleNotFoundError: Gymnasium or ale_py is not installed.
    """
    environment = make_environment(name)
    observations, actions, spec = environment.observation_space, environment.action_space, environment.spec
    environment.close()
    for space, wanted, what in (
        (observations, "Box", "observations that are arrays"),
        (actions, "Discrete", "discrete actions"),
    ):
        if type(space).__name__ != wanted:
            raise ConfigError(f"the policy needs {what} ({wanted})", field="--env", value=f"{name} has {space}")
    return EnvironmentSpec(
        name=name,
        shape=tuple(int(size) for size in observations.shape),
        dtype=str(observations.dtype),
        actions=int(actions.n),
        first_action=int(actions.start),
        max_steps=(spec.max_episode_steps if spec is not None else None) or _UNLIMITED_STEPS,
    )
