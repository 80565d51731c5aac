"""Groups of completions, as in GRPO: small records of tokens and log-probabilities beside one large tensor each.

    python examples/llm_groups.py                        # 16 MB a completion, about a minute
    python examples/llm_groups.py --tensor-bytes 1MiB    # smaller

Two rollout workers sample groups of completions of the same prompt from a toy policy. Beside its tokens each completion
carries a tensor of hidden states, which is what makes it heavy. The trainer fetches the next batch while it learns from
this one, drops what is more than `--max-staleness` policy versions old, and sends its weights back. A token's reward is
1 where it is the prompt's secret one, so the mean reward climbs from 1/vocabulary to nearly 1.
"""

from __future__ import annotations

import argparse
import multiprocessing
import queue
from collections import Counter, defaultdict
from contextlib import suppress
from typing import Any

import numpy as np

from ucxx_transport import UCXXDataPackerMixin, UCXXRolloutMixin
from ucxx_transport.units import parse_bytes

PROMPTS, VOCABULARY, MAX_TOKENS = 16, 32, 24
GROUP = 8
SECRET = np.random.default_rng(7).integers(0, VOCABULARY, PROMPTS)


def log_softmax(logits: Any) -> Any:
    """Of the last axis."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


class Rollouts(UCXXRolloutMixin):
    """A rollout worker: samples groups, writes each completion into its ring, sends the record."""

    def run(self, seat: int, records: Any, weights: Any, stopping: Any, tensor_bytes: int) -> None:
        """Sample until asked to stop."""
        rng = np.random.default_rng(seat)
        hidden = rng.standard_normal(tensor_bytes // 4).astype(np.float32)
        version, policy = weights.get()
        self.setup_ucxx(
            f"worker-{seat}",
            varlen={"tokens": MAX_TOKENS, "logprobs": MAX_TOKENS, "reward": MAX_TOKENS},
            ring={"slots": 6 * GROUP, "block_timeout_s": 1.0},
            on_error="drop",  # with no slot free in time: the worker then checks whether to stop
            reward="reward",
        )
        while not stopping.is_set():
            with suppress(queue.Empty):
                version, policy = weights.get_nowait()
            prompt = int(rng.integers(PROMPTS))
            group = int(rng.integers(1 << 62))
            logprobs = log_softmax(policy[prompt])
            for _ in range(GROUP):
                tokens = rng.choice(VOCABULARY, size=int(rng.integers(4, MAX_TOKENS + 1)), p=np.exp(logprobs))
                record = self.write_to_buffer(
                    {
                        "prompt": np.int32(prompt),
                        "tokens": tokens.astype(np.int32),
                        "logprobs": logprobs[tokens].astype(np.float32),
                        "reward": (tokens == SECRET[prompt]).astype(np.float32),
                        "hidden": hidden,
                    },
                    policy_version=version,
                    meta={"group": group},
                )
                self.hand_over(record, records, stopping)
        records.cancel_join_thread()
        self.cleanup_ucxx()

    def hand_over(self, record: dict[str, object], records: Any, stopping: Any) -> None:
        """Give the trainer a record, unless it wants no more."""
        while not stopping.is_set():
            with suppress(queue.Full):
                records.put(record, timeout=0.5)
                return


class TokenPacker:
    """The framework's packer: what the learner needs of one completion."""

    def get_policy_input(
        self, sample: Any = None, rollout_output: Any = None, n_ignore_prefix_tokens: int = 0, **kwargs: Any
    ) -> Any:
        """Prompt, tokens, their old log-probabilities, their mean reward, and something of the large tensor."""
        del sample, kwargs
        tokens = rollout_output["tokens"][n_ignore_prefix_tokens:]
        logprobs = rollout_output["logprobs"][n_ignore_prefix_tokens:]
        norm = float(np.abs(rollout_output["hidden"]).mean())
        return (
            int(rollout_output["prompt"]),
            tokens.copy(),
            logprobs.copy(),
            float(rollout_output["reward"].mean()),
            norm,
        )


class Packer(UCXXDataPackerMixin, TokenPacker):
    """The same on rings; counts the episodes that are lost."""

    def __init__(self) -> None:
        self.lost: Counter[str] = Counter()

    def on_episode_lost(self, loss: Any) -> None:
        """Count it by reason."""
        self.lost[loss.reason.value] += 1


def learn(policy: np.ndarray, completions: list[tuple[Any, Any]], rate: float = 10.0, clip: float = 0.2) -> None:
    """One clipped policy-gradient step on (group, completion) pairs; advantages within each group."""
    groups = defaultdict(list)
    for group, completion in completions:
        groups[group].append(completion)
    step = np.zeros_like(policy)
    for members in groups.values():
        rewards = np.array([reward for *_, reward, _ in members])
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
        for (prompt, tokens, old, _, _), advantage in zip(members, advantages, strict=True):
            new = log_softmax(policy[prompt])
            ratio = np.exp(new[tokens] - old)
            weight = np.where((advantage > 0) == (ratio > 1 + np.sign(advantage) * clip), 0.0, ratio * advantage)
            np.add.at(step[prompt], tokens, weight / len(tokens))
            step[prompt] -= np.exp(new) * weight.sum() / len(tokens)
    policy += rate * step / GROUP


def main(arguments: list[str] | None = None) -> float:
    """Train; returns the mean reward of the last five batches."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensor-bytes", type=parse_bytes, default="16MB", help="hidden states of a completion (16MB)")
    parser.add_argument("--steps", type=int, default=150, help="batches to learn from (150)")
    parser.add_argument("--batch", type=int, default=2 * GROUP, help="completions of a batch (16)")
    parser.add_argument("--max-staleness", type=int, default=8, help="policy versions a completion may be old (8)")
    options = parser.parse_args(arguments)

    context = multiprocessing.get_context("spawn")
    records: Any = context.Queue(2 * options.batch)
    weights: Any = [context.Queue(1) for _ in range(2)]
    stopping = context.Event()
    workers = [
        context.Process(target=Rollouts().run, args=(seat, records, weights[seat], stopping, options.tensor_bytes))
        for seat in range(2)
    ]
    for worker in workers:
        worker.start()

    packer = Packer()
    packer.setup_ucxx_data_packer(max_staleness=options.max_staleness)
    policy = np.zeros((PROMPTS, VOCABULARY))
    curve: list[float] = []

    def publish(version: int) -> None:
        for each in weights:
            with suppress(queue.Empty):
                each.get_nowait()
            with suppress(queue.Full):  # the last ones are on their way to the worker; the next will reach it
                each.put_nowait((version, policy.copy()))

    def next_batch() -> list[Any]:
        return [records.get(timeout=60) for _ in range(options.batch)]

    try:
        publish(0)
        packer.start_prefetch(next_batch(), policy_version=0)
        for version in range(1, options.steps + 1):
            batch = packer.collect_prefetch()
            packer.start_prefetch(next_batch(), policy_version=version)  # fetched while this batch is learnt from
            completions = [
                (record["ref"]["meta"]["group"], packer.get_policy_input(None, record)) for record in batch or []
            ]
            if completions:
                learn(policy, completions)
                curve.append(float(np.mean([completion[3] for _, completion in completions])))
            publish(version)
            if version % 10 == 0 and curve:
                print(f"step {version}: mean reward {np.mean(curve[-10:]):.2f}, lost {dict(packer.lost)}", flush=True)
    finally:
        stopping.set()
        packer.shutdown_ucxx_data_packer()
        for worker in workers:
            worker.join(30)
    return float(np.mean(curve[-5:]))


if __name__ == "__main__":
    print(f"mean reward of the last batches: {main():.2f}")
