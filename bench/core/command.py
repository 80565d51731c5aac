"""`ucxx-transport bench`, which is also `scripts/bench`: what this machine gives, beside peers of the same run.

A question is a module of `bench` with `measure(question, plan) -> list[Row]`; its docstring's first line is its title.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.progress import Progress

from bench.core import figures as figures_module
from bench.core.figures import Row, SkippedError
from bench.core.host import host_facts
from bench.core.rounds import Plan
from bench.core.table import disturbance, profile_table, question_table, verdict_table
from bench.targets import TARGETS, judge
from ucxx_transport.cli.program import AsJson, console, print_json
from ucxx_transport.errors import ConfigError, TransportError

__all__ = ["QUESTIONS", "bench", "chosen_questions"]

QUESTIONS: Final = (
    *("read", "batch", "take", "lanes", "steps", "local", "ring", "ports"),
    *("sources", "idle", "spinning", "gpu", "trainer", "stores"),
)
FORMAT: Final = "ucxx_transport.bench/2"
ROUNDS: Final = 3
TURN_S: Final = 0.2
QUICK_TURN_S: Final = 0.1


def bench(
    *,
    only: Annotated[list[str] | None, typer.Option(help=f"some of {', '.join(QUESTIONS)}; commas or repeated")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="small payloads, shorter turns")] = False,
    check: Annotated[bool, typer.Option("--check", help="print all targets; exit 1 when one is missed")] = False,
    profile: Annotated[bool, typer.Option("--profile", help="where both ends' time goes, by Linux's perf")] = False,
    rounds: Annotated[int | None, typer.Option(min=1, help="turns of every subject in every case")] = None,
    turn_s: Annotated[float | None, typer.Option("--turn-s", min=0.0, help="seconds timed in a turn, at least")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure reads over UCX and in place, batches, many clients and sources: each beside its peers and ceilings."""
    names = chosen_questions(only or (sorted({target.question for target in TARGETS}) if check else []))
    terminal = console(stderr=as_json)
    with Progress(console=terminal, transient=True) as progress:
        task = progress.add_task("", total=None)
        plan = Plan(
            rounds=rounds or ROUNDS,
            turn_s=(QUICK_TURN_S if quick else TURN_S) if turn_s is None else turn_s,
            quick=quick,
            profile=profile,
            on_turn=lambda words: progress.update(task, description=words),
        )
        asked = _ask(names, plan, terminal)
    verdicts = judge(asked.rows, names, reasons={**asked.skipped, **asked.failed})
    if as_json:
        print_json({**_header(plan), **asked.to_dict(), "targets": [verdict.to_dict() for verdict in verdicts]})
    elif check:
        terminal.print(verdict_table(verdicts))
    if asked.failed or (check and any(verdict.word == "missed" for verdict in verdicts)):
        raise typer.Exit(1)


def chosen_questions(only: Iterable[str]) -> list[str]:
    """Questions by name, in their order; all of them where none is named.

    Raises:
        ConfigError: there is no such question.
    """
    named = [word.strip() for words in only for word in words.split(",")]
    for word in named:
        if word not in QUESTIONS:
            raise ConfigError(f"--only {word}: the questions are {', '.join(QUESTIONS)}", field="only", value=word)
    return [name for name in QUESTIONS if name in named or not named]


@dataclass(slots=True)
class _Asked:
    """What came of all questions: rows, and why there are none, by question."""

    rows: list[Row] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {"rows": [row.to_dict() for row in self.rows], "skipped": self.skipped, "failed": self.failed}


def _ask(names: Sequence[str], plan: Plan, terminal: Console) -> _Asked:
    """Ask all, and show each answer as it comes: a question that fails costs no other its answer."""
    asked = _Asked()
    for name in names:
        module = import_module(f"bench.{name}")
        title = f"{name}: {(module.__doc__ or '').partition('?')[0]}?"
        try:
            rows = module.measure(name, plan)
        except SkippedError as error:
            asked.skipped[name] = str(error)
            terminal.print(f"{title} Skipped: {error}")
        except TransportError as error:
            asked.failed[name] = str(error)
            terminal.print(f"{title} Failed: {error}", style="red")
        else:
            asked.rows += rows
            terminal.print(question_table(title, rows))
            if plan.profile:
                terminal.print(profile_table(name, rows))
    warning = disturbance(asked.rows)
    if warning is not None:
        terminal.print(warning, style="yellow")
    return asked


def _header(plan: Plan) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "host": host_facts(),
        "figures": figures_module.__doc__,
        "plan": {"rounds": plan.rounds, "turn_s": plan.turn_s, "quick": plan.quick},
    }
