"""A rollout worker process: plays episodes, writes each into its ring, sends the record to the trainer.

The record is a few hundred bytes; the episode stays in the ring until the trainer has fetched it.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from cartpole.environment import EnvironmentSpec, make_environment
from cartpole.plan import Plan, digest_of, episode_schema
from cartpole.policy import Array, Network, policy_network, sample_actions
from cartpole.processes import Seat, begin_child
from ucxx_transport import DeadlineExceededError, ServerConfig, UCXXRolloutMixin

__all__ = ["EpisodeLanes", "run_worker"]

_LARGE_EPISODE_BYTES = 4 << 20


def run_worker(plan: Plan, seat: int, worker: int, queues: Seat, parent_pid: int) -> None:
    """The whole life of the process on `seat`, which is worker number `worker`, until it is asked to stop."""
    stop = begin_child(parent_pid, plan.log)
    rollouts = RolloutWorker(plan, seat, worker, queues, stop)
    try:
        rollouts.play()
    finally:
        rollouts.cleanup_ucxx()
        queues.close()


class RolloutWorker(UCXXRolloutMixin):
    """A policy, a few environments, and a ring for their episodes."""

    def __init__(self, plan: Plan, seat: int, worker: int, queues: Seat, stop: threading.Event) -> None:
        self.plan = plan
        self.queues = queues
        self.stop = stop
        self.place = {"seat": seat, "worker": worker}
        self.policy = policy_network(plan.environment.width, plan.environment.actions, np.random.default_rng(0))
        self.version: int | None = None
        self.setup_ucxx(
            f"worker-{worker}",  # a replacement takes over the name, and has a larger epoch in the store
            schema=plan.schema,
            ring={"name": plan.ring_name(seat), "slots": plan.slots, "checksum": True},
            server=ServerConfig(ports=plan.ports),
            reward="rewards",
            store=plan.store,
            store_config=plan.store_config if plan.store is not None else None,
            store_meta=self.place,
        )

    def play(self) -> None:
        """Step all environments, write what ended, take new weights; until asked to stop."""
        while self.version is None:
            if self.stop.wait(0.02):
                return
            self.take_weights()
        lanes = 8 if self.plan.schema.nbytes < _LARGE_EPISODE_BYTES else 1
        environments = [make_environment(self.plan.environment.name) for _ in range(lanes)]
        seed = 100 * self.plan.seed + self.place["seat"]
        episodes = EpisodeLanes(environments, self.plan.environment, max_steps=self.plan.max_steps, seed=seed)
        while not self.stop.is_set():
            for episode in episodes.step(self.policy):
                self.send(episode)
            self.take_weights()
        for environment in environments:
            environment.close()

    def take_weights(self) -> None:
        """Act with the trainer's newest weights from now on, if there are any."""
        with suppress(queue.Empty):
            self.version, parameters = self.queues.weights.get_nowait()
            self.policy.load(parameters)

    def send(self, episode: dict[str, Array]) -> None:
        """Write an episode into the ring and send its record. Waits for a free slot: the trainer sets the pace."""
        meta = {**self.place, "digest": digest_of(episode)}
        while not self.stop.is_set():
            with suppress(DeadlineExceededError):
                record = self.write_to_buffer(episode, policy_version=self.version, meta=meta, deadline_s=0.5)
                self.queues.records.put(record)
                return


class EpisodeLanes:
    """Environments that are stepped side by side: one forward pass serves them all.

    Args:
        environments: Gymnasium environments of one kind.
        spec: that kind.
        max_steps: an episode is cut there.
        seed: of actions and environments.
    """

    def __init__(self, environments: Sequence[Any], spec: EnvironmentSpec, *, max_steps: int, seed: int) -> None:
        self._environments = environments
        self._spec = spec
        self._max_steps = max_steps
        self._rng = np.random.default_rng(seed)
        # One episode in full size a lane, reused for the next; memory is touched only as far as episodes reach.
        self._arrays = [
            {field.name: np.empty(field.shape, field.dtype) for field in episode_schema(spec, max_steps)}
            for _ in environments
        ]
        self._steps = [0] * len(environments)
        self._frames = np.zeros((len(environments), spec.frame_width), np.float32)
        self._previous = self._frames.copy()
        for lane in range(len(environments)):
            self._reset(lane, 1000 * seed + lane)

    def step(self, policy: Network) -> list[dict[str, Array]]:
        """One step of every environment.

        Args:
            policy: chooses the actions.

        Returns:
            The episodes that ended with this step, as views that the next step overwrites.
        """
        for lane, steps in enumerate(self._steps):
            if steps < 0:
                self._reset(lane, None)
        logits, _ = policy.forward(self._spec.inputs(self._frames, self._previous))
        actions = sample_actions(logits, self._rng)
        self._previous[...] = self._frames
        ended = []
        for lane, environment in enumerate(self._environments):
            arrays, step = self._arrays[lane], self._steps[lane]
            action = int(actions[lane])
            observation, reward, terminated, truncated, _ = environment.step(action + self._spec.first_action)
            arrays["actions"][step], arrays["rewards"][step] = action, reward
            arrays["logits"][step], arrays["obs"][step + 1] = logits[lane], observation
            arrays["terminated"][0] = terminated
            steps = self._steps[lane] = step + 1
            if terminated or truncated or steps == self._max_steps:
                ended.append(_cut(arrays, steps))
                self._steps[lane] = -1
            else:
                self._frames[lane] = self._spec.frames(arrays["obs"][steps : steps + 1])[0]
        return ended

    def _reset(self, lane: int, seed: int | None) -> None:
        observations = self._arrays[lane]["obs"]
        observations[0], _ = self._environments[lane].reset(seed=seed)
        self._frames[lane] = self._previous[lane] = self._spec.frames(observations[:1])[0]
        self._steps[lane] = 0


def _cut(arrays: dict[str, Array], steps: int) -> dict[str, Array]:
    """The part of the arrays that an episode of so many steps has filled."""
    lengths = {"obs": steps + 1, "terminated": 1}
    return {name: array[: lengths.get(name, steps)] for name, array in arrays.items()}
