"""One episode as it travels: the ring's schema, and the arrays at both ends.

| field      | shape               | dtype   | what                                                  |
|------------|---------------------|---------|-------------------------------------------------------|
| obs        | (T + 1, *obs shape) | the env | raw observations, the one after the last step included |
| actions    | (T,)                | int32   | what was done                                          |
| rewards    | (T,)                | float32 | what came of it                                        |
| logits     | (T, actions)        | float32 | of the policy that chose, at that moment                |
| versions   | (T,)                | uint32  | which weights that policy had                          |
| terminated | (1,)                | bool    | the episode ended there, rather than at a limit        |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import xxhash

from cartpole.network import Array

__all__ = ["Episode"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Episode:
    """The arrays of one episode, named as in the table above."""

    obs: Array
    actions: Array
    rewards: Array
    logits: Array
    versions: Array
    terminated: Array

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array]) -> Episode:
        """Take the payload's fields as they are, without a copy."""
        return cls(**{name: arrays[name] for name in cls.__slots__})

    def to_arrays(self) -> dict[str, Array]:
        """The fields by name, as the ring's `write` takes them."""
        return {name: getattr(self, name) for name in self.__slots__}

    def digest(self) -> int:
        """xxh3_64 over the values of all fields, in the table's order: equal exactly when every byte is."""
        hashed = xxhash.xxh3_64()
        for name in self.__slots__:
            hashed.update(np.ascontiguousarray(getattr(self, name)).data)
        return hashed.intdigest()

    @property
    def steps(self) -> int:
        """T, the number of steps."""
        return len(self.actions)

    @property
    def total_reward(self) -> float:
        """The episode's return, undiscounted."""
        return float(self.rewards.sum())
