"""What does a trainer feel? Steps per second and the share of its time that it waits for data.

    python bench/trainer.py            # 64 KiB, 1 MiB, 16 MiB episodes, 5 rounds
    python bench/trainer.py --check    # and hold the figures against the targets; exit 1 if one is not met

A worker process produces episodes as fast as it can; a trainer process takes them in batches of 8, reads every byte,
and computes: for no time at all (how many episodes per second can it be given?), and for longer than fetching a batch
over UCX takes (what does it wait then? It sleeps, as one does whose GPU computes). The same for `multiprocessing.Queue`
and, where `ray` is installed, for Ray's object store. Writes trainer.json under --out.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that `python bench/trainer.py` finds its siblings

import numpy as np
from rich.console import Console
from rich.table import Table

from bench.core.command import parse_sizes
from bench.core.control import ControlledProcess, Handlers, serve_orders
from bench.core.cpu_time import ForeignLoad
from bench.core.host import commit_of, host_facts
from bench.core.payloads import PayloadPattern
from bench.core.results import Spread
from bench.targets import Target
from bench.trainer_ends import BATCHES_AHEAD, QueueEnd, RayEnd, TrainerEnd, TransportEnd, Way, run_worker
from ucxx_transport.cli.output import console
from ucxx_transport.units import format_bytes

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.queues import Queue

SIZES: Final = "64KiB,1MiB,16MiB"
BATCH: Final = 8
COMPUTE_OVER_FETCH: Final = 1.5
LEAST_COMPUTE_S: Final = 0.01
WAITING_SHARE: Final = 0.05
OVER_PEERS: Final = 3.0
LARGE_BYTES: Final = 1 << 20
LEAST_STEPS: Final = 3

LABELS: Final = {
    "view_ahead": "in place, fetched ahead",
    "view_on_demand": "in place, on demand",
    "ucx_ahead": "UCX over TCP, fetched ahead",
    "ucx_on_demand": "UCX over TCP, on demand",
    "queue": "peer: multiprocessing.Queue",
    "ray": "peer: Ray's object store",
}
YARDSTICK: Final = "ucx_on_demand"
"""Whose batches say how long a step computes; always among the ways."""

PEERS: Final = ("queue", "ray")


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One turn of one way at one size.

    Attributes:
        episodes_per_s: taken and read by a trainer that does not compute.
        waiting_share: of the time of a trainer that computes for `compute_s` a step.
        steps_per_s: of the same. compute_s: seconds.
        fetch_s: what a batch is waited for by the trainer that does not compute, mean.
        verified: episodes compared byte for byte before.
        foreign_cores: cores that other processes used meanwhile.
    """

    episodes_per_s: float
    waiting_share: float
    steps_per_s: float
    compute_s: float
    fetch_s: float
    verified: int
    foreign_cores: float


@dataclass(frozen=True, slots=True)
class Contestant:
    """A way with its processes; `worker` is None where the trainer's process has its own.

    `channel` is held here: the processes take its semaphores by name, and those go with the first of it.
    """

    name: str
    trainer: ControlledProcess
    worker: ControlledProcess | None
    channel: Queue[Any] | None


