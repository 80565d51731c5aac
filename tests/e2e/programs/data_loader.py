"""A trainer whose `DataLoader` has workers: `data_loader.py METHOD:CASE…`. Prints what each case got.

A case is `epochs`, two of them by workers that persist; or `kept`, which keeps more items than there are descriptors:
as they come, cloned (`kept-cloned`), or handed over by the file system, which the trainer chose (`kept-strategy`), or
each of its workers (`kept-strategy-of-workers`).
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from ucxx_transport import ClientConfig, RingConfig, Schema, SharedRingBuffer
from ucxx_transport.integrations.torch import EpisodeDataset

COUNT, KEPT = 6, 200


def epochs(method: str) -> dict[str, Any]:
    """What workers that are started by this method got in each epoch, and what became of the slots."""
    schema = Schema.from_example({"obs": np.zeros(3, np.float32)})
    with SharedRingBuffer.create(RingConfig(slots=COUNT, schema=schema, readers=2, on_full="raise")) as ring:
        refs = [ring.write({"obs": np.full(3, number, np.float32)}) for number in range(COUNT)]
        dataset: Any = EpisodeDataset(refs, ClientConfig(local="view"))
        loader = DataLoader(
            dataset,
            batch_size=None,
            num_workers=2,
            multiprocessing_context=method,
            persistent_workers=True,
            timeout=120,
        )
        found = [[episode["obs"][0].item() for episode in loader] for _ in range(2)]
        del loader
        states = {state.name for state in ring.slot_states()}
    return {"epochs": [sorted(epoch) for epoch in found], "states": sorted(states)}


def by_the_file_system(_worker: int = 0) -> None:
    """What the documents say for those who keep items."""
    torch.multiprocessing.set_sharing_strategy("file_system")


def kept(method: str, case: str) -> dict[str, Any]:
    """How many items one worker's trainer could keep, or what became of it."""
    schema = Schema.from_example({"obs": np.zeros(3, np.float32)})
    before = torch.multiprocessing.get_sharing_strategy()
    if case == "kept-strategy":
        by_the_file_system()
    with SharedRingBuffer.create(RingConfig(slots=KEPT, schema=schema, on_full="raise")) as ring:
        refs = [ring.write({"obs": np.full(3, number, np.float32)}) for number in range(KEPT)]
        dataset: Any = EpisodeDataset(refs)
        loader = DataLoader(
            dataset,
            batch_size=None,
            num_workers=1,
            multiprocessing_context=method,
            timeout=120,
            worker_init_fn=by_the_file_system if case == "kept-strategy-of-workers" else None,
        )
        items: list[torch.Tensor] = []
        try:
            items.extend(episode["obs"].clone() if case == "kept-cloned" else episode["obs"] for episode in loader)
            return {"numbers": [item[0].item() for item in items] == list(range(KEPT))}
        except RuntimeError as error:
            return {"error": str(error)}
        finally:
            torch.multiprocessing.set_sharing_strategy(before)


if __name__ == "__main__":
    found = {}
    for argument in sys.argv[1:]:
        method, _, case = argument.partition(":")
        found[argument] = epochs(method) if case == "epochs" else kept(method, case)
    sys.stdout.write(json.dumps(found) + "\n")
