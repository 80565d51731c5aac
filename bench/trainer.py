"""What does a trainer feel?

Episodes a second, and the share of its time that it waits for data. A worker process produces episodes as fast as it
can; a trainer process takes them in batches of 8, reads every byte, and computes: for no time at all (how many episodes
a second can it be given?), and for longer than fetching a batch over UCX takes (what does it wait then? It sleeps, as
one does whose GPU computes). The same for a `multiprocessing.Queue` of arrays.

What it waits is everything between two steps; `PARTS` says of what it consists.
"""

from __future__ import annotations

import multiprocessing
import queue
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from bench.core.control import ControlledProcess
from bench.core.cpu_time import ForeignLoad
from bench.core.figures import Row
from bench.core.lineup import Lineup
from bench.core.payloads import PayloadPattern
from bench.core.rounds import Plan
from ucxx_transport import ClientConfig, DeadlineExceededError, RolloutFeed, ServerConfig, TrajectoryWriter
from ucxx_transport.units import format_bytes

if TYPE_CHECKING:
    from multiprocessing.queues import Queue

    from numpy.typing import NDArray

__all__ = ["PARTS", "SIZES", "UCX_AHEAD", "VIEW_AHEAD", "measure"]

SIZES: Final = (64 << 10, 1 << 20, 16 << 20)
BATCH: Final = 8
BATCHES_AHEAD: Final = 4
"""Episodes of this many batches may exist at once: in use, on their way, written ahead."""
COMPUTE_OVER_FETCH: Final = 1.5
LEAST_COMPUTE_S: Final = 0.01
LEAST_STEPS: Final = 3
POLL_S: Final = 0.2
WAIT_LIMIT_S: Final = 60.0

VIEW_AHEAD: Final = "in place, fetched ahead"
UCX_AHEAD: Final = "UCX over TCP, fetched ahead"

FEEDS: Final[Mapping[str, Mapping[str, Any]]] = {
    "UCX over TCP, on demand": {"local": "off", "ahead": False},
    UCX_AHEAD: {"local": "off", "ahead": True},
    VIEW_AHEAD: {"local": "view", "ahead": True},
    "in place, on demand": {"local": "view", "ahead": False},
}
"""The first says how long a step computes."""
PARTS: Final = ("collect", "queue", "start", "resolve")
"""Of a wait: for the batch that was asked for; for the next records, in the queue that brings them from the worker, and
asking for those; and the episodes' arrays, to be had."""
QUEUE: Final = "multiprocessing.Queue"
QUEUE_BYTES: Final = 1 << 20
"""Larger episodes go through a queue by the tenth of a second."""


@dataclass(frozen=True, slots=True)
class _Way:
    """A way with its processes.

    `channel` is held here: the processes take its semaphores by name, and those go with the first of it.
    """

    subject: str
    worker: ControlledProcess
    trainer: ControlledProcess
    channel: Queue[Any]


def measure(question: str, plan: Plan) -> list[Row]:
    """All ways at all sizes."""
    rows = []
    with Lineup() as lineup:
        ways = []
        for subject in (*FEEDS, QUEUE):
            channel: Queue[Any] = multiprocessing.get_context("spawn").Queue(BATCHES_AHEAD * BATCH)
            worker = lineup.source(f"worker, {subject}", Worker, subject in FEEDS, channel)
            ways.append(_Way(subject, worker, lineup.source(f"trainer, {subject}", Trainer, subject, channel), channel))
        for size_bytes in plan.sizes(SIZES):
            case, compute_s = format_bytes(size_bytes), 0.0
            for way in ways if size_bytes <= QUEUE_BYTES else ways[:-1]:
                figures: dict[str, list[float]] = {}
                with _producing(way, size_bytes):
                    if not compute_s:
                        fetch_us = _take_turn(way, plan.turn_s, LEAST_COMPUTE_S)["fetch_us"]
                        compute_s = max(LEAST_COMPUTE_S, COMPUTE_OVER_FETCH * fetch_us / 1e6)
                    for number in range(plan.rounds):
                        for figure, value in _take_turn(way, plan.turn_s, compute_s).items():
                            figures.setdefault(figure, []).append(value)
                        plan.on_turn(f"{question}: {case}, {way.subject}, round {number + 1} of {plan.rounds}")
                rows.append(Row(question=question, case=case, subject=way.subject, figures=figures))
    return rows


@contextmanager
def _producing(way: _Way, size_bytes: int) -> Iterator[None]:
    """A worker that produces, with its trainer."""
    way.worker.call("open", size_bytes=size_bytes)
    way.trainer.call("open", size_bytes=size_bytes)
    yield
    way.trainer.call("close")
    way.worker.call("close")


def _take_turn(way: _Way, turn_s: float, compute_s: float) -> dict[str, float]:
    foreign_load = ForeignLoad()
    idle = way.trainer.call("train", seconds=turn_s, compute_s=0.0)
    computing = way.trainer.call("train", seconds=turn_s, compute_s=compute_s)
    foreign_cores = foreign_load.cores()
    return {
        "episodes_per_s": idle["steps"] * BATCH / idle["wall_s"],
        "waiting_share": computing["waiting_s"] / computing["wall_s"],
        "fetch_us": idle["waiting_s"] / idle["steps"] * 1e6,
        "compute_us": compute_s * 1e6,
        **{f"{part}_us": computing[part] / computing["steps"] * 1e6 for part in PARTS if part in computing},
        "foreign_cores": foreign_cores,
    }


