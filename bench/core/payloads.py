"""Payloads that both sides can make by themselves, so that every byte that came can be compared."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["PayloadPattern"]

STEP_BYTES: Final = 64
DISTINCT: Final = 1024
SEED: Final = 20260521


class PayloadPattern:
    """`DISTINCT` different payloads of one size, cut from one block of random bytes at different offsets.

    Neighbouring payloads differ in almost every byte, so a payload that is stale, torn, shifted or short is seen.

    Args:
        size_bytes: length of each payload.
    """

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        words = -(-(size_bytes + STEP_BYTES * DISTINCT) // 8)
        self._block: NDArray[np.uint8] = (
            np.random.default_rng(SEED).integers(0, 2**64, words, dtype=np.uint64).view(np.uint8)
        )

    def payload(self, index: int) -> NDArray[np.uint8]:
        """The payload of number `index` (any whole number ≥ 0), shape `[size_bytes]`, uint8, a view."""
        begin = STEP_BYTES * (index % DISTINCT)
        return self._block[begin : begin + self.size_bytes]

    def check(self, index: int, buffer: memoryview) -> None:
        """Compare `buffer` with payload `index`, every byte.

        Raises:
            ValueError: the length or a byte differs; names the first.
        """
        got = np.frombuffer(buffer, dtype=np.uint8)
        expected = self.payload(index)
        if got.shape != expected.shape:
            raise ValueError(f"payload {index}: {got.nbytes} bytes came instead of {expected.nbytes}")
        if not np.array_equal(got, expected):
            first = int(np.flatnonzero(got != expected)[0])
            raise ValueError(f"payload {index}: byte {first} of {expected.nbytes} is not the one that was written")
