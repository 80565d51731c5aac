"""Gymnasium environments as the demo sees them: what must be known before a ring can be sized, and making them."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from cartpole.features import FeatureMap, observation_kind
from ucxx_transport.errors import ConfigError

__all__ = ["EnvironmentFacts", "make_environment", "probe_environment"]

_UNLIMITED_STEPS = 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvironmentFacts:
    """One environment's shapes and limits.

    Attributes:
        env_id: Gymnasium's name of it.
        features: what the policy makes of its observations; holds the raw shape.
        observation_dtype: numpy's name of the raw observation's dtype.
        actions: how many discrete actions there are.
        first_action: the number of the first one (Discrete's start).
        max_steps: Gymnasium's limit of an episode's steps, or a large number when it states none.
    """

    env_id: str
    features: FeatureMap
    observation_dtype: str
    actions: int
    first_action: int
    max_steps: int


def make_environment(env_id: str) -> Any:  # a gymnasium.Env; the extra is optional, so its type can't be named here
    """Make one environment.

    Raises:
        ConfigError: Gymnasium cannot make it.
        ModuleNotFoundError: Gymnasium or ale_py is not installed; each comes with an extra.
    """
    gymnasium = importlib.import_module("gymnasium")
    if env_id.startswith("ALE/"):
        gymnasium.register_envs(importlib.import_module("ale_py"))
    try:
        return gymnasium.make(env_id, disable_env_checker=True)
    except gymnasium.error.Error as exc:
        raise ConfigError(f"Gymnasium cannot make this environment: {exc}", field="--env", value=env_id) from exc


def probe_environment(env_id: str) -> EnvironmentFacts:
    """Make the environment once and read its facts.

    Raises:
        ModuleNotFoundError: Gymnasium or ale_py is not installed.
        ConfigError: it cannot be made, its actions are not discrete, or its observations are not arrays or numbers.
    """
    environment = make_environment(env_id)
    try:
        actions = environment.action_space
        if type(actions).__name__ != "Discrete":
            raise ConfigError(
                "the demo's policy chooses among discrete actions; take an environment whose action space is Discrete",
                field="--env",
                value=f"{env_id} has {actions}",
            )
        space = environment.observation_space
        spec = environment.spec
        return EnvironmentFacts(
            env_id=env_id,
            features=_feature_map(env_id, space),
            observation_dtype=str(space.dtype),
            actions=int(actions.n),
            first_action=int(actions.start),
            max_steps=int((spec.max_episode_steps if spec is not None else None) or _UNLIMITED_STEPS),
        )
    finally:
        environment.close()


def _feature_map(env_id: str, space: Any) -> FeatureMap:
    name = type(space).__name__
    if name == "Box":
        shape = tuple(int(width) for width in space.shape)
        return FeatureMap(kind=observation_kind(shape, str(space.dtype)), shape=shape)
    if name == "Discrete" and int(space.start) == 0:
        return FeatureMap(kind="discrete", shape=(), categories=int(space.n))
    raise ConfigError(
        "the demo reads observations that are arrays (Box) or numbers from 0 (Discrete)",
        field="--env",
        value=f"{env_id} has {space}",
    )
