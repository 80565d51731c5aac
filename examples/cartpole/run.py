"""One run: this process trains, supervises the worker processes, kills one half-way, replaces it, ends them all.

| reason to stop | when                                                                           |
|----------------|--------------------------------------------------------------------------------|
| goal           | the mean return reached it (and the replacement of the killed worker delivers) |
| episodes       | so many were delivered (and the replacement of the killed worker delivers)     |
| time           | the time limit                                                                 |
| interrupted    | Ctrl-C, SIGTERM or SIGHUP                                                      |
| failed         | a worker ended by itself before its first episode, or too many ended           |
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from multiprocessing.context import SpawnProcess
from typing import Literal

from cartpole.plan import Plan
from cartpole.processes import Seat, StopSignals, end_processes, processes_left, start_process
from cartpole.report import WINDOW, Kill, Results, Worker, draw_curve
from cartpole.trainer import Trainer
from cartpole.worker import run_worker
from ucxx_transport import SharedRingBuffer, TransportError
from ucxx_transport.ring.segment import list_segments, sweep_orphans

__all__ = ["Run", "next_step"]

_CHECK_EVERY_S = 0.1
_LINE_EVERY_S = 1.0
_IDLE_S = 0.005
_END_S = 8.0


def next_step(results: Results) -> Literal["kill", "goal", "episodes", "time"] | None:
    """What to do now: kill a worker, stop for a reason, or nothing.

    The kill comes half-way to the first limit, and not while a worker is starting unless half of the time is over.
    """
    plan, count = results.plan, len(results.episodes)
    of_episodes = count / plan.episodes if plan.episodes is not None else 0.0
    of_goal = (results.mean_return or 0.0) / plan.goal if plan.goal is not None and count >= WINDOW else 0.0
    of_time = results.elapsed_s / plan.seconds
    if of_time >= 1.0:
        return "time"
    if plan.kill and results.kill is None:
        all_deliver = all(worker.episodes for worker in results.workers)
        return "kill" if count and (of_time >= 0.5 or (all_deliver and max(of_episodes, of_goal) >= 0.5)) else None
    if plan.kill and not results.replacement_episodes:
        return None
    if of_goal >= 1.0:
        return "goal"
    return "episodes" if of_episodes >= 1.0 else None


class Run:
    """One run, from its first process to its results.

    Args:
        plan: its settings.
        signals: caught already.
        print_line: called with each line of progress.
    """

    def __init__(self, plan: Plan, signals: StopSignals, print_line: Callable[[str], None]) -> None:
        self.plan = plan
        self.results = Results(plan)
        self._signals = signals
        self._print_line = print_line
        self._context = multiprocessing.get_context("spawn")
        self._seats = [Seat(self._context) for _ in range(plan.seats)]
        self._processes: list[SpawnProcess] = []  # of the workers, by seat
        self._started_s = self._line_s = time.monotonic()
        self._line_episodes = 0

    def execute(self) -> Results:
        """Train until there is a reason to stop, end everything, and check what is left."""
        results, plan = self.results, self.plan
        plan.log.write_bytes(b"")
        logging.getLogger("ucxx_transport").addHandler(logging.FileHandler(plan.log))
        trainer = Trainer(plan, self._seats, results)
        try:
            for worker in range(plan.workers):
                self._start_worker(worker)
            checked_s = 0.0
            while not results.reason:
                if not trainer.turn():
                    time.sleep(_IDLE_S)
                results.elapsed_s = time.monotonic() - self._started_s
                if results.elapsed_s - checked_s >= _CHECK_EVERY_S:
                    checked_s = results.elapsed_s
                    self._check()
            trainer.take_episodes(wait=results.reason != "interrupted")
            results.trainer = trainer.counters()
        finally:
            trainer.close()  # before the workers: what it was about to read is then still there
            self._end_workers()
        results.processes_left = processes_left(plan.run_id, limit_s=5.0)
        sweep_orphans()  # a killed worker's segment, where no other process has removed it yet
        results.segments_left = [info.name for info in list_segments() if info.name.startswith(plan.ring_name(""))]
        if results.episodes:
            results.curve = draw_curve(results)
        if plan.log.stat().st_size == 0:
            plan.log.unlink()
        return results

    def _check(self) -> None:
        """Check signals and processes, kill a worker when it is time to, and set the reason to stop."""
        results = self.results
        if self._signals.number is not None:
            results.reason = "interrupted"
        elif not self._replace_dead_workers():
            results.reason = "failed"
            self._print(results.failure)
        elif (step := next_step(results)) == "kill":
            self._kill_one()
        else:
            results.reason = step or ""
        count, mean, since_s = len(results.episodes), results.mean_return, time.monotonic() - self._line_s
        if since_s >= _LINE_EVERY_S:
            shown = "none yet" if mean is None else f"mean return {mean:.1f}"
            self._print(f"{count} episodes, {shown}, {(count - self._line_episodes) / since_s:.3g} episodes/s")
            self._line_s, self._line_episodes = time.monotonic(), count

    def _print(self, text: str) -> None:
        self._print_line(f"{self.results.elapsed_s:6.1f} s  {text}")

    def _start_worker(self, worker: int) -> int | None:
        """Start a process for `worker` on the next free seat; returns the seat, None when there is none."""
        plan, seat = self.plan, len(self._processes)
        if seat == plan.seats:
            return None
        arguments = (plan, seat, worker, self._seats[seat], os.getpid())
        self._processes.append(start_process(self._context, plan.run_id, run_worker, *arguments))
        pid, read = self._processes[-1].pid or 0, "over UCX" if plan.local_of(worker) == "off" else "in place"
        self.results.workers.append(Worker(worker=worker, pid=pid, read=read))
        self._print(f"worker {worker}: started as pid {pid}, read {read}")
        return seat

    def _replace_dead_workers(self) -> bool:
        """Start a process in the place of each that died; returns False when the run has failed."""
        results = self.results
        for seat, process in enumerate(list(self._processes)):
            worker = results.workers[seat]
            if process.is_alive() or worker.state in ("killed", "failed"):
                continue
            what = f"worker {worker.worker}: pid {worker.pid} ended with status {process.exitcode}"
            worker.state = "killed" if (process.exitcode or 0) < 0 else "failed"
            if worker.state == "failed" and not worker.episodes:
                results.failure = f"{what}; its output is in {self.plan.log}"  # another one would do the same
                return False
            self._print(what)
            self._read_counters(seat)
            worker.replaced_by = self._start_worker(worker.worker)
            if worker.replaced_by is None:
                results.failure = "so many workers ended that there are no seats left"
                return False
        return True

    def _kill_one(self) -> None:
        """SIGKILL the last worker that runs. The next check replaces it."""
        running = [seat for seat, worker in enumerate(self.results.workers) if worker.state == "running"]
        if running:
            self._read_counters(running[-1])
            self._processes[running[-1]].kill()
            self._processes[running[-1]].join(_END_S)
            self.results.kill = Kill(self.results.elapsed_s, len(self.results.episodes), running[-1])
            self._print(f"worker {self.results.workers[running[-1]].worker}: killed by SIGKILL")

    def _read_counters(self, seat: int) -> None:
        """Read the counters of a ring, which lie in its segment: a killed worker's are there until it is removed."""
        # suppressed: a dead worker's server process may have removed it already
        with suppress(TransportError), SharedRingBuffer.attach(self.plan.ring_name(seat), populate=False) as ring:
            ring.reclaim_dead()
            self.results.workers[seat].ring = asdict(ring.statistics())

    def _end_workers(self) -> None:
        for seat, process in enumerate(self._processes):
            if process.is_alive():
                self._read_counters(seat)
                self.results.workers[seat].state = "stopped"
        if late := end_processes(self._processes, limit_s=_END_S):
            self._print(f"{late} processes did not stop in time and were killed")
        for each in self._seats:
            each.close()
