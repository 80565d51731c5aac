from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cartpole.environment import EnvironmentFacts
from cartpole.features import FeatureMap
from cartpole.learner import Learner, LearnerSettings, policy_network
from cartpole.lesson import Lesson
from cartpole.network import Array
from cartpole.rollout import RolloutLanes

_FACTS = EnvironmentFacts(
    env_id="count",
    features=FeatureMap(kind="vector", shape=(2,)),
    observation_dtype="float32",
    actions=2,
    first_action=5,
    max_steps=100,
)


class _Countdown:
    """Ends `length` steps after its start; observations count the steps; action 1 pays."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.steps = 0
        self.actions: list[int] = []

    def reset(self, *, seed: int | None) -> tuple[Array, dict[str, Any]]:
        del seed
        self.steps = 0
        return self._seen(), {}

    def step(self, action: int) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        self.actions.append(action)
        self.steps += 1
        return self._seen(), float(action == 6), self.steps == self.length, False, {}

    def _seen(self) -> Array:
        return np.array([self.steps, self.length], np.float32)


def _lanes(*lengths: int, max_steps: int = 50) -> tuple[RolloutLanes, list[_Countdown]]:
    environments = [_Countdown(length) for length in lengths]
    return RolloutLanes(environments, _FACTS, max_steps=max_steps, seed=1), environments


def test_episodes_come_out_whole_with_the_observation_after_the_last_step() -> None:
    lanes, _ = _lanes(3, 4)
    policy = policy_network(_FACTS, LearnerSettings(), np.random.default_rng(0))
    ended = [(turn, episode.obs.copy(), episode) for turn in range(1, 9) for episode in lanes.step(policy, turn)]
    assert [(turn, len(obs) - 1) for turn, obs, _ in ended] == [(3, 3), (4, 4), (6, 3), (8, 4)]
    for _, obs, episode in ended:
        np.testing.assert_array_equal(obs[:, 0], np.arange(episode.steps + 1))
        assert episode.terminated[0]


def test_recorded_versions_and_logits_are_those_that_acted() -> None:
    lanes, environments = _lanes(4)
    policy = policy_network(_FACTS, LearnerSettings(), np.random.default_rng(0))
    episodes = [episode for version in (7, 7, 8, 9) for episode in lanes.step(policy, version)]
    assert len(episodes) == 1
    np.testing.assert_array_equal(episodes[0].versions, [7, 7, 8, 9])
    np.testing.assert_allclose(episodes[0].logits, policy.forward(episodes[0].obs[:-1])[0], rtol=1e-5)
    np.testing.assert_array_equal(episodes[0].actions + _FACTS.first_action, environments[0].actions)


def test_an_episode_that_fills_its_slot_is_cut_there_and_is_not_terminated() -> None:
    lanes, _ = _lanes(40, max_steps=5)
    policy = policy_network(_FACTS, LearnerSettings(), np.random.default_rng(0))
    lengths = [(episode.steps, bool(episode.terminated[0])) for _ in range(10) for episode in lanes.step(policy, 0)]
    assert lengths == [(5, False), (5, False)]


def test_the_learner_learns_which_action_pays() -> None:
    lanes, _ = _lanes(10, 10, 10, 10)
    learner = Learner(_FACTS, LearnerSettings(hidden=(16,), policy_rate=1e-2, minibatch_steps=64), seed=0)
    for _ in range(15):
        lessons = [
            Lesson.of(episode, _FACTS.features)
            for _ in range(40)
            for episode in lanes.step(learner.policy, learner.version)
        ]
        learner.update(lessons)
    returns = [episode.total_reward for _ in range(10) for episode in lanes.step(learner.policy, learner.version)]
    assert np.mean(returns) > 8.0


@pytest.mark.parametrize("kind", ["vector", "image"])
def test_a_worker_and_the_trainer_see_the_same_policy_inputs(kind: str) -> None:
    rng = np.random.default_rng(0)
    if kind == "vector":
        features = FeatureMap(kind="vector", shape=(2, 3))
        raw: Array = rng.standard_normal((6, 2, 3))
    else:
        features = FeatureMap(kind="image", shape=(23, 11, 3))
        raw = rng.integers(0, 256, (6, 23, 11, 3), dtype=np.uint8)
    previous = features.frames(raw[:1])
    stepwise = []
    for image in raw:
        frames = features.frames(image[None])
        stepwise.append(features.inputs(frames, previous)[0])
        previous = frames
    at_once = features.episode_inputs(raw)
    assert at_once.shape == (6, features.width)
    np.testing.assert_array_equal(at_once, stepwise)


def test_an_image_is_reduced_to_the_means_of_its_blocks() -> None:
    image = np.zeros((1, 10, 5, 3), np.uint8)
    image[0, 5:] = 255
    np.testing.assert_allclose(FeatureMap(kind="image", shape=(10, 5, 3)).frames(image), [[0.0, 1.0]], rtol=1e-6)


def test_a_discrete_observation_is_one_hot() -> None:
    features = FeatureMap(kind="discrete", shape=(), categories=3)
    np.testing.assert_array_equal(features.frames(np.array([2, 0])), [[0, 0, 1], [1, 0, 0]])
