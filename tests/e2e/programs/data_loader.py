"""A trainer whose `DataLoader` has workers, two epochs long: `data_loader.py METHOD…`. Prints what each one got."""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from ucxx_transport import ClientConfig, RingConfig, Schema, SharedRingBuffer
from ucxx_transport.integrations.torch import EpisodeDataset

COUNT = 6


def epochs(method: str) -> dict[str, Any]:
    """What workers that are started by this method got in each epoch, and what became of the slots."""
    torch.multiprocessing.set_sharing_strategy("file_system")
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


if __name__ == "__main__":
    sys.stdout.write(json.dumps({method: epochs(method) for method in sys.argv[1:]}) + "\n")
