"""What one run of the demo is asked to do; fixed before any process starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ucxx_transport.cli.demo.environment import EnvironmentFacts
from ucxx_transport.cli.demo.sizing import RingSize

__all__ = ["ClientLocal", "DemoPlan", "LocalChoice"]

ClientLocal = Literal["auto", "view", "copy", "off"]
LocalChoice = Literal["mixed", "auto", "view", "copy", "off"]

_SPARE_SEATS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoPlan:
    """One run.

    A *seat* is one worker process in the run's books: seats 0 … workers-1 are taken at the start, a replacement takes
    the next free one.

    Attributes:
        run_id: names this run's segments and processes, so that nobody else's are counted as its own.
        facts: the environment. size: its rings.
        ports: of each worker's server. shm_lanes: let UCX use shared memory.
        local: "mixed" reads every second worker in place and the others over UCX; else it is every client's setting.
        seconds: limit of the whole run. episodes: stop after so many (None: no limit).
        goal: mean return over the last 50 episodes to reach (None: no goal).
        kill: SIGKILL one worker half-way and start another.
        out: the learning curve. log: the children's output.
    """

    run_id: str
    facts: EnvironmentFacts
    size: RingSize
    workers: int
    ports: int
    local: LocalChoice
    shm_lanes: bool
    seconds: float
    episodes: int | None
    goal: float | None
    kill: bool
    seed: int
    out: Path
    log: Path

    @property
    def seats(self) -> int:
        """Workers, and the replacements that there are queues for."""
        return self.workers + _SPARE_SEATS

    @property
    def ring_prefix(self) -> str:
        """How the names of this run's rings begin."""
        return f"demo-{self.run_id}-"

    def ring_name(self, seat: int) -> str:
        """The ring of the worker on `seat`."""
        return f"{self.ring_prefix}{seat}"

    def local_of(self, worker: int) -> ClientLocal:
        """How the trainer's client reads from a worker (0 … workers-1), and from those that replace it."""
        if self.local == "mixed":
            return "auto" if worker % 2 == 0 else "off"
        return self.local
