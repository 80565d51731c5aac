"""The demo's episodes: how they are cut out of environments, and what is learnt from them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cartpole.environment import EnvironmentSpec
from cartpole.plan import digest_of, ring_size
from cartpole.policy import Array, Experience, Learner, policy_network
from cartpole.trainer import Packer
from cartpole.worker import EpisodeLanes
from ucxx_transport import ConfigError

SPEC = EnvironmentSpec(name="count", shape=(2,), dtype="float32", actions=2, first_action=5, max_steps=500)
FRAMES = replace(SPEC, shape=(210, 160, 3), dtype="uint8", max_steps=100_000)
POLICY = policy_network(SPEC.width, SPEC.actions, np.random.default_rng(0))


class Countdown:
    """Ends `length` steps after its start; observations count the steps; action 6 pays."""

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


def test_episodes_come_out_whole_with_the_observation_after_the_last_step() -> None:
    environments = [Countdown(3), Countdown(4)]
    lanes = EpisodeLanes(environments, SPEC, max_steps=50, seed=1)
    lengths = []
    for turn in range(1, 9):
        for episode in lanes.step(POLICY):
            lengths.append((turn, len(episode["actions"])))
            np.testing.assert_array_equal(episode["obs"][:, 0], np.arange(len(episode["actions"]) + 1))
            np.testing.assert_allclose(episode["logits"], POLICY.forward(episode["obs"][:-1])[0], rtol=1e-5)
            acted = environments[int(episode["obs"][0, 1]) - 3].actions[-len(episode["actions"]) :]
            np.testing.assert_array_equal(episode["actions"] + SPEC.first_action, acted)
            assert episode["terminated"][0]
    assert lengths == [(3, 3), (4, 4), (6, 3), (8, 4)]


def test_an_episode_that_fills_its_slot_is_cut_there_and_is_not_terminated() -> None:
    lanes = EpisodeLanes([Countdown(40)], SPEC, max_steps=5, seed=1)
    ended = [(len(each["actions"]), bool(each["terminated"][0])) for _ in range(10) for each in lanes.step(POLICY)]
    assert ended == [(5, False), (5, False)]


def test_the_learner_learns_which_action_pays() -> None:
    lanes = EpisodeLanes([Countdown(10) for _ in range(4)], SPEC, max_steps=50, seed=1)
    learner = Learner(SPEC.width, SPEC.actions, seed=0, rate=1e-2)
    packer = Packer(SPEC)
    for _ in range(15):
        batch: list[Experience] = []
        for _ in range(40):
            for episode in lanes.step(learner.policy):
                experience = packer.get_policy_input(None, episode, digest=digest_of(episode))
                assert experience is not None
                batch.append(experience)
        learner.update(batch)
    rewards = [episode["rewards"].sum() for _ in range(10) for episode in lanes.step(learner.policy)]
    assert np.mean(rewards) > 8.0


def test_an_episode_whose_bytes_are_not_those_that_were_played_is_counted_and_not_learnt_from() -> None:
    lanes = EpisodeLanes([Countdown(2)], SPEC, max_steps=5, seed=1)
    assert lanes.step(POLICY) == []
    (episode,) = lanes.step(POLICY)
    digest = digest_of(episode)
    packer = Packer(SPEC)
    assert packer.get_policy_input(None, episode, digest=digest) is not None
    episode["rewards"][1] += 1.0
    assert packer.get_policy_input(None, episode, digest=digest) is None
    assert packer.digests == {"verified": 1, "mismatched": 1}


@pytest.mark.parametrize(
    ("spec", "shape"),
    [(SPEC, (2,)), (replace(SPEC, shape=(2, 3)), (2, 3)), (replace(FRAMES, shape=(23, 11, 3)), (23, 11, 3))],
)
def test_a_worker_and_the_trainer_see_the_same_policy_inputs(spec: EnvironmentSpec, shape: tuple[int, ...]) -> None:
    raw = np.random.default_rng(0).integers(0, 256, (6, *shape)).astype(spec.dtype)
    previous = spec.frames(raw[:1])
    stepwise = []
    for observation in raw:
        frames = spec.frames(observation[None])
        stepwise.append(spec.inputs(frames, previous)[0])
        previous = frames
    at_once = spec.episode_inputs(raw)
    assert at_once.shape == (6, spec.width)
    np.testing.assert_array_equal(at_once, stepwise)


def test_an_image_is_reduced_to_the_means_of_its_blocks() -> None:
    image = np.zeros((1, 10, 5, 3), np.uint8)
    image[0, 5:] = 255
    np.testing.assert_allclose(replace(FRAMES, shape=(10, 5, 3)).frames(image), [[0.0, 1.0]], rtol=1e-6)


def test_rings_are_as_large_as_the_environment_s_episodes_and_as_memory_allows() -> None:
    assert ring_size(SPEC, None) == (500, 32)
    steps, slots = ring_size(FRAMES, None)  # cut at 128 MiB
    assert (steps > 1300, slots) == (True, 8)
    assert ring_size(SPEC, 4096)[0] < 500
    with pytest.raises(ConfigError, match="an episode of one step takes"):
        ring_size(SPEC, 64)
