"""The end of a run: one plain dictionary with everything in it, and the table that shows it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from cartpole.books import Books
from cartpole.director import WINDOW
from cartpole.messages import TrainerStatus
from cartpole.plan import DemoPlan
from ucxx_transport.units import format_bytes, format_duration

__all__ = ["Leftovers", "RunEnd", "print_report", "summarise"]

Summary = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Leftovers:
    """What was found after everything had ended: segments of this run, and pids of its processes."""

    segments: list[str]
    processes: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEnd:
    """Why and how the run ended."""

    reason: str
    failure: str
    elapsed_s: float
    leftovers: Leftovers
    curve: str | None


def summarise(plan: DemoPlan, books: Books, end: RunEnd) -> Summary:
    """Everything about the run as JSON-safe values; `ok` says whether all that was asked for is there."""
    problems = _problems(plan, books, end)
    status = books.trainer
    episodes = len(books.finished)
    spent_s = status.last_s - status.first_s if status is not None else 0.0
    nbytes = status.payload_bytes if status is not None else 0
    return {
        "ok": not problems,
        "reason": end.reason,
        "problems": problems,
        "env": plan.facts.env_id,
        "seed": plan.seed,
        "goal": plan.goal,
        "goal_reached_s": books.goal_at_s,
        "mean_return_last_50": books.window_mean,
        "recent_mean_return": books.recent_mean,
        "best_mean_return_50": books.best_mean,
        "episodes": episodes,
        "steps": status.steps if status is not None else 0,
        "updates": status.version if status is not None else 0,
        "elapsed_s": end.elapsed_s,
        "payload_bytes": nbytes,
        "episodes_per_s": episodes / spent_s if spent_s > 0 else 0.0,
        "bytes_per_s": nbytes / spent_s if spent_s > 0 else 0.0,
        "reads": _reads(books),
        "ucx_lanes": list(status.ucx_lanes) if status is not None else [],
        "counts": _counts(books),
        "lost": dict(status.lost) if status is not None else {},
        "checksums": {
            "verified": status.verified if status is not None else 0,
            "mismatched": status.mismatched if status is not None else 0,
        },
        "kill": _kill(books),
        "store": None if plan.store is None else _membership(plan.store, status),
        "workers": _workers(books),
        "events": [asdict(event) for event in books.events],
        "segments_left": end.leftovers.segments,
        "processes_left": end.leftovers.processes,
        "curve": end.curve,
    }


def print_report(console: Console, summary: Summary) -> None:
    """Print the summary as tables, and what was not as it should be."""
    if summary["reads"]:
        console.print(_reads_table(summary))
    console.print(_facts_table(summary))
    for problem in summary["problems"]:
        console.print(f"[bold red]✗[/] {problem}", highlight=False)
    if summary["ok"]:
        console.print("[bold green]✓[/] everything that was asked for is there", highlight=False)


def _problems(plan: DemoPlan, books: Books, end: RunEnd) -> list[str]:
    problems = []
    if end.reason == "interrupted":
        problems.append(f"interrupted after {end.elapsed_s:.0f} s and {len(books.finished)} episodes")
    if end.failure:
        problems.append(end.failure)
    if end.reason == "time" and plan.goal is not None:
        mean = books.recent_mean
        got = "no episode arrived" if mean is None else f"the mean return of the last 50 episodes is {mean:.0f}"
        problems.append(
            f"the goal of {plan.goal:.0f} was not reached within {plan.seconds:.0f} s: {got}; "
            "try a longer --seconds or another --seed"
        )
    elif end.reason == "time" and plan.episodes is not None and len(books.finished) < plan.episodes:
        problems.append(f"{len(books.finished)} of {plan.episodes} episodes within {plan.seconds:.0f} s")
    if plan.kill and end.reason == "time" and not books.replacement_episodes:
        problems.append("no worker was killed and replaced in that time: try a longer --seconds, or --no-kill")
    status = books.trainer
    if status is not None and status.mismatched:
        problems.append(f"{status.mismatched} episodes were not byte-exact")
    if end.leftovers.segments:
        problems.append(f"segments left in /dev/shm: {', '.join(end.leftovers.segments)}")
    if end.leftovers.processes:
        problems.append(f"processes left: {', '.join(map(str, end.leftovers.processes))}")
    return problems


def _kill(books: Books) -> dict[str, Any] | None:
    if books.kill is None:
        return None
    return asdict(books.kill) | {
        "replacement_episodes": books.replacement_episodes,
        "episodes_meanwhile": books.episodes_meanwhile,
    }


def _membership(store: str, status: TrainerStatus | None) -> dict[str, Any]:
    joined, left = (status.joined, status.left) if status is not None else (0, 0)
    return {"url": store, "joined": joined, "left": left}


def _reads(books: Books) -> dict[str, dict[str, float]]:
    ways = books.trainer.ways if books.trainer is not None else {}
    return {
        way: {**numbers, "gb_per_s": numbers["bytes"] / max(numbers["busy_s"], 1e-9) / 1e9}
        for way, numbers in sorted(ways.items())
    }


def _counts(books: Books) -> dict[str, int]:
    """The counts that must not be silent, from whoever keeps them."""
    status = books.trainer
    ring = books.ring_totals()
    clients = status.clients if status is not None else {}
    lost = status.lost if status is not None else {}
    return {
        "lost": sum(lost.values()),
        "stale": lost.get("stale", 0),
        "dropped": ring["overwritten"] + books.worker_total("given_up"),
        "retried": (status.retried if status is not None else 0) + clients.get("retries", 0),
        "rotated": clients.get("rotations", 0),
        "quarantined": clients.get("quarantined", 0),
        "duplicates": clients.get("duplicates", 0),
        "reclaimed": ring["reclaimed_writes"] + ring["reclaimed_reads"],
        "waited": ring["blocked"],
        "written": ring["committed"],
        "dead_rings_swept": books.dead_rings_swept,
    }


def _workers(books: Books) -> list[dict[str, Any]]:
    transports = books.trainer.seat_transports if books.trainer is not None else {}
    return [
        {
            "worker": book.worker,
            "pid": book.pid,
            "state": book.state,
            "way": book.way,
            "transport": transports.get(book.seat),
            "episodes": book.delivered,
        }
        for book in books.seats.values()
    ]


def _reads_table(summary: Summary) -> Table:
    table = Table(title="Reads, by the transport really used", title_justify="left")
    table.add_column("transport")
    for name in ("reads", "bytes", "GB/s", "p50", "p95", "p99"):
        table.add_column(name, justify="right", no_wrap=True)
    for way, numbers in summary["reads"].items():
        table.add_row(
            way,
            f"{numbers['reads']:.0f}",
            format_bytes(numbers["bytes"]),
            f"{numbers['gb_per_s']:.3g}",
            *(format_duration(numbers[name] / 1e6) for name in ("p50_us", "p95_us", "p99_us")),
        )
    return table


def _facts_table(summary: Summary) -> Table:
    table = Table(title=f"{summary['env']}, seed {summary['seed']}", title_justify="left", show_header=False)
    table.add_column("what")
    table.add_column("how much", justify="right")
    for name, value in _facts(summary):
        table.add_row(name, value)
    return table


def _facts(summary: Summary) -> list[tuple[str, str]]:
    counts, sums, kill = summary["counts"], summary["checksums"], summary["kill"]
    mean = summary["recent_mean_return"]
    reached = summary["goal_reached_s"]
    rows = [
        ("episodes", f"{summary['episodes']} ({summary['episodes_per_s']:.3g} /s)"),
        ("steps, updates", f"{summary['steps']}, {summary['updates']}"),
        ("payload bytes", f"{format_bytes(summary['payload_bytes'])} ({format_bytes(summary['bytes_per_s'])}/s)"),
        (f"mean return, last {min(WINDOW, summary['episodes'])}", "-" if mean is None else f"{mean:.1f}"),
    ]
    if summary["goal"] is not None:
        rows.append((f"goal {summary['goal']:.0f} reached", "no" if reached is None else f"after {reached:.1f} s"))
    if summary["ucx_lanes"]:
        rows.append(("UCX lanes", ", ".join(summary["ucx_lanes"])))
    rows += [
        ("whole run", f"{summary['elapsed_s']:.1f} s"),
        ("checksum verified / wrong", f"{sums['verified']} / {sums['mismatched']}"),
        ("stale / dropped", f"{counts['stale']} / {counts['dropped']}"),
        ("retried / reclaimed", f"{counts['retried']} / {counts['reclaimed']}"),
        ("episodes lost", _reasons(summary["lost"])),
        ("writes that waited for a slot", str(counts["waited"])),
    ]
    if kill is not None:
        rows.append((f"worker {kill['worker']} killed", f"after {kill['at_s']:.1f} s, episode {kill['episode']}"))
        rows.append(
            ("episodes meanwhile, of its replacement", f"{kill['episodes_meanwhile']}, {kill['replacement_episodes']}")
        )
        rows.append(("dead workers' rings swept meanwhile", str(counts["dead_rings_swept"])))
    if summary["store"] is not None:
        rows.append(("workers found in the store, gone", f"{summary['store']['joined']}, {summary['store']['left']}"))
    rows += [
        ("segments left in /dev/shm", str(len(summary["segments_left"]))),
        ("processes left", str(len(summary["processes_left"]))),
        ("learning curve", summary["curve"] or "-"),
    ]
    return rows


def _reasons(lost: dict[str, int]) -> str:
    if not lost:
        return "0"
    return ", ".join(f"{count} {name}" for name, count in sorted(lost.items()))
