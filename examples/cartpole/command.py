"""`ucxx-transport demo`: rollout workers and a trainer learn an environment through the transport, before your eyes.

What takes long to import is imported inside, with Ctrl-C caught already.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from cartpole.signals import StopSignals
from ucxx_transport.cli.output import AsJson, console, print_error, print_json
from ucxx_transport.errors import ConfigError

__all__ = ["demo"]

_EXIT_USAGE = 2
_EXIT_SIGNALLED = 128


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
        Literal["mixed", "auto", "view", "copy", "off"],
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
    store: Annotated[
        str | None,
        typer.Option(help="Have the trainer find its workers in this store: local://, etcd://host:port."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Where the learning curve goes.")] = Path("out/learning_curve.png"),
    as_json: AsJson = False,
) -> None:
    """Train a policy with rollout workers in processes of their own, each episode through the transport.

    One worker is killed half-way and replaced. Ends with what was moved and how fast, and a learning curve.
    """
    signals = StopSignals()
    with signals.caught():
        from cartpole.plan import make_plan
        from cartpole.run import run_plan

        try:
            plan = make_plan(
                env=env,
                workers=workers,
                ports=ports,
                slots=slots,
                slot_bytes=slot_bytes,
                local=local,
                shm_lanes=shm_lanes,
                seconds=seconds,
                episodes=episodes,
                goal=goal,
                kill=kill,
                seed=seed,
                store=store,
                out=out,
            )
        except ConfigError as exc:
            print_error(exc.message, exc.facts)
            if as_json:
                print_json({"error": {"kind": "ConfigError", "message": exc.message, "facts": exc.facts}})
            raise typer.Exit(_EXIT_USAGE) from exc
        if signals.number is not None:  # nothing was started yet
            raise typer.Exit(_EXIT_SIGNALLED + signals.number)
        summary, status = run_plan(plan, signals, console(stderr=as_json))
        if as_json:
            print_json(summary)
    raise typer.Exit(status)
