"""A torch policy on a Gymnasium environment; raw Atari frames of 10 to 90 MB an episode, if you like.

    pip install 'ucxx_transport[cpu,torch,atari]'
    python examples/torch_policy.py --env CartPole-v1           # half a minute: the mean return climbs
    python examples/torch_policy.py --env ALE/Pong-v5 --max-steps 900  # raw frames, 90 MB an episode

Two rollout workers play and write whole episodes of raw observations into their rings. The trainer fetches the next
batch while it learns from this one. Its tensors lie in the workers' slots themselves (with `--local off` in the buffers
that UCX received them in): no frame is copied before the policy looks at it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import queue
import time
from collections import Counter
from contextlib import suppress
from typing import Any

import gymnasium
import numpy as np
import torch
from torch import nn
from torch.nn.functional import avg_pool2d

from ucxx_transport import ClientConfig, Schema, TensorSpec, UCXXDataPackerMixin, UCXXRolloutMixin


def make_environment(name: str) -> Any:
    """A Gymnasium environment, Atari's too."""
    if name.startswith("ALE/"):
        import ale_py

        gymnasium.register_envs(ale_py)
    return gymnasium.make(name)


class Policy(nn.Module):  # type: ignore[misc]  # torch is not always there to be looked at
    """Logits from observations; of an image it sees a small grey one, and its change since the last."""

    def __init__(self, observation_shape: tuple[int, ...], actions: int, units: int) -> None:
        super().__init__()
        self.sees_images = len(observation_shape) == 3
        width = (
            observation_shape[0]
            if not self.sees_images
            else 2 * (observation_shape[0] // 5) * (observation_shape[1] // 5)
        )
        self.layers = nn.Sequential(nn.Linear(width, units), nn.Tanh(), nn.Linear(units, actions))

    def features(self, observations: torch.Tensor) -> torch.Tensor:
        """Of successive observations of one episode, shape (T, …): (T, width), float32."""
        if not self.sees_images:
            return observations.float()
        grey = observations.float().mean(dim=3)[:, None] / 255
        small = avg_pool2d(grey, 5).flatten(1)
        return torch.cat([small, small - torch.cat([small[:1], small[:-1]])], dim=1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Logits, shape (T, actions)."""
        logits: torch.Tensor = self.layers(features)
        return logits


class Rollouts(UCXXRolloutMixin):
    """A rollout worker: plays whole episodes, writes each into its ring, sends the record."""

    def run(self, seat: int, options: Any, records: Any, weights: Any, stopping: Any) -> None:
        """Play until asked to stop."""
        torch.set_num_threads(1)
        environment = make_environment(options.env)
        space, steps = environment.observation_space, options.max_steps
        policy = Policy(space.shape, int(environment.action_space.n), options.units)
        version = self.adopt(policy, weights.get())
        fields = [("obs", space.shape, space.dtype), ("action", (), "int64"), ("logprob", (), "float32")]
        fields.append(("reward", (), "float32"))
        self.setup_ucxx(
            f"worker-{seat}",
            schema=Schema([TensorSpec(name, (steps, *shape), dtype, varlen=True) for name, shape, dtype in fields]),
            ring={"slots": 3 * options.batch, "block_timeout_s": 1.0},
            on_error="drop",  # with no slot free in time: the worker then checks whether to stop
            reward="reward",
        )
        observations = np.empty((steps, *space.shape), space.dtype)
        generator = torch.Generator().manual_seed(seat)
        while not stopping.is_set():
            with suppress(queue.Empty):
                version = self.adopt(policy, weights.get_nowait())
            episode = self.play(environment, policy, observations, generator)
            record = self.write_to_buffer(episode, policy_version=version)
            while not stopping.is_set():
                with suppress(queue.Full):
                    records.put(record, timeout=0.5)
                    break
        records.cancel_join_thread()
        self.cleanup_ucxx()

    def adopt(self, policy: Policy, message: tuple[int, dict[str, Any]]) -> int:
        """Take over weights; returns their version."""
        version, state = message
        policy.load_state_dict({name: torch.from_numpy(array) for name, array in state.items()})
        return version

    @torch.no_grad()  # type: ignore[untyped-decorator]  # likewise
    def play(self, environment: Any, policy: Policy, observations: Any, generator: torch.Generator) -> dict[str, Any]:
        """One episode, as views of `observations`."""
        observation, _ = environment.reset(seed=int(torch.randint(1 << 31, (), generator=generator)))
        actions, logprobs, rewards = [], [], []
        for step in range(len(observations)):
            observations[step] = observation
            recent = torch.from_numpy(observations[max(0, step - 1) : step + 1])
            distribution = policy(policy.features(recent))[-1].log_softmax(0)
            action = int(torch.multinomial(distribution.exp(), 1, generator=generator))
            observation, reward, terminated, truncated, _ = environment.step(action)
            actions.append(action)
            logprobs.append(float(distribution[action]))
            rewards.append(float(reward))
            if terminated or truncated:
                break
        return {
            "obs": observations[: len(actions)],
            "action": np.array(actions, np.int64),
            "logprob": np.array(logprobs, np.float32),
            "reward": np.array(rewards, np.float32),
        }


class EpisodePacker:
    """The framework's packer: what the learner needs of one episode."""

    def __init__(self, policy: Policy, discount: float) -> None:
        self.policy = policy
        self.discount = discount

    def get_policy_input(
        self, sample: Any = None, rollout_output: Any = None, n_ignore_prefix_tokens: int = 0, **kwargs: Any
    ) -> Any:
        """Features, actions, old log-probabilities, and returns-to-go."""
        del sample, n_ignore_prefix_tokens, kwargs
        rewards = rollout_output["reward"]
        returns = torch.empty_like(rewards)
        following = 0.0
        for step in range(len(rewards) - 1, -1, -1):
            following = float(rewards[step]) + self.discount * following
            returns[step] = following
        features = self.policy.features(rollout_output["obs"])
        return features, rollout_output["action"].clone(), rollout_output["logprob"].clone(), returns


class Packer(UCXXDataPackerMixin, EpisodePacker):
    """The same on rings; counts the episodes that are lost."""

    def __init__(self, policy: Policy, discount: float) -> None:
        super().__init__(policy, discount)
        self.lost: Counter[str] = Counter()

    def on_episode_lost(self, loss: Any) -> None:
        """Count it by reason."""
        self.lost[loss.reason.value] += 1


def learn(policy: Policy, optimiser: torch.optim.Optimizer, episodes: list[Any], passes: int = 4) -> None:
    """A clipped policy-gradient update on whole episodes."""
    features, actions, old, returns = (torch.cat(column) for column in zip(*episodes, strict=True))
    advantages = (returns - returns.mean()) / (returns.std() + 1e-6)
    for _ in range(passes):
        logprobs = policy(features).log_softmax(1)
        ratio = (logprobs.gather(1, actions[:, None])[:, 0] - old).exp()
        gain = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()
        entropy = -(logprobs.exp() * logprobs).sum(1).mean()
        optimiser.zero_grad()
        (-gain - 0.01 * entropy).backward()
        optimiser.step()


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="CartPole-v1", help="a Gymnasium environment with discrete actions")
    parser.add_argument("--max-steps", type=int, default=500, help="steps of an episode, at most (500)")
    parser.add_argument("--steps", type=int, default=60, help="batches to learn from (60)")
    parser.add_argument("--batch", type=int, default=16, help="episodes of a batch (16)")
    parser.add_argument("--units", type=int, default=128, help="of the hidden layer (128)")
    parser.add_argument("--discount", type=float, default=0.99)
    parser.add_argument("--local", choices=["auto", "view", "copy", "off"], default="auto", help="see ClientConfig")
    return parser.parse_args(arguments)


class Trainer:
    """Policy, packer and the queues."""

    def __init__(self, options: argparse.Namespace, records: Any, weights: list[Any]) -> None:
        torch.manual_seed(0)
        self.options, self.records, self.weights = options, records, weights
        environment = make_environment(options.env)
        self.policy = Policy(environment.observation_space.shape, int(environment.action_space.n), options.units)
        environment.close()
        self.optimiser = torch.optim.Adam(self.policy.parameters(), lr=5e-3)
        self.packer = Packer(self.policy, options.discount)
        self.packer.setup_ucxx_data_packer(device="cpu", client=ClientConfig(local=options.local))
        self.curve: list[float] = []

    def train(self) -> list[float]:
        """Learn from batches; the mean return of each."""
        self.publish(0)
        self.packer.start_prefetch(self.next_batch())
        began_s = time.monotonic()
        for version in range(1, self.options.steps + 1):
            batch = self.packer.collect_prefetch()
            self.packer.start_prefetch(self.next_batch())  # fetched while this batch is learnt from
            episodes = [self.packer.get_policy_input(None, record) for record in batch]
            self.curve.append(float(np.mean([record["rewards"]["sum"] for record in batch])))
            learn(self.policy, self.optimiser, episodes)
            self.publish(version)
            if version % 10 == 0:
                self.print_progress(version, time.monotonic() - began_s)
        return self.curve

    def publish(self, version: int) -> None:
        """Send the weights to every worker; one that has not taken the last ones gets these instead."""
        state = {name: tensor.numpy().copy() for name, tensor in self.policy.state_dict().items()}
        for each in self.weights:
            with suppress(queue.Empty):
                each.get_nowait()
            with suppress(queue.Full):  # the last ones are on their way to the worker; the next will reach it
                each.put_nowait((version, state))

    def next_batch(self) -> list[Any]:
        """Records of the episodes to learn from after those on their way."""
        return [self.records.get(timeout=60) for _ in range(self.options.batch)]

    def print_progress(self, version: int, elapsed_s: float) -> None:
        """Print the mean return, the losses and the rate."""
        assert self.packer.ucxx_feed is not None
        rate = self.packer.ucxx_feed.statistics().nbytes / 1e6 / elapsed_s
        mean = np.mean(self.curve[-10:])
        print(f"batch {version}: mean return {mean:.1f}, lost {dict(self.packer.lost)}, {rate:.1f} MB/s", flush=True)


def main(arguments: list[str] | None = None) -> list[float]:
    """Train; returns the mean return of every batch."""
    options = parse(arguments)
    context = multiprocessing.get_context("spawn")
    records: Any = context.Queue(2 * options.batch)
    weights: list[Any] = [context.Queue(1) for _ in range(2)]
    stopping = context.Event()
    workers = [
        context.Process(target=Rollouts().run, args=(seat, options, records, weights[seat], stopping))
        for seat in range(2)
    ]
    for worker in workers:
        worker.start()
    trainer = Trainer(options, records, weights)
    try:
        return trainer.train()
    finally:
        stopping.set()
        trainer.packer.shutdown_ucxx_data_packer()
        for each in weights:
            each.cancel_join_thread()  # the last weights are larger than a pipe, and no worker takes them
        for worker in workers:
            worker.join(30)


if __name__ == "__main__":
    print(f"mean return of the last ten batches: {np.mean(main()[-10:]):.1f}")
