"""How large the rings are: derived from the environment unless told."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cartpole.environment import EnvironmentFacts
from ucxx_transport import Schema, TensorSpec
from ucxx_transport.errors import ConfigError

__all__ = ["RingSize", "episode_schema", "plan_ring_size"]

_SLOT_LIMIT_BYTES = 128 << 20  # a Pong game of raw frames takes 77-94 MB; a longer one is cut there
_RING_LIMIT_BYTES = 1 << 30
_MOST_SLOTS = 32
_FEWEST_SLOTS = 3
_LARGE_SLOT_BYTES = 4 << 20
_SMALL_LANES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class RingSize:
    """One rollout worker's ring.

    Attributes:
        max_steps: an episode is cut off there, to fit its slot.
        slot_bytes: what the schema takes for an episode of that length.
        slots: of the ring.
        lanes: environments that the worker steps side by side.
    """

    max_steps: int
    slot_bytes: int
    slots: int
    lanes: int


def episode_schema(facts: EnvironmentFacts, max_steps: int) -> Schema:
    """The schema of `trajectory`'s table; every field but the last varies in length."""
    features = facts.features
    return Schema(
        [
            TensorSpec("obs", (max_steps + 1, *features.shape), facts.observation_dtype, varlen=True),
            TensorSpec("actions", (max_steps,), "int32", varlen=True),
            TensorSpec("rewards", (max_steps,), "float32", varlen=True),
            TensorSpec("logits", (max_steps, facts.actions), "float32", varlen=True),
            TensorSpec("versions", (max_steps,), "uint32", varlen=True),
            TensorSpec("terminated", (1,), "bool"),
        ]
    )


def plan_ring_size(facts: EnvironmentFacts, *, slots: int | None, slot_bytes: int | None) -> RingSize:
    """Fit the environment's episodes into slots, and the slots into memory.

    Args:
        facts: shapes and step limit.
        slots: how many, or None to derive it.
        slot_bytes: the largest slot allowed, or None to derive it.

    Raises:
        ConfigError: not even one step fits into a slot.
    """
    one, two = (episode_schema(facts, steps).nbytes for steps in (1, 2))
    frame = int(np.prod(facts.features.shape, dtype=int)) * np.dtype(facts.observation_dtype).itemsize
    step_bytes = frame + 4 + 4 + 4 * facts.actions + 4
    limit = slot_bytes if slot_bytes is not None else _SLOT_LIMIT_BYTES
    if limit < one:
        raise ConfigError(
            f"an episode of one step takes {one} bytes: give slots of that size at least",
            field="--slot-bytes",
            value=limit,
        )
    steps = min(facts.max_steps, max(1, (limit - one) // max(step_bytes, two - one)))
    while steps > 1 and episode_schema(facts, steps).nbytes > limit:
        steps -= 1
    nbytes = episode_schema(facts, steps).nbytes
    derived = min(_MOST_SLOTS, max(_FEWEST_SLOTS, _RING_LIMIT_BYTES // nbytes))
    return RingSize(
        max_steps=steps,
        slot_bytes=nbytes,
        slots=slots if slots is not None else derived,
        lanes=1 if nbytes > _LARGE_SLOT_BYTES else _SMALL_LANES,
    )
