"""What does a trainer feel?

Episodes a second, and the share of its time that it waits for data.

A worker process produces episodes as fast as it can; a trainer process takes them in batches of 8, reads every byte,
and computes: for no time at all (how many episodes a second can it be given?), and for longer than fetching a batch
over UCX takes (what does it wait then? It sleeps, as one does whose GPU computes). The same for `multiprocessing.Queue`
and, where `ray` is installed, for Ray's object store.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from bench.core.control import ControlledProcess
from bench.core.cpu_time import ForeignLoad
from bench.core.figures import Row
from bench.core.lineup import Lineup
from bench.core.payloads import PayloadPattern
from bench.core.rounds import Plan
from bench.trainer_ends import BATCHES_AHEAD, EpisodeWorker, QueueEnd, RayEnd, TrainerEnd, TransportEnd
from ucxx_transport.units import format_bytes

if TYPE_CHECKING:
    from multiprocessing.queues import Queue

__all__ = ["SIZES", "UCX_AHEAD", "VIEW_AHEAD", "measure"]

SIZES: Final = (64 << 10, 1 << 20, 16 << 20)
BATCH: Final = 8
COMPUTE_OVER_FETCH: Final = 1.5
LEAST_COMPUTE_S: Final = 0.01
LEAST_STEPS: Final = 3

VIEW_AHEAD: Final = "in place, fetched ahead"
UCX_AHEAD: Final = "UCX over TCP, fetched ahead"
UCX_ON_DEMAND: Final = "UCX over TCP, on demand"
QUEUE: Final = "multiprocessing.Queue"
RAY: Final = "Ray's object store"

TRANSPORT: Final[Mapping[str, Mapping[str, Any]]] = {
    UCX_ON_DEMAND: {"local": "off", "ahead": False},
    UCX_AHEAD: {"local": "off", "ahead": True},
    VIEW_AHEAD: {"local": "view", "ahead": True},
    "in place, on demand": {"local": "view", "ahead": False},
}
"""The first says how long a step computes."""


@dataclass(frozen=True, slots=True)
class _Way:
    """A way with its processes; `worker` is None where the trainer's process has its own.

    `channel` is held here: the processes take its semaphores by name, and those go with the first of it.
    """

    subject: str
    trainer: ControlledProcess
    worker: ControlledProcess | None
    channel: Queue[Any] | None


def measure(question: str, plan: Plan) -> list[Row]:
    """All ways at all sizes."""
    rows = []
    with Lineup() as lineup:
        ways = _ways(lineup)
        for size_bytes in plan.sizes(SIZES):
            fetch_us = _take_turn(ways[0], size_bytes, plan.turn_s, 0.0)["fetch_us"]
            compute_s = max(LEAST_COMPUTE_S, COMPUTE_OVER_FETCH * fetch_us / 1e6)
            figures: list[dict[str, list[float]]] = [{} for _ in ways]
            for number in range(plan.rounds):
                for way, of_way in zip(ways, figures, strict=True):
                    for figure, value in _take_turn(way, size_bytes, plan.turn_s, compute_s).items():
                        of_way.setdefault(figure, []).append(value)
                plan.on_turn(f"{question}: {format_bytes(size_bytes)}, round {number + 1} of {plan.rounds}")
            case = format_bytes(size_bytes)
            rows += [
                Row(question=question, case=case, subject=way.subject, figures=of_way)
                for way, of_way in zip(ways, figures, strict=True)
            ]
            if all(way.subject != RAY for way in ways):
                rows.append(Row(question=question, case=case, subject=RAY, skipped="pip install ray"))
    return rows


def _ways(lineup: Lineup) -> list[_Way]:
    found = []
    for subject in (*TRANSPORT, QUEUE):
        channel: Queue[Any] = multiprocessing.get_context("spawn").Queue(BATCHES_AHEAD * BATCH)
        way = "transport" if subject in TRANSPORT else "queue"
        worker = lineup.source(subject, EpisodeWorker, way, channel)
        found.append(_Way(subject, lineup.source(f"{subject}: trainer", Trainer, subject, channel), worker, channel))
    if importlib.util.find_spec("ray") is not None:
        found.append(_Way(RAY, lineup.source(f"{RAY}: trainer", Trainer, RAY, None), None, None))
    return found


def _take_turn(way: _Way, size_bytes: int, turn_s: float, compute_s: float) -> dict[str, float]:
    if way.worker is not None:
        way.worker.call("open", size_bytes=size_bytes, batch=BATCH)
    way.trainer.call("open", size_bytes=size_bytes, batch=BATCH)
    foreign_load = ForeignLoad()
    idle = way.trainer.call("train", seconds=turn_s, compute_s=0.0)
    computing = way.trainer.call("train", seconds=turn_s, compute_s=compute_s)
    foreign_cores = foreign_load.cores()
    way.trainer.call("close")
    if way.worker is not None:
        way.worker.call("close")
    return {
        "episodes_per_s": idle["steps"] * BATCH / idle["wall_s"],
        "waiting_share": computing["waiting_s"] / computing["wall_s"],
        "fetch_us": idle["waiting_s"] / idle["steps"] * 1e6,
        "compute_us": compute_s * 1e6,
        "foreign_cores": foreign_cores,
    }


class Trainer:
    """A trainer process: `open` compares a first batch, `train` takes the time, `close` ends.

    Args:
        subject: which way. channel: of the records or episodes.
    """

    def __init__(self, subject: str, channel: Queue[Any] | None) -> None:
        self._opened = False
        self._end: TrainerEnd
        if channel is None:
            self._end = RayEnd()
        elif subject in TRANSPORT:
            self._end = TransportEnd(channel, **TRANSPORT[subject])
        else:
            self._end = QueueEnd(channel)

    def open(self, *, size_bytes: int, batch: int) -> None:
        """Take every slot's worth of episodes once, and compare every byte."""
        pattern = PayloadPattern(size_bytes)
        self._end.open(size_bytes, batch)
        self._opened = True
        for _ in range(BATCHES_AHEAD):
            for episode in self._end.next_batch():
                pattern.check(episode.number, episode.data.data)

    def train(self, *, seconds: float, compute_s: float) -> dict[str, float]:
        """Steps until `seconds` have passed."""
        self._step(compute_s)  # not counted: what its batch is waited for depends on what was done before this order
        steps, waiting_s = 0, 0.0
        began_s = now_s = time.perf_counter()
        while steps < LEAST_STEPS or now_s - began_s < seconds:
            waiting_s += self._step(compute_s)
            steps += 1
            now_s = time.perf_counter()
        return {"steps": steps, "waiting_s": waiting_s, "wall_s": now_s - began_s}

    def close(self) -> None:
        """End."""
        if self._opened:
            self._end.close()
        self._opened = False

    def _step(self, compute_s: float) -> float:
        """Take a batch, read every byte of it, compute; seconds waited for the batch."""
        began_s = time.perf_counter()
        batch = self._end.next_batch()
        waited_s = time.perf_counter() - began_s
        for episode in batch:
            np.bitwise_xor.reduce(episode.data.view(np.uint64))
        del batch, episode
        if compute_s:
            time.sleep(compute_s)
        return waited_s
