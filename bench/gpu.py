"""How fast do payloads get from a slot to a GPU and back? Worker and trainer on one host, beside page-locked copies.

slot → device    a feed with `device="cuda"`: batches of 4, from `start` until the last copy has ended
device → slot    `TrajectoryWriter.write` of a device tensor, from the call until the payload can be read
page-locked      `copy_` between a page-locked tensor and the device: what the bus gives
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from typing import Any, Final

import numpy as np

from bench.core.control import ControlledProcess
from bench.core.figures import Row, SkippedError
from bench.core.lineup import Lineup
from bench.core.rounds import Plan
from ucxx_transport import ClientConfig, RolloutFeed, ServerConfig, TrajectoryWriter
from ucxx_transport.units import format_bytes

__all__ = ["DEVICE_TO_SLOT", "PINNED_DOWN", "PINNED_UP", "SIZES", "SLOT_TO_DEVICE", "measure"]

SIZES: Final = (1 << 20, 16 << 20, 256 << 20)
BATCH: Final = 4
LEAST_BATCHES: Final = 3
BYTES_A_ROUND: Final = 2 << 30

SLOT_TO_DEVICE: Final = "slot → device"
DEVICE_TO_SLOT: Final = "device → slot"
PINNED_UP: Final = "page-locked copy, host → device"
PINNED_DOWN: Final = "page-locked copy, device → host"
SUBJECTS: Final = (SLOT_TO_DEVICE, PINNED_UP, DEVICE_TO_SLOT, PINNED_DOWN)


class GpuWorker:
    """A worker that writes what lies on its GPU."""

    _writer: TrajectoryWriter | None = None

    def open(self, *, size_bytes: int) -> None:
        """A ring of two batches, and a device tensor of that size."""
        import torch

        self.close()
        self._torch = torch
        self._tensor = torch.arange(size_bytes // 4, device="cuda", dtype=torch.int32)
        ring = {"slots": 2 * BATCH, "on_full": "overwrite"}
        server = ServerConfig(host="127.0.0.1", ports=1)
        self._writer = TrajectoryWriter("bench-gpu", ring=ring, server=server)

    def write(self) -> tuple[list[dict[str, Any]], float]:
        """A batch: its records, and the seconds that it took."""
        assert self._writer is not None, "opened before"
        self._torch.cuda.synchronize()
        began_s = time.perf_counter()
        records = [self._writer.write({"data": self._tensor}) for _ in range(BATCH)]
        took_s = time.perf_counter() - began_s
        return [record.to_dict() for record in records], took_s

    def close(self) -> None:
        """Close the ring."""
        if self._writer is not None:
            self._writer.close()
        self._writer = None


class GpuTrainer:
    """A trainer whose feed uploads."""

    _feed: RolloutFeed | None = None

    def why_not(self) -> str:
        """Why there is nothing to measure; empty where there is."""
        import torch

        return "" if torch.cuda.is_available() else f"torch {torch.__version__} finds no GPU"

    def open(self, *, size_bytes: int) -> None:
        """A feed, and tensors for the copies beside it."""
        import torch

        self.close()
        self._torch = torch
        self._expected = np.arange(size_bytes // 4, dtype=np.int32)
        self._host = [torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True) for _ in range(BATCH)]
        self._device = [torch.zeros(size_bytes, dtype=torch.uint8, device="cuda") for _ in range(BATCH)]
        self._feed = RolloutFeed(ClientConfig(), device="cuda")

    def fetch(self, records: list[dict[str, Any]], *, verify: bool = False) -> float:
        """Seconds for a batch."""
        assert self._feed is not None, "opened before"
        self._torch.cuda.synchronize()
        began_s = time.perf_counter()
        self._feed.start(records)
        self._feed.collect()
        trees = [self._feed.resolve(record) for record in records]
        self._torch.cuda.synchronize()
        took_s = time.perf_counter() - began_s
        for tree in trees:
            assert tree is not None, "nothing was overwritten"
            if verify and not np.array_equal(tree["data"].cpu().numpy(), self._expected):
                raise ValueError("other bytes came than were written")
        return took_s

    def copy(self, *, upwards: bool) -> float:
        """Seconds for a batch of page-locked copies."""
        self._torch.cuda.synchronize()
        began_s = time.perf_counter()
        for host, device in zip(self._host, self._device, strict=True):
            target, source = (device, host) if upwards else (host, device)
            target.copy_(source, non_blocking=True)
        self._torch.cuda.synchronize()
        return time.perf_counter() - began_s

    def close(self) -> None:
        """Close the feed."""
        if self._feed is not None:
            self._feed.close()
        self._feed = None


def measure(question: str, plan: Plan) -> list[Row]:
    """Both directions at all sizes.

    Raises:
        SkippedError: there is no GPU that torch can use.
    """
    if importlib.util.find_spec("torch") is None:
        raise SkippedError("pip install torch")
    with Lineup() as lineup:
        trainer = lineup.source("a feed with a GPU", GpuTrainer)
        reason = trainer.call("why_not")
        if reason:
            raise SkippedError(reason)
        worker = lineup.source("a worker with a GPU", GpuWorker)
        return [row for size in SIZES for row in _of_size(question, plan, size, worker, trainer)]


def _of_size(
    question: str, plan: Plan, size_bytes: int, worker: ControlledProcess, trainer: ControlledProcess
) -> list[Row]:
    worker.call("open", size_bytes=size_bytes)
    trainer.call("open", size_bytes=size_bytes)
    for _ in range(2):  # every slot once
        records, _ = worker.call("write")
        trainer.call("fetch", records=records, verify=True)
    batches = max(LEAST_BATCHES, BYTES_A_ROUND // (size_bytes * BATCH) if not plan.quick else 0)
    batches = min(batches, 100)
    rates: dict[str, list[float]] = {subject: [] for subject in SUBJECTS}
    for number in range(plan.rounds):
        seconds: dict[str, float] = dict.fromkeys(SUBJECTS, 0.0)
        for _ in range(batches):
            records, took_s = worker.call("write")
            seconds[DEVICE_TO_SLOT] += took_s
            seconds[SLOT_TO_DEVICE] += trainer.call("fetch", records=records)
        copy: Callable[..., float] = trainer.call
        for _ in range(batches):
            seconds[PINNED_UP] += copy("copy", upwards=True)
            seconds[PINNED_DOWN] += copy("copy", upwards=False)
        for subject in SUBJECTS:
            rates[subject].append(batches * BATCH * size_bytes / seconds[subject] / 1e9)
        plan.on_turn(f"{question}: {format_bytes(size_bytes)}, round {number + 1} of {plan.rounds}")
    return [
        Row(question=question, case=format_bytes(size_bytes), subject=subject, figures={"gb_per_s": values})
        for subject, values in rates.items()
    ]
