"""The results of a run: what is counted, the summary, its tables, and the learning curve."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cartpole.plan import Plan
from ucxx_transport.units import format_bytes, format_duration

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["WINDOW", "Episode", "Kill", "Results", "Worker", "draw_curve", "print_summary"]

WINDOW = 50
"""Episodes that the mean return is taken over."""


class Episode(NamedTuple):
    """An episode that was fetched and verified; when, in seconds since the trainer's start."""

    at_s: float
    total_reward: float
    steps: int
    nbytes: int
    seat: int


class Kill(NamedTuple):
    """The SIGKILL of the run: when, after how many episodes, and which seat's process."""

    at_s: float
    episode: int
    seat: int


@dataclass(slots=True, kw_only=True)
class Worker:
    """One worker process.

    Attributes:
        worker: its number; a replacement has its predecessor's.
        pid: of the process.
        read: "in place" or "over UCX".
        state: "starting", "running", "killed", "failed" or "stopped".
        episodes: delivered to the trainer.
        replaced_by: seat of the process that took its place.
        ring: its ring's counters.
    """

    worker: int
    pid: int
    read: str
    state: str = "starting"
    episodes: int = 0
    replaced_by: int | None = None
    ring: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class Results:
    """What is known of a run, while it goes on and after.

    Attributes:
        plan: its settings.
        reason: why it ended; see `run`.
        failure: what failed.
        elapsed_s: from its start to the reason.
        episodes: all that were delivered, in the order in which they came.
        workers: the worker processes, by seat.
        kill: None: there was none yet.
        trainer: its counters, JSON-safe; see `Trainer.counters`.
        segments_left: names of this run's segments that were found at the end.
        processes_left: pids of this run's processes that were found at the end.
        curve: the picture's file.
    """

    plan: Plan
    reason: str = ""
    failure: str = ""
    elapsed_s: float = 0.0
    episodes: list[Episode] = field(default_factory=list)
    workers: list[Worker] = field(default_factory=list)
    kill: Kill | None = None
    trainer: dict[str, Any] = field(default_factory=dict)
    segments_left: list[str] = field(default_factory=list)
    processes_left: list[int] = field(default_factory=list)
    curve: str | None = None

    def add(self, episode: Episode) -> None:
        """Add an episode; a worker runs from its first one on."""
        self.episodes.append(episode)
        worker = self.workers[episode.seat]
        worker.episodes += 1
        if worker.state == "starting":
            worker.state = "running"

    @property
    def mean_return(self) -> float | None:
        """Of the last 50 episodes, or of fewer; None before the first."""
        last = [episode.total_reward for episode in self.episodes[-WINDOW:]]
        return sum(last) / len(last) if last else None

    @property
    def replacement_episodes(self) -> int:
        """Delivered by the process in the killed one's place."""
        replacement = self.workers[self.kill.seat].replaced_by if self.kill is not None else None
        return 0 if replacement is None else self.workers[replacement].episodes

    def problems(self) -> list[str]:
        """What was asked for and is not there."""
        plan, count, mean = self.plan, len(self.episodes), self.mean_return
        problems = [self.failure] if self.failure else []
        if self.reason == "interrupted":
            problems.append(f"interrupted after {self.elapsed_s:.0f} s and {count} episodes")
        if self.reason == "time":
            if plan.goal is not None:
                got = "no episode arrived" if mean is None else f"the mean return of the last {WINDOW} is {mean:.0f}"
                missed = f"the goal of {plan.goal:.0f} was not reached within {plan.seconds:.0f} s: {got}"
                problems.append(f"{missed}; try a longer --seconds or another --seed")
            elif plan.episodes is not None and count < plan.episodes:
                problems.append(f"{count} of {plan.episodes} episodes within {plan.seconds:.0f} s")
            if plan.kill and not self.replacement_episodes:
                problems.append("no worker was killed and replaced in that time: a longer --seconds, or --no-kill")
        if mismatched := self.trainer.get("checksums", {}).get("mismatched"):
            problems.append(f"{mismatched} episodes were not byte-exact")
        if self.segments_left:
            problems.append(f"segments left in /dev/shm: {', '.join(self.segments_left)}")
        if self.processes_left:
            problems.append(f"processes left: {', '.join(map(str, self.processes_left))}")
        return problems

    def summary(self) -> dict[str, Any]:
        """Everything as JSON-safe values; `ok`: all that was asked for is there."""
        plan, problems = self.plan, self.problems()
        rings = sum((Counter(worker.ring) for worker in self.workers), Counter())
        nbytes = sum(episode.nbytes for episode in self.episodes)
        spent_s = max(self.episodes[-1].at_s - self.episodes[0].at_s, 1e-3) if self.episodes else 1.0
        return {
            "ok": not problems,
            "problems": problems,
            "reason": self.reason,
            "env": plan.environment.name,
            "seed": plan.seed,
            "goal": plan.goal,
            "mean_return": self.mean_return,
            "elapsed_s": self.elapsed_s,
            "episodes": len(self.episodes),
            "episodes_per_s": len(self.episodes) / spent_s,
            "steps": sum(episode.steps for episode in self.episodes),
            "payload_bytes": nbytes,
            "payload_bytes_per_s": nbytes / spent_s,
            **self.trainer,
            "rings": {
                "written": rings["committed"],
                "waited": rings["blocked"],
                "overwritten": rings["overwritten"],
                "reclaimed": rings["reclaimed_writes"] + rings["reclaimed_reads"],
            },
            "kill": self._kill_summary(),
            "workers": [asdict(worker) for worker in self.workers],
            "segments_left": self.segments_left,
            "processes_left": self.processes_left,
            "curve": self.curve,
            "log": str(plan.log) if plan.log.exists() else None,
        }

    def _kill_summary(self) -> dict[str, Any] | None:
        if self.kill is None:
            return None
        worker = self.workers[self.kill.seat]
        seats = [episode.seat for episode in self.episodes[self.kill.episode :]]
        first = seats.index(worker.replaced_by) if worker.replaced_by in seats else len(seats)
        return {
            "worker": worker.worker,
            "after_s": self.kill.at_s,
            "after_episode": self.kill.episode,
            "episodes_of_others_meanwhile": sum(seat != self.kill.seat for seat in seats[:first]),
            "episodes_of_its_replacement": self.replacement_episodes,
        }


