"""The run itself: starts the processes, listens to them, kills one, starts another, ends them all."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.context import SpawnProcess

from cartpole.autopsy import last_counters
from cartpole.books import Books, KillRecord, SeatBook
from cartpole.director import Limits, Situation, decide
from cartpole.leftovers import run_segments
from cartpole.messages import SeatOrder, TrainerStatus, WorkerStatus
from cartpole.plan import DemoPlan
from cartpole.processes import end_processes, start_process
from cartpole.queues import SeatQueues, TrainerQueues
from cartpole.signals import StopSignals
from cartpole.trainer import run_trainer
from cartpole.worker import run_worker
from ucxx_transport.errors import TransportError

__all__ = ["Orchestrator"]

_TURN_S = 0.1
_END_S = 8.0
_INTERRUPTED_END_S = 4.0  # what is killed then is swept
_ORDER_WAIT_S = 1.0


class Orchestrator:
    """One run of the demo, from the first process to the last.

    Attributes:
        books: what is known, for the view and the report.
        reason: why the run ended: a stop reason, "interrupted", or "failed".
        failure: what failed, when something did.
        ended_after_s: seconds from the start to the decision to stop.
    """

    def __init__(self, plan: DemoPlan, signals: StopSignals, show: Callable[[Orchestrator], None]) -> None:
        """Make the queues; no process starts before `run`.

        Args:
            plan: the run.
            signals: looked at every turn.
            show: called every turn, to draw.
        """
        self.plan = plan
        self.books = Books()
        self.reason = ""
        self.failure = ""
        self.ended_after_s = 0.0
        self._signals = signals
        self._show = show
        self._context = multiprocessing.get_context("spawn")
        self._trainer_queues = TrainerQueues.open(self._context)
        self._seat_queues = [SeatQueues.open(self._context, slots=plan.size.slots) for _ in range(plan.seats)]
        self._trainer: SpawnProcess | None = None
        self._workers: dict[int, SpawnProcess] = {}
        self._dead_rings: set[int] = set()
        self._limits = Limits(goal=plan.goal, episodes=plan.episodes, seconds=plan.seconds, kill=plan.kill)
        self._started_s = time.monotonic()

    @property
    def elapsed_s(self) -> float:
        """Seconds since the run was set up."""
        return time.monotonic() - self._started_s

    def run(self) -> None:
        """Start everything, take turns until there is a reason to stop, end everything. Never leaves a child behind."""
        try:
            self._start()
            while not self.reason:
                self._turn()
                time.sleep(_TURN_S)
        finally:
            self.ended_after_s = self.elapsed_s
            self._end()

    def _start(self) -> None:
        plan = self.plan
        arguments = (plan, self._trainer_queues, self._seat_queues, os.getpid())
        self._trainer = start_process(self._context, "trainer", plan.run_id, run_trainer, arguments)
        for worker in range(plan.workers):
            if self._signals.number is None:
                self._start_worker(worker, worker)

    def _start_worker(self, seat: int, worker: int) -> SeatBook:
        plan = self.plan
        arguments = (plan, seat, worker, self._seat_queues[seat], os.getpid())
        process = start_process(self._context, f"worker-{seat}", plan.run_id, run_worker, arguments)
        self._workers[seat] = process
        way = "over UCX" if plan.local_of(worker) == "off" else "in place"
        book = SeatBook(seat=seat, worker=worker, pid=process.pid or 0, way=way)
        self.books.seats[seat] = book
        self.books.note(self.elapsed_s, f"worker {worker}: started as pid {book.pid}, read {way}")
        return book

    def _turn(self) -> None:
        self._listen()
        if self._signals.number is not None:
            self.reason = "interrupted"
            return
        self._look_after_processes()
        self._look_for_dead_rings()
        if not self.reason:
            self._follow(self._situation())
        self._show(self)

    def _situation(self) -> Situation:
        books = self.books
        return Situation(
            elapsed_s=self.elapsed_s,
            episodes=len(books.finished),
            window_mean=books.window_mean,
            all_deliver=all(book.delivered for book in books.seats.values()),
            killed=books.kill is not None,
            replacement_episodes=books.replacement_episodes,
        )

    def _follow(self, situation: Situation) -> None:
        """Do what the situation calls for."""
        goal, mean, books = self._limits.goal, situation.window_mean, self.books
        if books.goal_at_s is None and goal is not None and mean is not None and mean >= goal:
            books.goal_at_s = situation.elapsed_s
            books.note(situation.elapsed_s, f"goal reached: mean return {mean:.0f}")
        decision = decide(self._limits, situation)
        if decision.stop is not None:
            self.reason = decision.stop
        elif decision.kill:
            self._kill_one()

    def _listen(self) -> None:
        for blob in self._trainer_queues.status.take_all():
            self.books.hear_trainer(TrainerStatus.from_bytes(blob), self.elapsed_s)
        for seat in self.books.seats:
            for blob in self._seat_queues[seat].status.take_all():
                self.books.hear_worker(seat, WorkerStatus.from_bytes(blob))

    def _look_after_processes(self) -> None:
        if self._trainer is not None and not self._trainer.is_alive():
            self._listen()
            said = self.books.trainer.error if self.books.trainer is not None else ""
            self._fail(f"the trainer ended: {said or f'exit status {self._trainer.exitcode}'}")
            return
        for seat, process in tuple(self._workers.items()):
            book = self.books.seats[seat]
            if process.is_alive() or book.state == "killed":
                continue
            self._listen()
            said = book.status.error if book.status is not None else ""
            what = f"worker {book.worker}: pid {book.pid} ended: {said or f'exit status {process.exitcode}'}"
            book.state = "killed"
            if book.delivered == 0 and (process.exitcode or 0) >= 0:
                self._fail(what)  # it gave up by itself before its first episode: a further one would do the same
                return
            self._replace(book, what)

    def _look_for_dead_rings(self) -> None:
        """Notice that a dead worker's segment is gone: its server process or the next worker's ring has swept it."""
        for seat in tuple(self._dead_rings):
            if not run_segments(self.plan.ring_name(seat)):
                self._dead_rings.discard(seat)
                self.books.dead_rings_swept += 1
                self.books.note(
                    self.elapsed_s, f"worker {self.books.seats[seat].worker}: the dead one's ring was swept"
                )

    def _kill_one(self) -> None:
        """SIGKILL the last worker that runs, and start another in its place."""
        running = [book for book in self.books.seats.values() if book.state == "running"]
        if not running:
            return
        victim = running[-1]
        self._workers[victim.seat].kill()
        victim.state = "killed"
        at_s, episode = self.elapsed_s, len(self.books.finished)
        book = self._replace(victim, f"worker {victim.worker}: pid {victim.pid} killed by SIGKILL")
        if book is not None:
            self.books.kill = KillRecord(
                at_s=at_s,
                episode=episode,
                worker=victim.worker,
                pid=victim.pid,
                seat=victim.seat,
                replacement_seat=book.seat,
                replacement_pid=book.pid,
            )

    def _replace(self, gone: SeatBook, what: str) -> SeatBook | None:
        """Give the dead worker's place to a new process, on the next free seat."""
        self.books.note(self.elapsed_s, what)
        self._dead_rings.add(gone.seat)
        with suppress(TransportError):  # swept already: its last report stands
            self.books.bury(gone.seat, last_counters(self.plan.ring_name(gone.seat)))
        self._order(SeatOrder(seat=gone.seat, worker=gone.worker, occupied=False))
        seat = len(self.books.seats)
        if seat >= self.plan.seats:
            self._fail("so many workers ended that there are no seats left")
            return None
        book = self._start_worker(seat, gone.worker)
        self._order(SeatOrder(seat=seat, worker=gone.worker, occupied=True))
        return book

    def _order(self, order: SeatOrder) -> None:
        if self.plan.store is not None:
            return  # the trainer finds its workers by itself
        if not self._trainer_queues.orders.offer(order.to_bytes(), wait_s=_ORDER_WAIT_S):
            self._fail("the trainer takes no orders")

    def _fail(self, what: str) -> None:
        self.reason, self.failure = "failed", what
        self.books.note(self.elapsed_s, what)

    def _end(self) -> None:
        """End the trainer first, so that what it was about to read is still there, then the workers; at Ctrl-C all."""
        trainer = [self._trainer] if self._trainer is not None else []
        workers = list(self._workers.values())
        if self._signals.number is not None:
            killed = end_processes([*trainer, *workers], limit_s=_INTERRUPTED_END_S, meanwhile=self._listen)
        else:
            killed = end_processes(trainer, limit_s=_END_S, meanwhile=self._listen)
            killed += end_processes(workers, limit_s=_END_S, meanwhile=self._listen)
        if killed:
            self.books.note(self.elapsed_s, f"{killed} processes did not stop in time and were killed")
        self._trainer_queues.abandon()
        for queues in self._seat_queues:
            queues.abandon()
