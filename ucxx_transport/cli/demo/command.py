"""`ucxx-transport demo`: rollout workers and a trainer learn an environment through the transport, before your eyes."""

from __future__ import annotations

import json
import secrets
import sys
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Console

from ucxx_transport.cli.demo.environment import EnvironmentFacts, probe_environment
from ucxx_transport.cli.demo.orchestrator import StopSignals
from ucxx_transport.cli.demo.plan import DemoPlan, LocalChoice
from ucxx_transport.cli.demo.run import run_plan
from ucxx_transport.cli.demo.sizing import plan_ring_size
from ucxx_transport.errors import ConfigError
from ucxx_transport.units import parse_bytes

__all__ = ["demo"]

_GOALS: Final = {"CartPole-v1": 450.0}
_EPISODES_WITHOUT_GOAL: Final = 20
_EXIT_USAGE: Final = 2


def demo(
    *,
    env: Annotated[
        str, typer.Option(help="Gymnasium environment with discrete actions; ALE/Pong-v5 sends raw frames.")
    ] = "CartPole-v1",
    workers: Annotated[int, typer.Option(min=1, max=32, help="Rollout workers, a process each.")] = 2,
    ports: Annotated[int, typer.Option(min=1, max=64, help="Ports of each worker's server.")] = 2,
    slots: Annotated[
        int | None, typer.Option(min=1, max=65536, help="Slots of each ring; derived if not given.")
    ] = None,
    slot_bytes: Annotated[
        str | None, typer.Option(help="Largest slot ('64MiB'); longer episodes are cut. Derived if not given.")
    ] = None,
    local: Annotated[
        LocalChoice,
        typer.Option(help="mixed: every second worker over UCX, the others in place; off: UCX for all."),
    ] = "mixed",
    shm_lanes: Annotated[bool, typer.Option("--shm-lanes", help="Let UCX use shared memory.")] = False,
    seconds: Annotated[float, typer.Option(min=1.0, help="Time limit of the whole run.")] = 180.0,
    episodes: Annotated[
        int | None, typer.Option(min=1, help="Stop after so many episodes (20 where there is no goal).")
    ] = None,
    goal: Annotated[
        str, typer.Option(help="Mean return of the last 50 episodes to reach: a number, 'none', or 'auto'.")
    ] = "auto",
    kill: Annotated[bool, typer.Option(help="Kill one worker by SIGKILL half-way and start another.")] = True,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the weights and the environments.")] = 0,
    out: Annotated[Path, typer.Option(help="Where the learning curve goes.")] = Path("out/learning_curve.png"),
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object at the end, and nothing else.")
    ] = False,
) -> None:
    """Train a policy with rollout workers in processes of their own, each episode through the transport.

    One worker is killed half-way and replaced. Ends with what was moved and how fast, and a learning curve.
    """
    signals = StopSignals()
    with signals.caught():
        try:
            facts = probe_environment(env)
            goal_value = _parse_goal(goal, facts)
            size = plan_ring_size(facts, slots=slots, slot_bytes=_parse_slot_bytes(slot_bytes))
            plan = DemoPlan(
                run_id=secrets.token_hex(4),
                facts=facts,
                size=size,
                workers=workers,
                ports=ports,
                local=local,
                shm_lanes=shm_lanes,
                seconds=seconds,
                episodes=episodes if episodes is not None or goal_value is not None else _EPISODES_WITHOUT_GOAL,
                goal=goal_value,
                kill=kill,
                seed=seed,
                out=out.absolute(),
                log=out.absolute().with_suffix(".log"),
            )
            plan.out.parent.mkdir(parents=True, exist_ok=True)
        except (ConfigError, OSError) as exc:
            Console(stderr=True).print(f"[bold red]error:[/] {exc}", highlight=False)
            raise typer.Exit(_EXIT_USAGE) from exc
        console = Console(stderr=as_json)
        summary, status = run_plan(plan, signals, console)
        if as_json:
            sys.stdout.write(json.dumps(summary) + "\n")
            sys.stdout.flush()
    raise typer.Exit(status)


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
