"""What one run of the demo is asked to do; fixed before any process starts."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Final, Literal

from cartpole.environment import EnvironmentFacts, probe_environment
from cartpole.sizing import RingSize, plan_ring_size
from ucxx_transport import StoreConfig, open_store
from ucxx_transport.errors import ConfigError
from ucxx_transport.units import parse_bytes

__all__ = ["ClientLocal", "DemoPlan", "LocalChoice", "make_plan"]

ClientLocal = Literal["auto", "view", "copy", "off"]
LocalChoice = Literal["mixed", "auto", "view", "copy", "off"]

_SPARE_SEATS: Final = 3
_GOALS: Final = {"CartPole-v1": 450.0}
_EPISODES_WITHOUT_GOAL: Final = 20


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
        store: URL of the store in which workers are found; None: the trainer is told of them.
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
    store: str | None
    out: Path
    log: Path

    @property
    def store_config(self) -> StoreConfig:
        """This run's part of the store."""
        return StoreConfig(namespace=f"demo-{self.run_id}")

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


def make_plan(
    *,
    env: str,
    workers: int,
    ports: int,
    slots: int | None,
    slot_bytes: str | None,
    local: LocalChoice,
    shm_lanes: bool,
    seconds: float,
    episodes: int | None,
    goal: str,
    kill: bool,
    seed: int,
    store: str | None,
    out: Path,
) -> DemoPlan:
    """The plan for the command's options, as they were given; makes the folder that the learning curve goes to.

    Raises:
        ConfigError: an option cannot be followed; the message names it.
        ModuleNotFoundError: a module that is needed sooner or later is not installed.
    """
    for module in ("matplotlib", "ucxx"):
        if find_spec(module) is None:
            raise ModuleNotFoundError(f"No module named {module!r}", name=module)
    if store is not None:
        open_store(store).close()  # refused here rather than by each child
    facts = probe_environment(env)
    wanted = _parse_goal(goal, facts)
    out = out.absolute()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise ConfigError(f"the folder cannot be made: {exc}", field="--out", value=str(out)) from exc
    return DemoPlan(
        run_id=secrets.token_hex(4),
        facts=facts,
        size=plan_ring_size(facts, slots=slots, slot_bytes=_parse_slot_bytes(slot_bytes)),
        workers=workers,
        ports=ports,
        local=local,
        shm_lanes=shm_lanes,
        seconds=seconds,
        episodes=_EPISODES_WITHOUT_GOAL if episodes is None and wanted is None else episodes,
        goal=wanted,
        kill=kill,
        seed=seed,
        store=store,
        out=out,
        log=out.with_suffix(".log"),
    )


def _parse_goal(text: str, facts: EnvironmentFacts) -> float | None:
    if text == "none":
        return None
    if text == "auto":
        return _GOALS.get(facts.env_id)
    try:
        return float(text)
    except ValueError as exc:
        raise ConfigError("a goal is a number, 'none' or 'auto'", field="--goal", value=text) from exc


def _parse_slot_bytes(text: str | None) -> int | None:
    if text is None:
        return None
    try:
        return parse_bytes(text)
    except ValueError as exc:
        raise ConfigError(str(exc), field="--slot-bytes", value=text) from exc
