"""What the demo's processes tell each other, as msgpack. Payloads never go this way: only the records of them do.

| from         | to           | queue               | message                                 |
|--------------|--------------|---------------------|-----------------------------------------|
| worker       | trainer      | SeatQueues.records  | what `write_to_buffer` returned         |
| trainer      | worker       | SeatQueues.weights  | Weights, the latest wins                |
| worker       | orchestrator | SeatQueues.status   | WorkerStatus                            |
| orchestrator | trainer      | TrainerQueues.orders | SeatOrder                               |
| trainer      | orchestrator | TrainerQueues.status | TrainerStatus                           |

Orders to stop are not messages: they are SIGTERM, which also reaches a process that reads no queue.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Self

import msgpack  # type: ignore[import-untyped]  # ships no types

__all__ = ["FinishedEpisode", "Message", "SeatOrder", "TrainerStatus", "Weights", "WorkerStatus"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """A frozen dataclass of plain values that knows its way to bytes and back."""

    parts: ClassVar[dict[str, type[Any]]] = {}

    def to_bytes(self) -> bytes:
        """The fields as one msgpack map."""
        return bytes(msgpack.packb(asdict(self)))

    @classmethod
    def from_bytes(cls, blob: bytes) -> Self:
        """Rebuild a message of this class."""
        values = msgpack.unpackb(blob, strict_map_key=False)
        for name, part in cls.parts.items():
            values[name] = [part(**item) for item in values[name]]
        return cls(**values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights(Message):
    """The policy's parameters after `version` updates (`Network.to_bytes`)."""

    version: int
    parameters: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerStatus(Message):
    """How a rollout worker is.

    Attributes:
        state: "starting", "running", "stopped" or "failed"; the orchestrator knows better once the process is gone.
        version: of the weights it acts with.
        given_up: own unread episodes discarded because nobody fetched them.
        ring: the ring's counters. ready: slots READY now.
        server: the server's counters. server_pid: its process.
    """

    pid: int
    state: str
    version: int = 0
    episodes: int = 0
    steps: int = 0
    given_up: int = 0
    ready: int = 0
    ring: dict[str, int] = field(default_factory=dict)
    server: dict[str, int] = field(default_factory=dict)
    server_pid: int | None = None
    ports: tuple[int, ...] = ()
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SeatOrder(Message):
    """Tells the trainer that a process of `worker` was started on a seat, or that it is gone."""

    seat: int
    worker: int
    occupied: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedEpisode:
    """One episode as it arrived: seconds since the trainer started, its return, the seat it came from."""

    at_s: float
    total_reward: float
    seat: int
    steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerStatus(Message):
    """How the trainer is, since its start.

    Attributes:
        episodes: delivered, verified and learnt from. steps: of those. payload_bytes: of those.
        first_s, last_s: when the first and the last of them arrived, seconds since the trainer's start.
        finished: the episodes since the last status.
        ways: by transport: reads, bytes, busy_s (fetching batches), and p50_us, p95_us, p99_us of one read.
        lost: episodes that could not be had, by the reason's word.
        retried: episodes asked for again in a later round.
        verified, mismatched: digests compared here, over and above the client's own checksums.
        clients: counters of all clients, added up. ucx_lanes: what UCX really uses.
        joined, left: workers found in the store, and gone from it again.
        final: nothing comes after this one.
    """

    parts: ClassVar[dict[str, type[Any]]] = {"finished": FinishedEpisode}

    pid: int
    episodes: int = 0
    steps: int = 0
    payload_bytes: int = 0
    first_s: float = 0.0
    last_s: float = 0.0
    finished: tuple[FinishedEpisode, ...] | list[FinishedEpisode] = ()
    version: int = 0
    entropy: float = 0.0
    divergence: float = 0.0
    update_s: float = 0.0
    ways: dict[str, dict[str, float]] = field(default_factory=dict)
    seat_transports: dict[int, str] = field(default_factory=dict)
    lost: dict[str, int] = field(default_factory=dict)
    retried: int = 0
    verified: int = 0
    mismatched: int = 0
    clients: dict[str, int] = field(default_factory=dict)
    ucx_lanes: tuple[str, ...] | list[str] = ()
    joined: int = 0
    left: int = 0
    final: bool = False
    error: str = ""
