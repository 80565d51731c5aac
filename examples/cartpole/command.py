"""`ucxx-transport demo`: rollout workers and a trainer learn an environment through the transport."""

from __future__ import annotations

import os
import secrets
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cartpole.processes import StopSignals
from ucxx_transport import ConfigError, open_store
from ucxx_transport.cli.program import AsJson, console, print_error, print_json
from ucxx_transport.units import parse_bytes

if TYPE_CHECKING:
    from cartpole.plan import Plan

__all__ = ["demo"]

_GOALS = {"CartPole-v1": 450.0}
_EPISODES_WITHOUT_GOAL = 20
_ENVIRONMENT = {
    # The processes share the cores: one thread of BLAS each. Read when numpy is imported.
    **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
    "UCX_LOG_FILE": "stderr",  # UCX's own messages; its default is standard output, which is the summary's
}
_EXIT_FAILED = 1
_EXIT_USAGE = 2
_EXIT_SIGNALLED = 128


def demo(
    *,
    env: Annotated[
        str, typer.Option(help="Gymnasium environment with discrete actions; ALE/Pong-v5 sends raw frames.")
    ] = "CartPole-v1",
    workers: Annotated[int, typer.Option(min=1, max=32, help="Rollout workers, a process each.")] = 2,
    ports: Annotated[int, typer.Option(min=1, max=64, help="Ports of each worker's server.")] = 2,
    slot_bytes: Annotated[
        str | None, typer.Option(help="Largest slot of the rings ('64MiB'); longer episodes are cut.")
    ] = None,
    local: Annotated[
        Literal["mixed", "auto", "view", "copy", "off"],
        typer.Option(help="mixed: every second worker over UCX, the others in place; off: UCX for all."),
    ] = "mixed",
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

    def make_plan() -> Plan:
        from cartpole.environment import inspect_environment
        from cartpole.plan import Plan, ring_size

        for module in ("matplotlib", "ucxx"):
            if find_spec(module) is None:
                raise ModuleNotFoundError(f"No module named {module!r}", name=module)
        if store is not None:
            open_store(store).close()  # a wrong URL is refused here rather than by each child
        environment = inspect_environment(env)
        max_steps, slots = ring_size(environment, _bytes_in(slot_bytes))
        wanted = _goal_in(goal, env)
        return Plan(
            run_id=secrets.token_hex(4),
            environment=environment,
            max_steps=max_steps,
            slots=slots,
            workers=workers,
            ports=ports,
            local=local,
            seconds=seconds,
            episodes=_EPISODES_WITHOUT_GOAL if episodes is None and wanted is None else episodes,
            goal=wanted,
            kill=kill,
            seed=seed,
            store=store,
            out=_file_in(out),
        )

    os.environ.update(_ENVIRONMENT | os.environ)
    signals = StopSignals()
    with signals.caught():  # before the imports that take long
        try:
            plan = make_plan()
        except ConfigError as exc:
            print_error(exc.message, exc.facts)
            if as_json:
                print_json({"error": {"kind": "ConfigError", "message": exc.message, "facts": exc.facts}})
            raise typer.Exit(_EXIT_USAGE) from exc
        from cartpole.report import print_summary
        from cartpole.run import Run

        screen = console(stderr=as_json)
        summary = Run(plan, signals, screen.print).execute().summary()
        print_summary(screen, summary)
        if as_json:
            print_json(summary)
    if signals.number is not None:
        raise typer.Exit(_EXIT_SIGNALLED + signals.number)
    raise typer.Exit(0 if summary["ok"] else _EXIT_FAILED)


def _goal_in(text: str, env: str) -> float | None:
    if text in ("auto", "none"):
        return _GOALS.get(env) if text == "auto" else None
    try:
        return float(text)
    except ValueError as exc:
        raise ConfigError("a goal is a number, 'none' or 'auto'", field="--goal", value=text) from exc


def _bytes_in(text: str | None) -> int | None:
    try:
        return None if text is None else parse_bytes(text)
    except ValueError as exc:
        raise ConfigError(str(exc), field="--slot-bytes", value=text) from exc


def _file_in(path: Path) -> Path:
    try:
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise ConfigError(f"the folder cannot be made: {exc}", field="--out", value=str(path)) from exc
    return path.absolute()