class Trainer:
    """A trainer process, which takes numbered episodes: payloads of the pattern, uint8.

    Args:
        subject: which way.
        channel: of the records, or of the episodes themselves.
    """

    def __init__(self, subject: str, channel: Queue[Any]) -> None:
        self._way = FEEDS.get(subject)
        self._channel = channel
        self._feed: RolloutFeed | None = None
        self._started = False
        self._spent_s: defaultdict[str, float] = defaultdict(float)

    def open(self, *, size_bytes: int) -> None:
        """Take every slot's worth of episodes once, and compare every byte."""
        pattern = PayloadPattern(size_bytes)
        if self._way is not None:
            self._feed = RolloutFeed(ClientConfig(local=self._way["local"]))
        for _ in range(BATCHES_AHEAD):
            for number, data in self._next_batch():
                pattern.check(number, data.data)

    def train(self, *, seconds: float, compute_s: float) -> dict[str, float]:
        """Steps until `seconds` have passed."""
        self._step(compute_s)  # not counted: what its batch is waited for depends on what was done before this order
        self._spent_s.clear()
        steps, waiting_s = 0, 0.0
        began_s = now_s = time.perf_counter()
        while steps < LEAST_STEPS or now_s - began_s < seconds:
            waiting_s += self._step(compute_s)
            steps += 1
            now_s = time.perf_counter()
        return {"steps": steps, "waiting_s": waiting_s, "wall_s": now_s - began_s, **self._spent_s}

    def close(self) -> None:
        """End the feed, with what it has fetched ahead."""
        if self._feed is not None:
            if self._started:
                self._feed.collect()
            self._feed.close()
        self._feed, self._started = None, False

    def _step(self, compute_s: float) -> float:
        """Take a batch, read every byte of it, compute; seconds waited for the batch."""
        began_s = time.perf_counter()
        batch = self._next_batch()
        waited_s = time.perf_counter() - began_s
        for _, data in batch:
            np.bitwise_xor.reduce(data.view(np.uint64))
        del batch, data
        if compute_s:
            time.sleep(compute_s)
        return waited_s

    def _next_batch(self) -> list[tuple[int, NDArray[np.uint8]]]:
        if self._feed is None or self._way is None:
            return self._take()
        if not self._started:
            self._start(self._feed)
        began_s = time.perf_counter()
        batch: list[Any] = self._feed.collect() or []
        self._spent_s["collect"] += time.perf_counter() - began_s
        self._started = self._way["ahead"]
        if self._started:
            self._start(self._feed)
        began_s = time.perf_counter()
        trees = [(record["sequence"], self._feed.resolve(record)) for record in batch]
        arrays = [(number, tree["data"]) for number, tree in trees if tree is not None]
        self._spent_s["resolve"] += time.perf_counter() - began_s
        return arrays

    def _start(self, feed: RolloutFeed) -> None:
        began_s = time.perf_counter()
        records = self._take()
        taken_s = time.perf_counter()
        feed.start(records)
        self._spent_s["queue"] += taken_s - began_s
        self._spent_s["start"] += time.perf_counter() - taken_s

    def _take(self) -> list[Any]:
        return [self._channel.get(timeout=WAIT_LIMIT_S) for _ in range(BATCH)]


class Worker:
    """Produces numbered episodes in a thread, as many as there is room for.

    Args:
        writes: into a ring, and records into the channel; else the episodes themselves.
        channel: which has a bound.
    """

    def __init__(self, writes: bool, channel: Queue[Any]) -> None:  # noqa: FBT001 - arguments of a process
        self._writes = writes
        self._channel = channel
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def open(self, *, size_bytes: int) -> None:
        """Begin to produce."""
        self._stopping.clear()
        produce = self._into_ring if self._writes else self._into_channel
        self._thread = threading.Thread(target=produce, args=(PayloadPattern(size_bytes),), name="producer")
        self._thread.start()

    def close(self) -> None:
        """Stop, and leave nothing of this turn to the next one."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()
        self._thread = None
        self._channel.cancel_join_thread()

    def _into_ring(self, pattern: PayloadPattern) -> None:
        ring = {"slots": BATCHES_AHEAD * BATCH}
        with TrajectoryWriter("bench", ring=ring, server=ServerConfig(host="127.0.0.1")) as writer:
            number = 0
            while not self._stopping.is_set():
                with suppress(DeadlineExceededError):
                    record = writer.write({"data": pattern.payload(number)}, deadline_s=POLL_S)
                    self._put({**record.to_dict(), "sequence": number})  # the writer counts failed writes too
                    number += 1
            self._drain()

    def _into_channel(self, pattern: PayloadPattern) -> None:
        number = 0
        while not self._stopping.is_set():
            self._put((number, pattern.payload(number)))
            number += 1
        self._drain()

    def _put(self, item: object) -> None:
        while not self._stopping.is_set():
            with suppress(queue.Full):
                self._channel.put(item, timeout=POLL_S)
                return

    def _drain(self) -> None:
        with suppress(queue.Empty):
            while True:
                self._channel.get(timeout=POLL_S)
