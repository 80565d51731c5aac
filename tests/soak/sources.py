"""The two kinds of rings that the harness reads from, and how each of their processes can die."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil

from tests.soak.actors import Actor, Stage
from tests.soak.ledger import Ledger
from ucxx_transport import RingConfig, ServerConfig, SharedRingBuffer, UCXXServer
from ucxx_transport.ring.segment import segment_path

__all__ = ["SLOTS", "Source", "dwell_s", "is_running", "segment_exists"]

SLOTS = 12
SLOT_BYTES = 4 << 20
WRITER = "tests.e2e.programs.writer"


def ring_settings() -> dict[str, Any]:
    """Settings of every ring: nothing is ever overwritten, so whatever is lost was lost by a kill."""
    return {"slots": SLOTS, "slot_bytes": SLOT_BYTES, "on_full": "raise", "lock_timeout_s": 20.0}


@dataclass(slots=True)
class Source:
    """A ring, its writer and its server.

    Attributes:
        name: "home" (this process made the ring and keeps its server; the writer attaches) or "worker" (one
            process is worker, writer and server; this one only looks on).
        streams: writers so far; each payload carries its writer's number.
        server_pid, dead_pid: the server, as far as is known, and the one killed last. server_kills: how often.
        turn: which port's process is killed next.
    """

    name: str
    server: dict[str, Any]
    first_stream: int
    writer: Actor | None = None
    ring: SharedRingBuffer | None = None
    home_server: UCXXServer | None = None
    ledger: Ledger = field(default_factory=Ledger)
    streams: int = 0
    sequence: int = 0
    server_pid: int = 0
    dead_pid: int = 0
    server_kills: int = 0
    turn: int = 0

    def open(self, stage: Stage) -> None:
        """Make the ring, or have it made, and start a writer."""
        self.ledger = Ledger()
        if self.name == "home":
            self.ring = SharedRingBuffer.create(RingConfig(**ring_settings()))
            self.home_server = UCXXServer(self.ring, ServerConfig(**self.server))
            self.home_server.start()
        self.start_writer(stage)

    def start_writer(self, stage: Stage) -> None:
        """A writer in place of the one that was killed."""
        self.streams += 1
        stream = self.first_stream + self.streams
        if self.name == "home":
            assert self.ring is not None
            settings = {"ring": self.ring.name, "stream": stream}
        else:
            settings = {"create": ring_settings(), "server": self.server, "stream": stream}
        self.writer = stage.spawn(self.name, WRITER, settings)

    def is_open(self) -> bool:
        """Whether payloads can be written; attaches a worker's ring when it is there."""
        if self.writer is None or not self.writer.ready:
            return False
        if self.ring is None:
            self.ring = SharedRingBuffer.attach(self.writer.facts["ring"])
        return True

    def find_server(self) -> int:
        """The process of the port whose turn it is to be killed, 0 while it has none."""
        if self.home_server is not None:
            self.find_server_among(self.home_server.statistics().pids)
        return 0 if self.server_pid == self.dead_pid else self.server_pid

    def find_server_among(self, pids: Sequence[int | None]) -> None:
        """Learn the processes of the ports: they are killed in turn."""
        self.server_pid = pids[self.turn % len(pids)] or 0

    def server_killed(self, pid: int) -> None:
        """Who asks from here on gets the next one."""
        self.dead_pid = pid
        self.server_pid = 0
        self.server_kills += 1
        self.ledger.server_killed()

    def request_write(self, rng: random.Random) -> None:
        """One more payload, of any size from 1 byte on, small and large ones alike often."""
        assert self.writer is not None
        self.sequence += 1
        nbytes = min(SLOT_BYTES, int(2 ** rng.uniform(0, 22.2)))
        how = rng.choice(("reserve", "write_raw"))
        self.writer.request("write", sequence=self.sequence, nbytes=nbytes, how=how, dwell_s=dwell_s(rng))

    def close(self) -> None:
        """Stop the server and close the ring."""
        if self.home_server is not None:
            self.home_server.stop()
        if self.ring is not None:
            self.ring.close()
        self.ring = self.home_server = None


def dwell_s(rng: random.Random) -> float:
    """How long a payload is being written or looked at: mostly a moment, so that kills come in the middle of it."""
    return min(0.05, rng.expovariate(1 / 0.004))


def is_running(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def segment_exists(name: str) -> bool:
    """Whether a ring's file is there."""
    return segment_path(name).exists()