def print_summary(console: Console, summary: dict[str, Any]) -> None:
    """Print the summary as tables, then what is not as it should be."""
    from rich.table import Table

    table = Table("transport", title="Reads, by the transport really used", title_justify="left")
    for name in ("reads", "bytes", "GB/s", "p50", "p95", "p99"):
        table.add_column(name, justify="right", no_wrap=True)
    for reads in summary.get("reads", ()):
        durations = [format_duration(reads[name]) for name in ("p50_s", "p95_s", "p99_s")]
        nbytes, speed = format_bytes(reads["nbytes"]), f"{reads['gb_per_s']:.3g}"
        table.add_row(reads["transport"], str(reads["reads"]), nbytes, speed, *durations)
    console.print(table)
    facts = Table(title=f"{summary['env']}, seed {summary['seed']}", title_justify="left", show_header=False)
    for name, value in summary.items():
        if value is not None and name not in ("ok", "problems", "env", "seed", "reads", "workers"):
            facts.add_row(name.replace("_", " "), _in_words(name, value))
    console.print(facts)
    for problem in summary["problems"]:
        console.print(f"[bold red]✗[/] {problem}")
    if summary["ok"]:
        console.print("[bold green]✓[/] everything that was asked for is there")


def _in_words(name: str, value: object) -> str:
    if isinstance(value, dict):
        return "\n".join(f"{key.replace('_', ' ')}: {_in_words(key, each)}" for key, each in value.items()) or "0"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "0"
    if isinstance(value, (int, float)) and "_bytes" in name:
        return format_bytes(value)
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def draw_curve(results: Results) -> str:
    """Draw the returns, their running mean, the goal and the kill into `plan.out`; returns its name."""
    from matplotlib.figure import Figure

    plan = results.plan
    times, returns, steps, _, seats = (np.array(column) for column in zip(*results.episodes, strict=True))
    figure = Figure(figsize=(9, 5), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    for seat, worker in enumerate(results.workers):
        own, label = seats == seat, f"worker {worker.worker}, pid {worker.pid}, read {worker.read}"
        axes.plot(times[own], returns[own], ".", markersize=3, alpha=0.35, label=label)
    if len(returns) >= WINDOW:
        means = np.convolve(returns, np.full(WINDOW, 1.0 / WINDOW), mode="valid")
        axes.plot(times[WINDOW - 1 :], means, color="black", linewidth=1.8, label=f"mean of {WINDOW}")
    if plan.goal is not None:
        axes.axhline(plan.goal, color="green", linestyle="--", linewidth=1, label=f"goal {plan.goal:.0f}")
    if results.kill is not None:
        axes.axvline(times[results.kill.episode - 1], color="red", linestyle=":", label="SIGKILL")
    title = f"{plan.environment.name}: {len(returns)} episodes, {steps.sum()} steps, seed {plan.seed}"
    axes.set(title=title, xlabel="seconds of training", ylabel="return of an episode")
    axes.legend(loc="best", fontsize=8, markerscale=3)
    figure.savefig(plan.out, format="png")
    return str(plan.out)
