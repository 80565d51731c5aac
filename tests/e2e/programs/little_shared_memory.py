"""A trainer whose `DataLoader` has workers where /dev/shm is small: `little_shared_memory.py fork|spawn CASE…`.

Prints, in JSON, what the loop over the loader of each case ended with.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, IterableDataset

from ucxx_transport import RingConfig, Schema, SharedRingBuffer, SlotRef, TensorSpec
from ucxx_transport.integrations.torch import EpisodeDataset
from ucxx_transport.trainer import StreamedEpisode

STEPS = 1 << 19
"""Of an episode, 4 bytes each."""

LEFT = 1 << 20
"""Bytes left of /dev/shm: half an episode."""


class Rings(IterableDataset):  # type: ignore[misc]  # torch is not always there to be looked at
    """Makes a ring as large as all of /dev/shm."""

    def __iter__(self) -> Iterator[str]:
        found = os.statvfs("/dev/shm")
        with SharedRingBuffer.create(RingConfig(slots=4, slot_bytes=found.f_blocks * found.f_frsize // 4)) as ring:
            yield ring.name


class Boxed:
    """What a program of its own may make of an episode: an object, which is looked into by pickle alone."""

    def __init__(self, episode: StreamedEpisode) -> None:
        self.arrays = episode.arrays


@contextmanager
def filled() -> Iterator[list[SlotRef]]:
    """References to payloads of a ring, beside which /dev/shm is nearly full."""
    schema = Schema([TensorSpec("obs", (STEPS,), "float32")])
    with (
        SharedRingBuffer.create(RingConfig(slots=4, schema=schema)) as ring,
        tempfile.TemporaryFile(dir="/dev/shm") as other,
    ):
        found = os.statvfs("/dev/shm")
        os.posix_fallocate(other.fileno(), 0, found.f_bavail * found.f_frsize - LEFT)
        yield [ring.write({"obs": np.zeros(STEPS, np.float32)}) for _ in range(4)]
        os.ftruncate(other.fileno(), 0)  # a forked worker has it open, too


def end_of(dataset: Any, method: str, timeout_s: float = 300) -> dict[str, str]:
    """What ends the loop over a loader with one worker."""
    loader: Any = DataLoader(dataset, batch_size=None, num_workers=1, multiprocessing_context=method, timeout=timeout_s)
    try:
        for _ in loader:
            pass
    except Exception as error:  # noqa: BLE001 - what is asked for
        return {"error": type(error).__name__, "said": str(error)}
    return {}


def main(method: str, *cases: str) -> None:
    ends: dict[str, dict[str, str]] = {}
    for case in cases:
        gc.collect()  # a loader that ended by an error is in a cycle, and its process must not be inherited
        if case == "ring":
            ends[case] = end_of(Rings(), method)
            continue
        with filled() as refs:
            if case == "episode":
                ends[case] = end_of(EpisodeDataset(refs), method)
            else:
                ends[case] = end_of(EpisodeDataset(refs, item_of=Boxed), method, timeout_s=10)
    sys.stdout.write(json.dumps(ends) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
