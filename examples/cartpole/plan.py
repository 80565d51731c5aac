"""One run's settings, fixed before any process starts: the payload's schema, and how large the rings are.

| field      | shape               | dtype           | what                                                   |
|------------|---------------------|-----------------|--------------------------------------------------------|
| obs        | (T + 1, *obs shape) | the observation | raw observations, the one after the last step included |
| actions    | (T,)                | int32           | what was done                                          |
| rewards    | (T,)                | float32         | what it brought                                        |
| logits     | (T, actions)        | float32         | of the policy that chose                               |
| terminated | (1,)                | bool            | the episode ended there, rather than at a limit        |
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import xxhash

from cartpole.environment import EnvironmentSpec
from cartpole.policy import Array
from ucxx_transport import ConfigError, Schema, StoreConfig, TensorSpec

__all__ = ["Local", "Plan", "digest_of", "episode_schema", "ring_size"]

Local = Literal["auto", "view", "copy", "off"]

_SPARE_SEATS = 3
_SLOT_LIMIT_BYTES = 128 << 20  # a Pong game of raw frames takes 77-94 MB; a longer one is cut there
_RING_LIMIT_BYTES = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One run. A *seat* is the place of one worker process: a replacement takes the next free one.

    Attributes:
        run_id: names this run's segments and processes, so that no others are counted as its own.
        environment: what is learnt.
        max_steps: an episode is cut there, to fit its slot.
        slots: of each ring.
        local: "mixed" reads every second worker in place and the others over UCX; else it is every client's setting.
        episodes: stop after so many; None: no limit.
        goal: mean return over the last 50 episodes to reach; None: no goal.
        store: where the trainer finds its workers; None: it listens to all seats.
    """

    run_id: str
    environment: EnvironmentSpec
    max_steps: int
    slots: int
    workers: int
    ports: int
    local: Local | Literal["mixed"]
    seconds: float
    episodes: int | None
    goal: float | None
    kill: bool
    seed: int
    store: str | None
    out: Path

    @property
    def log(self) -> Path:
        """Where the output of the child processes goes."""
        return self.out.with_suffix(".log")

    @property
    def schema(self) -> Schema:
        """Of every episode."""
        return episode_schema(self.environment, self.max_steps)

    @property
    def store_config(self) -> StoreConfig:
        """This run's part of the store."""
        return StoreConfig(namespace=f"demo-{self.run_id}")

    @property
    def seats(self) -> int:
        """Worker processes that there may be, replacements included."""
        return self.workers + _SPARE_SEATS

    def ring_name(self, seat: int | str) -> str:
        """The ring of the worker on this seat."""
        return f"demo-{self.run_id}-{seat}"

    def local_of(self, worker: int) -> Local:
        """How the trainer reads from a worker, and from those that replace it."""
        if self.local != "mixed":
            return self.local
        return "auto" if worker % 2 == 0 else "off"


def episode_schema(environment: EnvironmentSpec, max_steps: int) -> Schema:
    """The table above, for episodes of at most `max_steps` steps."""
    return Schema(
        [
            TensorSpec("obs", (max_steps + 1, *environment.shape), environment.dtype, varlen=True),
            TensorSpec("actions", (max_steps,), "int32", varlen=True),
            TensorSpec("rewards", (max_steps,), "float32", varlen=True),
            TensorSpec("logits", (max_steps, environment.actions), "float32", varlen=True),
            TensorSpec("terminated", (1,), "bool"),
        ]
    )


def ring_size(environment: EnvironmentSpec, slot_bytes: int | None) -> tuple[int, int]:
    """The most steps of an episode that fit a slot, and the number of slots: 3 to 32, within 1 GiB.

    Args:
        environment: its shapes and step limit.
        slot_bytes: the largest slot allowed; None: 128 MiB.

    Raises:
        ConfigError: not even one step fits into a slot.
    """
    limit = _SLOT_LIMIT_BYTES if slot_bytes is None else slot_bytes
    lengths = range(1, environment.max_steps + 1)
    steps = bisect.bisect_right(lengths, limit, key=lambda length: episode_schema(environment, length).nbytes)
    nbytes = episode_schema(environment, max(steps, 1)).nbytes
    if steps == 0:
        needed = f"an episode of one step takes {nbytes} bytes: give slots of that size at least"
        raise ConfigError(needed, field="--slot-bytes", value=limit)
    return steps, min(32, max(3, _RING_LIMIT_BYTES // nbytes))


def digest_of(episode: Mapping[str, Array]) -> int:
    """xxh3_64 over the bytes of all fields, in the order of their names."""
    digest = xxhash.xxh3_64()
    for name in sorted(episode):
        digest.update(np.ascontiguousarray(episode[name]).data)
    return digest.intdigest()
