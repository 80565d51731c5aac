"""The trainer's reading side: from records to lessons, fetched ahead, every loss counted with its reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from cartpole.episode_packer import EpisodePacker
from cartpole.lesson import Lesson
from cartpole.plan import ClientLocal, DemoPlan
from ucxx_transport import ClientConfig, SourceWatcher
from ucxx_transport.client import WayStatistics

__all__ = ["Received", "Receiver", "ReceiverBooks", "Record"]

Record = Mapping[str, Any]
"""What a worker's `write_to_buffer` returned."""

BATCH_DEADLINE_S = 3.0
"""A worker's death costs the batch that it was in no more than this, and the other batches nothing."""

MAX_BATCH_BYTES = 64 << 20
"""More records are not taken than make a batch of about this size."""


class Received(NamedTuple):
    """One episode that arrived."""

    seat: int
    lesson: Lesson
    nbytes: int


@dataclass(slots=True)
class ReceiverBooks:
    """Counts since the receiver was made; the names are those of `TrainerStatus`."""

    ways: dict[str, dict[str, float]] = field(default_factory=dict)
    seat_transports: dict[int, str] = field(default_factory=dict)
    lost: Counter[str] = field(default_factory=Counter)
    retried: int = 0
    verified: int = 0
    mismatched: int = 0
    clients: Counter[str] = field(default_factory=Counter)
    ucx_lanes: tuple[str, ...] = ()


class Receiver:
    """Has episodes fetched ahead: a packer for those read in place, and another for those over UCX."""

    def __init__(self, plan: DemoPlan, watcher: SourceWatcher | None = None) -> None:
        self._plan = plan
        self._watcher = watcher
        self._packers: dict[ClientLocal, EpisodePacker] = {}
        self._seat_local: dict[int, ClientLocal] = {}
        self._waiting: dict[ClientLocal, list[Record]] = {}
        self._under_way: set[ClientLocal] = set()
        self._lanes: set[str] = set()

    def admit(self, seat: int, worker: int) -> None:
        """Read from the process of `worker` on this seat from now on, the way the plan says."""
        local = self._plan.local_of(worker)
        self._seat_local[seat] = local
        if local not in self._packers:
            packer = EpisodePacker(self._plan.facts.features)
            client = ClientConfig(local=local, shm_lanes=self._plan.shm_lanes)
            packer.setup_ucxx_data_packer(client=client, watcher=self._watcher, deadline_s=BATCH_DEADLINE_S)
            self._packers[local] = packer
            self._waiting[local] = []

    def has_room(self, seat: int) -> bool:
        """Whether further records of this seat should be brought; it was admitted, then."""
        local = self._seat_local.get(seat)
        return local is not None and sum(record["ref"]["nbytes"] for record in self._waiting[local]) < MAX_BATCH_BYTES

    def bring(self, seat: int, record: Record) -> None:
        """Take a record; its episode is fetched with the next batch of its way."""
        self._waiting[self._seat_local[seat]].append(record)

    def start(self) -> None:
        """Have what waits fetched, each way's as soon as its batch before is done with."""
        for local, waiting in self._waiting.items():
            if waiting and local not in self._under_way:
                self._packers[local].start_prefetch(waiting)
                self._waiting[local] = []
                self._under_way.add(local)

    def collect(self, *, wait: bool = False) -> Iterator[Received]:
        """The episodes of the batches that have come; with `wait`, of all that are on their way."""
        for local in tuple(self._under_way):
            packer = self._packers[local]
            if not (wait or packer.is_prefetch_ready):
                continue
            self._under_way.discard(local)
            for record in packer.collect_prefetch() or ():
                ref = record["ref"]
                lesson = packer.get_policy_input(None, record, digest=ref["meta"]["digest"])
                if lesson is not None:
                    yield Received(ref["meta"]["seat"], lesson, ref["nbytes"])
            packer.release_prefetch()

    def books(self) -> ReceiverBooks:
        """What has come and what has not, so far."""
        books = ReceiverBooks()
        for local, packer in self._packers.items():
            feed = packer.ucxx_feed
            assert feed is not None, "it was set up"
            client, fetched = feed.client_statistics(), feed.statistics()
            for transport, way in client.ways.items():
                _add_way(books.ways.setdefault(transport, {}), way, busy_s=fetched.fetch_s)
            seats = [seat for seat, seat_local in self._seat_local.items() if seat_local == local]
            books.seat_transports.update(dict.fromkeys(seats, ", ".join(client.ways)) if client.ways else {})
            books.lost.update(packer.lost)
            books.clients.update({name: value for name, value in asdict(client).items() if isinstance(value, int)})
            books.retried += fetched.retried
            books.verified += packer.verified
            books.mismatched += packer.mismatched
            self._lanes.update(lane for lane in client.transports if lane != "unknown")
        books.ucx_lanes = tuple(sorted(self._lanes))
        return books

    def close(self) -> None:
        """End the packers. Bounded."""
        for packer in self._packers.values():
            packer.shutdown_ucxx_data_packer()


def _add_way(total: dict[str, float], way: WayStatistics, *, busy_s: float) -> None:
    """Reads of one packer to those of the others; of their percentiles the worse."""
    for name, value in (("reads", way.reads), ("bytes", way.nbytes), ("busy_s", busy_s)):
        total[name] = total.get(name, 0) + value
    for name, value_s in (("p50_us", way.p50_s), ("p95_us", way.p95_s), ("p99_us", way.p99_s)):
        total[name] = max(total.get(name, 0.0), value_s * 1e6)
