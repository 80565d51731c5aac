"""The ways from a rollout worker to a trainer on one host: what each does at the worker's end and at the trainer's.

| way       | the worker                                  | the trainer                                                |
|-----------|---------------------------------------------|------------------------------------------------------------|
| transport | `TrajectoryWriter`; records through a queue | `RolloutFeed`, in place or over UCX, fetching ahead or not |
| queue     | arrays into a `multiprocessing.Queue`       | out of it                                                  |
| ray       | an actor returns arrays                     | `ray.get` of a batch while the next ones are produced      |
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol

import numpy as np

from bench.core.payloads import PayloadPattern
from ucxx_transport import ClientConfig, DeadlineExceededError, ServerConfig
from ucxx_transport.trainer import RolloutFeed
from ucxx_transport.worker import TrajectoryWriter

if TYPE_CHECKING:
    from multiprocessing.queues import Queue

    from numpy.typing import NDArray

__all__ = ["Episode", "EpisodeWorker", "QueueEnd", "RayEnd", "TrainerEnd", "TransportEnd", "Way"]

Way = Literal["transport", "queue"]

BATCHES_AHEAD: Final = 4
"""Episodes of this many batches may exist at once: in use, on their way, written ahead."""

_POLL_S: Final = 0.2
_WAIT_LIMIT_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class Episode:
    """One episode as it reached the trainer.

    Attributes:
        number: which payload of the pattern it has to be. data: its bytes, uint8.
    """

    number: int
    data: NDArray[np.uint8]


class TrainerEnd(Protocol):
    """Where a trainer gets its batches from."""

    def open(self, size_bytes: int, batch: int) -> None:
        """Begin; episodes are being produced."""

    def next_batch(self) -> list[Episode]:
        """The next batch; the one before it has been used up."""

    def close(self) -> None:
        """End."""


class TransportEnd:
    """A feed of this package.

    Args:
        channel: records come through it. local: as `ClientConfig(local=…)`. ahead: whether the next batch is fetched
            while this one is used.
    """

    def __init__(self, channel: Queue[Any], *, local: Literal["view", "off"], ahead: bool) -> None:
        self._channel = channel
        self._local = local
        self._ahead = ahead

    def open(self, size_bytes: int, batch: int) -> None:
        """See `TrainerEnd`."""
        del size_bytes
        self._batch = batch
        self._feed = RolloutFeed(ClientConfig(local=self._local))
        self._started = False

    def next_batch(self) -> list[Episode]:
        """See `TrainerEnd`."""
        if not self._started:
            self._start()
        records = self._feed.collect() or []
        self._started = False
        if self._ahead:
            self._start()
        return [self._episode(record) for record in records]

    def close(self) -> None:
        """See `TrainerEnd`."""
        if self._started:
            self._feed.collect()
        self._feed.close()

    def _start(self) -> None:
        self._feed.start([self._channel.get(timeout=_WAIT_LIMIT_S) for _ in range(self._batch)])
        self._started = True

    def _episode(self, record: Any) -> Episode:
        tree = self._feed.resolve(record)
        assert tree is not None, "the worker waits for a slot: nothing is overwritten"
        return Episode(record["sequence"], tree["data"])


class QueueEnd:
    """A `multiprocessing.Queue` that carries the arrays.

    Args:
        channel: that queue.
    """

    def __init__(self, channel: Queue[Any]) -> None:
        self._channel = channel

    def open(self, size_bytes: int, batch: int) -> None:
        """See `TrainerEnd`."""
        del size_bytes
        self._batch = batch

    def next_batch(self) -> list[Episode]:
        """See `TrainerEnd`."""
        return [Episode(*self._channel.get(timeout=_WAIT_LIMIT_S)) for _ in range(self._batch)]

    def close(self) -> None:
        """See `TrainerEnd`."""


class RayEnd:
    """The object store of a Ray cluster on this host, with one actor as the worker."""

    def __init__(self) -> None:
        import ray

        self._ray = ray
        ray.init(num_cpus=2, include_dashboard=False, configure_logging=True, log_to_driver=False)

    def open(self, size_bytes: int, batch: int) -> None:
        """See `TrainerEnd`."""
        self._batch = batch
        self._numbers = 0
        self._worker = self._ray.remote(RayWorker).remote(size_bytes)
        self._coming: deque[Any] = deque()
        self._ask(2 * batch)

    def next_batch(self) -> list[Episode]:
        """See `TrainerEnd`."""
        wanted = [self._coming.popleft() for _ in range(self._batch)]
        episodes = [Episode(*found) for found in self._ray.get(wanted, timeout=_WAIT_LIMIT_S)]
        self._ask(self._batch)
        return episodes

    def close(self) -> None:
        """See `TrainerEnd`."""
        self._coming.clear()
        self._ray.kill(self._worker)

    def _ask(self, count: int) -> None:
        for _ in range(count):
            self._coming.append(self._worker.play.remote(self._numbers))
            self._numbers += 1


class RayWorker:
    """The actor: plays what it is asked for."""

    def __init__(self, size_bytes: int) -> None:
        self._pattern = PayloadPattern(size_bytes)

    def play(self, number: int) -> tuple[int, NDArray[np.uint8]]:
        """Payload `number`."""
        return number, self._pattern.payload(number)


class EpisodeWorker:
    """Produces episodes in a thread, as many as the way has room for.

    Args:
        way: how they travel. channel: of the records, or of the episodes themselves.
    """

    def __init__(self, way: Way, channel: Queue[Any]) -> None:
        self._way = way
        self._channel = channel
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def open(self, *, size_bytes: int, batch: int) -> None:
        """Begin to produce."""
        self._stopping.clear()
        produce = self._into_ring if self._way == "transport" else self._into_queue
        self._thread = threading.Thread(target=produce, args=(PayloadPattern(size_bytes), batch), name="producer")
        self._thread.start()

    def close(self) -> None:
        """Stop."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()
        self._thread = None
        self._channel.cancel_join_thread()

    def _into_ring(self, pattern: PayloadPattern, batch: int) -> None:
        ring = {"slots": BATCHES_AHEAD * batch, "on_full": "block"}
        server = ServerConfig(host="127.0.0.1", ports=2)
        with TrajectoryWriter("bench", ring=ring, server=server) as writer:
            number = 0
            while not self._stopping.is_set():
                try:
                    record = writer.write({"data": pattern.payload(number)}, deadline_s=_POLL_S)
                except DeadlineExceededError:
                    continue
                # the writer counts failed writes too
                self._put({**record.to_dict(), "sequence": number})
                number += 1
            self._drain()

    def _into_queue(self, pattern: PayloadPattern, batch: int) -> None:
        del batch  # the queue has its own bound
        number = 0
        while not self._stopping.is_set():
            self._put((number, pattern.payload(number)))
            number += 1
        self._drain()

    def _put(self, item: object) -> None:
        while not self._stopping.is_set():
            try:
                self._channel.put(item, timeout=_POLL_S)
            except queue.Full:
                continue
            return

    def _drain(self) -> None:
        """Leave nothing of this turn to the next one."""
        take: Callable[..., object] = self._channel.get
        while True:
            try:
                take(timeout=_POLL_S)
            except queue.Empty:
                return
