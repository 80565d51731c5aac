"""How fast does a payload get from a worker to a trainer, by each way there is, and what does that cost?

    python bench/throughput.py            # all sizes, 10 to 30 minutes
    python bench/throughput.py --quick    # 3 sizes, 2 to 7 minutes
    python bench/throughput.py --check    # and hold the figures against the targets; exit 1 if one is not met

Writes throughput.json and throughput.png under --out. bench/README.md says how to read them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that `python bench/throughput.py` finds its siblings

from rich.console import Console
from rich.table import Table

from bench.busy_worker import BusyWorker, measure_busy_worker
from bench.core.command import measure_sizes, parse_sizes
from bench.core.control import ControlledProcess
from bench.core.document import as_document
from bench.core.host import commit_of
from bench.core.lineup import transport_lanes
from bench.core.results import Result
from bench.core.ring_source import SourceSettings
from bench.core.rounds import DEFAULT_MAX_SLOTS, Lane, Plan, ProcessSource
from bench.core.subjects import Subject
from bench.idle_cpu import IdleCpu, measure_idle_cpu
from bench.naive_protocol import run_naive_reader, run_naive_source
from bench.targets import NAIVE, Target, check_targets
from bench.tcp_socket import run_socket_reader, run_socket_source
from ucxx_transport.cli.output import console

SIZES: Final = "4KiB,64KiB,1MiB,16MiB,64MiB,256MiB"
QUICK_SIZES: Final = "64KiB,1MiB,16MiB"
SOCKET_SUBJECT: Final = Subject(name="socket", label="ceiling: plain blocking TCP socket", client="sync")
NAIVE_SUBJECT: Final = Subject(name=NAIVE, label="baseline: naive protocol on stock ucxx", client="async")


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """Everything one run found out."""

    results: list[Result]
    idle: IdleCpu | None
    busy: list[BusyWorker]
    targets: list[Target]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, report, and say whether the targets were met where that was asked."""
    options = _parse(arguments)
    sizes = parse_sizes(options.sizes)
    terminal = console()
    plan = Plan(rounds=options.rounds, turn_s=options.turn_s, in_flight=options.in_flight, max_slots=options.max_slots)
    settings = SourceSettings(ports=options.ports)
    with ExitStack() as stack:
        lanes = [*transport_lanes(stack, settings), *_peer_lanes(stack)]
        results = measure_sizes(lanes, sizes, plan, terminal, baseline=NAIVE)
    idle = None if options.no_idle else measure_idle_cpu(options.idle_s)
    busy = [] if options.no_busy else [measure_busy_worker(mode, plan) for mode in ("process", "thread")]
    findings = Findings(results=results, idle=idle, busy=busy, targets=check_targets(results, idle, busy))
    subjects = [lane.subject for lane in lanes]
    _report(findings, terminal, with_targets=options.check)
    _write(options.out, as_document(results, subjects, plan, settings), findings, subjects)
    terminal.print(f"wrote {options.out / 'throughput.json'} and {options.out / 'throughput.png'}")
    return 1 if options.check and not all(target.met for target in findings.targets) else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_SIZES}, fewer and shorter turns")
    parser.add_argument("--sizes", help=f"payload sizes, separated by commas ({SIZES})")
    parser.add_argument("--rounds", type=int, help="turns of every subject at every size (5; quick: 3)")
    parser.add_argument("--turn-s", type=float, help="seconds timed in one turn, at least (0.3; quick: 0.15)")
    parser.add_argument("--in-flight", type=int, default=1, help="reads kept in flight by async clients (1)")
    parser.add_argument("--ports", type=int, default=4, help="ports of the server (4)")
    parser.add_argument("--max-slots", type=int, default=DEFAULT_MAX_SLOTS, help="slots, and so reads of a batch (512)")
    parser.add_argument("--idle-s", type=float, default=5.0, help="seconds over which idle CPU is taken (5)")
    parser.add_argument("--no-idle", action="store_true", help="leave out the idle server")
    parser.add_argument("--no-busy", action="store_true", help="leave out the worker that spins")
    parser.add_argument(
        "--check", action="store_true", help="print every target with its figure; exit 1 unless all are met"
    )
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="folder for results (out/bench)")
    options = parser.parse_args(arguments)
    options.sizes = options.sizes or (QUICK_SIZES if options.quick else SIZES)
    options.rounds = options.rounds or (3 if options.quick else 5)
    options.turn_s = options.turn_s if options.turn_s is not None else (0.15 if options.quick else 0.3)
    return options


def _peer_lanes(stack: ExitStack) -> list[Lane]:
    start = stack.enter_context
    naive = ProcessSource(start(ControlledProcess("naive server", run_naive_source)))
    plain = ProcessSource(start(ControlledProcess("socket server", run_socket_source)))
    return [
        Lane(SOCKET_SUBJECT, plain, start(ControlledProcess("socket client", run_socket_reader))),
        Lane(NAIVE_SUBJECT, naive, start(ControlledProcess("naive client", run_naive_reader))),
    ]


def _report(findings: Findings, terminal: Console, *, with_targets: bool) -> None:
    if findings.idle is not None:
        terminal.print(_idle_in_words(findings.idle))
    for entry in findings.busy:
        terminal.print(
            f"worker's main thread spins, server in a {entry.mode}: p50 of 64 KiB "
            f"{entry.spinning_p50_us.median:.0f} µs instead of {entry.quiet_p50_us.median:.0f} µs, "
            f"added {entry.added_p50_us.median:.0f} µs"
        )
    if with_targets:
        terminal.print(_target_table(findings.targets))


def _idle_in_words(idle: IdleCpu) -> str:
    return (
        f"idle, {idle.ports} ports, {idle.connections} connections: server {idle.server_percent:.2f} % of one core, "
        f"its clients {idle.clients_percent:.2f} %; naive server with 1 connection {idle.naive_server_percent:.0f} %"
    )


def _target_table(targets: Sequence[Target]) -> Table:
    table = Table(title="Targets", title_justify="left")
    for heading in ("", "figure", "min … max", "target", ""):
        table.add_column(heading)
    for target in targets:
        figure = target.figure
        cells = (
            ("not measured", "")
            if figure is None
            else (f"{figure.median:.3g} {target.unit}", f"{figure.min:.3g} … {figure.max:.3g}")
        )
        table.add_row(
            target.what,
            *cells,
            f"{target.sense} {target.bound:g}",
            "[green]met[/green]" if target.met else "[red]not met[/red]",
        )
    return table


def _write(folder: Path, document: dict[str, Any], findings: Findings, subjects: Sequence[Subject]) -> None:
    from bench.plot import plot_results  # every process imports this file, and none but this one draws

    folder.mkdir(parents=True, exist_ok=True)
    document |= {
        "commit": commit_of(Path(__file__).resolve().parent),
        "idle_cpu": None if findings.idle is None else findings.idle.to_dict(),
        "busy_worker": [entry.to_dict() for entry in findings.busy],
        "targets": [target.to_dict() for target in findings.targets],
    }
    (folder / "throughput.json").write_text(json.dumps(document, indent=2) + "\n")
    plot_results(findings.results, subjects, folder / "throughput.png")


if __name__ == "__main__":
    sys.exit(main())
