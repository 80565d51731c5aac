"""Two data-parallel ranks of which one loses episodes, and no collective hangs.

    pip install 'ucxx_transport[torch]'
    python examples/data_parallel.py                       # a lost episode's place is taken by another of its batch
    python examples/data_parallel.py --on-missing shrink   # all ranks train on as many as the rank with the fewest has

A rank does one backward pass an episode, and each of them is a collective of `DistributedDataParallel`. So all ranks
have to agree on how many there are. A worker writes episodes of a linear function with noise; every third batch of rank
1 has one that was played too long ago, and once all of them are.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
from collections import Counter
from typing import Any

import numpy as np

from ucxx_transport import TrajectoryWriter, TransportError, UCXXDataPackerMixin
from ucxx_transport.trainer import LossReason

RANKS = 2
FUNCTION = np.array([1.0, -2.0, 3.0], np.float32)
FRESH, OLD = 9, 1


class Regression:
    """The framework's packer: inputs and targets of one episode."""

    def get_policy_input(
        self, sample: Any = None, rollout_output: Any = None, n_ignore_prefix_tokens: int = 0, **kwargs: Any
    ) -> Any:
        """Tensors in the worker's slot itself."""
        del sample, n_ignore_prefix_tokens, kwargs
        return rollout_output["x"], rollout_output["y"]


class Packer(UCXXDataPackerMixin, Regression):
    """The same on rings."""


def collected(packer: Packer) -> list[Any]:
    """The rollouts of the next batch; none where nothing came that a lost one could be replaced by."""
    try:
        return packer.collect_prefetch()
    except TransportError as error:
        if any(loss.reason is not LossReason.TOO_OLD for loss in packer.prefetch_missing):
            raise
        print(error.message, flush=True)
        return []


def rank_main(rank: int, folder: str, batches: Any, options: argparse.Namespace) -> None:
    """One rank: train on the batches that come."""
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=rank, world_size=RANKS)
    model = DistributedDataParallel(torch.nn.Linear(len(FUNCTION), 1, bias=False))
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    packer = Packer()
    packer.setup_ucxx_data_packer("cpu", max_staleness=2, on_missing=options.on_missing)
    sizes: Counter[int] = Counter()
    packer.start_prefetch(batches.get(), policy_version=FRESH)
    for step in range(options.steps):
        rollouts = collected(packer)
        if step + 1 < options.steps:
            packer.start_prefetch(batches.get(), policy_version=FRESH)  # fetched while this batch is trained on
        fewest = torch.tensor(len(rollouts))
        dist.all_reduce(fewest, op=dist.ReduceOp.MIN)  # all ranks do as many passes, and skip a step together
        size = int(fewest)
        optimiser.zero_grad()
        for record in rollouts[:size]:
            inputs, targets = packer.get_policy_input(None, record)
            (((model(inputs)[:, 0] - targets) ** 2).mean() / size).backward()
        optimiser.step()
        sizes[size] += 1
    assert packer.ucxx_feed is not None
    losses = dict(packer.ucxx_feed.statistics().losses)
    packer.shutdown_ucxx_data_packer()
    off_by = float(np.abs(model.module.weight.detach().numpy()[0] - FUNCTION).max())
    print(f"rank {rank}: batches by size {dict(sorted(sizes.items()))}, lost {losses}, off by {off_by:.3f}", flush=True)
    dist.destroy_process_group()


def play(writer: TrajectoryWriter, random: np.random.Generator, version: int) -> dict[str, Any]:
    """Write one episode; its record."""
    inputs = random.standard_normal((50, len(FUNCTION))).astype(np.float32)
    targets = inputs @ FUNCTION + 0.01 * random.standard_normal(50).astype(np.float32)
    return writer.write({"x": inputs, "y": targets}, policy_version=version).to_dict()


def main(arguments: list[str] | None = None) -> int:
    """Write for both ranks until they are done; the number of ranks that failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--on-missing", choices=["shrink", "refill"], default="refill", help="see RolloutFeed")
    parser.add_argument("--steps", type=int, default=60, help="batches of each rank (60)")
    parser.add_argument("--batch", type=int, default=4, help="episodes of a batch (4)")
    options = parser.parse_args(arguments)
    context = multiprocessing.get_context("spawn")
    queues: list[Any] = [context.Queue() for _ in range(RANKS)]
    random = np.random.default_rng(0)
    ring = {"slots": 8 * RANKS * options.batch, "on_full": "block", "block_timeout_s": 240}  # ranks import torch first
    with tempfile.TemporaryDirectory() as folder, TrajectoryWriter("worker-0", ring=ring, serve=False) as writer:
        ranks = [
            context.Process(target=rank_main, args=(rank, folder, batches, options))
            for rank, batches in enumerate(queues)
        ]
        for each in ranks:
            each.start()
        for step in range(options.steps):
            for rank, batches in enumerate(queues):
                old = 0 if rank == 0 or step % 3 else 1  # of the batch, so many are lost
                old = options.batch if rank == 1 and step == 5 else old
                versions = [OLD] * old + [FRESH] * (options.batch - old)
                batches.put([play(writer, random, version) for version in versions])
        for each in ranks:
            each.join()
    return sum(each.exitcode != 0 for each in ranks)


if __name__ == "__main__":
    raise SystemExit(main())