Turns = dict[tuple[str, int], list[Turn]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, report, and say whether the targets were met where that was asked."""
    options = _parse(arguments)
    terminal = console()
    sizes = parse_sizes(options.sizes)
    turns: Turns = {}
    with ExitStack() as stack:
        contestants = _contestants(stack, options.ways)
        for size_bytes in sizes:
            compute_s = _compute_s(contestants, size_bytes, options.turn_s)
            for number in range(options.rounds):
                for contestant in contestants:
                    taken = _take_turn(contestant, size_bytes, options.turn_s, compute_s)
                    turns.setdefault((contestant.name, size_bytes), []).append(taken)
                terminal.print(f"{format_bytes(size_bytes)}: round {number + 1} of {options.rounds}")
            terminal.print(_table(turns, size_bytes))
    targets = _targets(turns, sizes)
    if options.check:
        _print_targets(targets, terminal)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "trainer.json").write_text(json.dumps(_document(turns, targets), indent=2) + "\n")
    terminal.print(f"wrote {options.out / 'trainer.json'}")
    return 1 if options.check and not all(target.met for target in targets) else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default=SIZES, help=f"episode sizes, separated by commas ({SIZES})")
    parser.add_argument("--rounds", type=int, default=5, help="turns of every way at every size (5)")
    parser.add_argument("--turn-s", type=float, default=1.0, help="seconds timed in each half of a turn, at least (1)")
    parser.add_argument(
        "--check", action="store_true", help="print every target with its figure; exit 1 unless all are met"
    )
    parser.add_argument("--ways", type=_ways, help=f"some of {','.join(LABELS)}; the default is all that are installed")
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="folder for results (out/bench)")
    options = parser.parse_args(arguments)
    options.ways = options.ways or [name for name in LABELS if name != "ray" or importlib.util.find_spec("ray")]
    return options


def _ways(text: str) -> list[str]:
    chosen = text.split(",")
    unknown = sorted(set(chosen) - set(LABELS))
    if unknown or YARDSTICK not in chosen:
        raise argparse.ArgumentTypeError(f"{YARDSTICK} and others of {', '.join(LABELS)}, not {text!r}")
    return chosen


def _contestants(stack: ExitStack, ways: Sequence[str]) -> list[Contestant]:
    found = []
    for name in ways:
        if name == "ray":
            found.append(
                Contestant(name, stack.enter_context(ControlledProcess(name, _run_trainer, name, None)), None, None)
            )
            continue
        channel: Queue[Any] = multiprocessing.get_context("spawn").Queue(BATCHES_AHEAD * BATCH)
        way: Way = "queue" if name == "queue" else "transport"
        worker = stack.enter_context(ControlledProcess(f"worker of {name}", run_worker, way, channel))
        trainer = stack.enter_context(ControlledProcess(name, _run_trainer, name, channel))
        found.append(Contestant(name, trainer, worker, channel))
    return found


def _compute_s(contestants: Sequence[Contestant], size_bytes: int, turn_s: float) -> float:
    """Longer than fetching a batch over UCX takes when nothing is fetched ahead."""
    slowest = next(contestant for contestant in contestants if contestant.name == YARDSTICK)
    fetch_s = _take_turn(slowest, size_bytes, turn_s, 0.0).fetch_s
    return max(LEAST_COMPUTE_S, COMPUTE_OVER_FETCH * fetch_s)


def _take_turn(contestant: Contestant, size_bytes: int, turn_s: float, compute_s: float) -> Turn:
    if contestant.worker is not None:
        contestant.worker.call("open", size_bytes=size_bytes, batch=BATCH)
    verified = contestant.trainer.call("open", size_bytes=size_bytes, batch=BATCH)
    foreign_load = ForeignLoad()
    idle = contestant.trainer.call("train", seconds=turn_s, compute_s=0.0)
    computing = contestant.trainer.call("train", seconds=turn_s, compute_s=compute_s)
    foreign_cores = foreign_load.cores()
    contestant.trainer.call("close")
    if contestant.worker is not None:
        contestant.worker.call("close")
    return Turn(
        episodes_per_s=idle["steps"] * BATCH / idle["wall_s"],
        waiting_share=computing["waiting_s"] / computing["wall_s"],
        steps_per_s=computing["steps"] / computing["wall_s"],
        compute_s=compute_s,
        fetch_s=idle["waiting_s"] / idle["steps"],
        verified=verified,
        foreign_cores=foreign_cores,
    )


def _run_trainer(connection: Connection, name: str, channel: Queue[Any] | None) -> None:
    """Be a trainer process: `open` compares a first batch, `train` takes the time, `close` ends."""
    trainer = _Trainer(_end_of(name, channel))
    handlers: Handlers = {"open": trainer.open, "train": trainer.train, "close": trainer.close}
    serve_orders(connection, handlers)


def _end_of(name: str, channel: Queue[Any] | None) -> TrainerEnd:
    if channel is None:
        return RayEnd()
    if name == "queue":
        return QueueEnd(channel)
    return TransportEnd(channel, local="view" if name.startswith("view") else "off", ahead=name.endswith("ahead"))


class _Trainer:
    def __init__(self, end: TrainerEnd) -> None:
        self._end = end

    def open(self, *, size_bytes: int, batch: int) -> int:
        pattern = PayloadPattern(size_bytes)
        self._end.open(size_bytes, batch)
        verified = 0
        for _ in range(BATCHES_AHEAD):  # every slot once
            for episode in self._end.next_batch():
                pattern.check(episode.number, episode.data.data)
                verified += 1
        return verified

    def train(self, *, seconds: float, compute_s: float) -> dict[str, float]:
        self._step(compute_s)  # not counted: what its batch is waited for depends on what was done before this order
        steps, waiting_s = 0, 0.0
        began_s = now_s = time.perf_counter()
        while steps < LEAST_STEPS or now_s - began_s < seconds:
            waiting_s += self._step(compute_s)
            steps += 1
            now_s = time.perf_counter()
        return {"steps": steps, "waiting_s": waiting_s, "wall_s": now_s - began_s}

    def _step(self, compute_s: float) -> float:
        """Take a batch, read every byte of it, compute; seconds waited for the batch."""
        began_s = time.perf_counter()
        batch = self._end.next_batch()
        waited_s = time.perf_counter() - began_s
        for episode in batch:
            np.bitwise_xor.reduce(episode.data.view(np.uint64))
        del batch, episode
        if compute_s:
            time.sleep(compute_s)
        return waited_s

    def close(self) -> None:
        self._end.close()


def _table(turns: Turns, size_bytes: int) -> Table:
    shown = {name: taken for (name, size), taken in turns.items() if size == size_bytes}
    compute_s = next(iter(shown.values()))[0].compute_s
    table = Table(title=f"{format_bytes(size_bytes)} episodes, batches of {BATCH}", title_justify="left")
    headings = ("episodes/s", "min … max", f"waits at {compute_s * 1e3:.0f} ms a step", "steps/s then", "foreign cores")
    table.add_column("")
    for heading in headings:
        table.add_column(heading, justify="right")
    for name, taken in shown.items():
        rate = Spread.of([turn.episodes_per_s for turn in taken])
        table.add_row(
            LABELS[name],
            f"{rate.median:.0f}",
            f"{rate.min:.0f} … {rate.max:.0f}",
            f"{Spread.of([turn.waiting_share for turn in taken]).median:.1%}",
            f"{Spread.of([turn.steps_per_s for turn in taken]).median:.1f}",
            f"{Spread.of([turn.foreign_cores for turn in taken]).median:.2f}",
        )
    return table


def _targets(turns: Turns, sizes: Sequence[int]) -> list[Target]:
    waiting = [
        Target(
            what=f"{LABELS[name]}, {format_bytes(size)}: share of a computing trainer's time that it waits",
            unit="",
            sense="≤",
            bound=WAITING_SHARE,
            figure=_waiting(turns, name, size),
        )
        for size in sizes
        for name in ("view_ahead", "ucx_ahead")
    ]
    rates = [
        Target(
            what=f"{LABELS['view_ahead']}, {format_bytes(size)}: episodes/s over {LABELS[peer]}'s",
            unit="×",
            sense="≥",
            bound=OVER_PEERS,
            figure=_ratio(turns, "view_ahead", peer, size),
        )
        for size in sizes
        if size >= LARGE_BYTES
        for peer in PEERS
    ]
    return [*waiting, *rates]


def _waiting(turns: Turns, name: str, size_bytes: int) -> Spread | None:
    taken = turns.get((name, size_bytes))
    return None if taken is None else Spread.of([turn.waiting_share for turn in taken])


def _ratio(turns: Turns, above: str, below: str, size_bytes: int) -> Spread | None:
    if (above, size_bytes) not in turns or (below, size_bytes) not in turns:
        return None
    pairs = zip(turns[above, size_bytes], turns[below, size_bytes], strict=True)
    return Spread.of([one.episodes_per_s / other.episodes_per_s for one, other in pairs])


def _print_targets(targets: Sequence[Target], terminal: Console) -> None:
    for target in targets:
        figure = "not measured" if target.figure is None else f"{target.figure.median:.3g} {target.unit}"
        terminal.print(
            f"{'met    ' if target.met else 'NOT MET'} {target.what}: {figure} ({target.sense} {target.bound:g})"
        )


def _document(turns: Turns, targets: Sequence[Target]) -> dict[str, Any]:
    return {
        "format": "ucxx_transport.bench.trainer/1",
        "host": host_facts(),
        "commit": commit_of(Path(__file__).resolve().parent),
        "batch": BATCH,
        "ways": LABELS,
        "results": [
            {"way": name, "size_bytes": size, "turns": [asdict(turn) for turn in taken]}
            for (name, size), taken in turns.items()
        ],
        "targets": [target.to_dict() for target in targets],
    }


if __name__ == "__main__":
    sys.exit(main())
