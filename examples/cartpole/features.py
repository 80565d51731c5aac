"""What the policy sees of an observation. The raw observation goes through the transport; this happens at each end.

| observation space        | frame                                     | policy input                         |
|--------------------------|-------------------------------------------|--------------------------------------|
| Box, other than images   | flattened, float32                        | the frame                            |
| Discrete(n)              | one-hot of n                              | the frame                            |
| Box uint8 (H, W, C)      | mean over C and over blocks of 5 x 5, 0-1 | the frame, and its change since last |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from cartpole.network import Array

__all__ = ["FeatureMap", "ObservationKind"]

ObservationKind = Literal["vector", "discrete", "image"]

_BLOCK = 5  # 210 x 160 becomes 42 x 32: Pong's ball is still a visible change of its block's mean


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureMap:
    """Turns raw observations of one environment into policy inputs.

    Attributes:
        kind: which row of the table above.
        shape: of one raw observation; () for discrete ones.
        categories: n of Discrete(n), else 0.
    """

    kind: ObservationKind
    shape: tuple[int, ...]
    categories: int = 0

    @property
    def frame_width(self) -> int:
        """Length of one frame."""
        if self.kind == "discrete":
            return self.categories
        if self.kind == "image":
            return (self.shape[0] // _BLOCK) * (self.shape[1] // _BLOCK)
        return int(np.prod(self.shape, dtype=int))

    @property
    def width(self) -> int:
        """Length of one policy input."""
        return self.frame_width * (2 if self.kind == "image" else 1)

    def frames(self, observations: Array) -> Array:
        """Reduce raw observations of shape (N, *shape) to frames of shape (N, frame_width), float32."""
        count = len(observations)
        if self.kind == "discrete":
            return np.eye(self.categories, dtype=np.float32)[observations.reshape(count)]
        if self.kind == "image":
            return np.stack([self._pooled(image) for image in observations])
        return observations.reshape(count, -1).astype(np.float32)

    def inputs(self, frames: Array, previous: Array) -> Array:
        """Join frames and those one step before, both (N, frame_width), to policy inputs (N, width)."""
        if self.kind != "image":
            return frames
        return np.concatenate([frames, frames - previous], axis=1)

    def episode_inputs(self, observations: Array) -> Array:
        """Policy inputs (T, width) of the successive observations (T, *shape) of one episode."""
        frames = self.frames(observations)
        return self.inputs(frames, np.concatenate([frames[:1], frames[:-1]]))

    def _pooled(self, image: Array) -> Array:
        # Sums of rows first, in the narrowest type that holds them: 60 µs a Pong frame, against 350 for a plain sum.
        height, width, channels = self.shape
        rows, columns = height // _BLOCK, width // _BLOCK
        bands = image[: rows * _BLOCK, : columns * _BLOCK].reshape(rows, _BLOCK, columns * _BLOCK * channels)
        total = bands[:, 0].astype(np.uint16)
        for line in range(1, _BLOCK):
            total += bands[:, line]
        block = _BLOCK * channels
        share = np.full(block, 1.0 / (255 * _BLOCK * block), np.float32)
        return np.asarray(total.reshape(rows * columns, block).astype(np.float32) @ share)


def observation_kind(shape: Sequence[int], dtype: str) -> ObservationKind:
    """Images are uint8 of three axes; every other Box is a vector."""
    return "image" if dtype == "uint8" and len(shape) == 3 else "vector"
