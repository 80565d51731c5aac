"""The trainer process: references in, weights out, and its own books for the orchestrator."""

from __future__ import annotations

import os
import time
import traceback

import msgpack  # type: ignore[import-untyped]  # ships no types
import numpy as np

from cartpole.discovery import Discovery
from cartpole.learner import Learner, LearnerSettings, UpdateReport
from cartpole.lesson import Lesson
from cartpole.lifeline import StopFlag, begin_child
from cartpole.messages import FinishedEpisode, SeatOrder, TrainerStatus, Weights
from cartpole.plan import DemoPlan
from cartpole.queues import SeatQueues, TrainerQueues
from cartpole.receiver import Received, Receiver

__all__ = ["run_trainer"]

_STATUS_EVERY_S = 0.2
_IDLE_WAIT_S = 0.005
_FINAL_WAIT_S = 3.0
_RECORDS_A_TURN = 32


def run_trainer(plan: DemoPlan, queues: TrainerQueues, seats: list[SeatQueues], orchestrator_pid: int) -> None:
    """Learn until told to stop; the whole life of the trainer process.

    Args:
        plan: the run.
        queues: to and from the orchestrator.
        seats: the queues of every seat there will ever be.
        orchestrator_pid: the process that spawned this one.
    """
    stop = begin_child(orchestrator_pid, plan.log)
    error = ""
    trainer = _Trainer(plan, queues, seats, stop)
    try:
        trainer.learn()
    except Exception as exc:  # noqa: BLE001 - the edge of the process: whatever it was, the orchestrator is told
        traceback.print_exc()
        error = f"{type(exc).__name__}: {exc}"[:1000]
    trainer.finish(error)
    for seat in seats:
        seat.abandon()
    raise SystemExit(1 if error else 0)


class _Trainer:
    """Learner and receiver, and the turns they take."""

    def __init__(self, plan: DemoPlan, queues: TrainerQueues, seats: list[SeatQueues], stop: StopFlag) -> None:
        self._plan = plan
        self._queues = queues
        self._seats = seats
        self._stop = stop
        self._settings = LearnerSettings()
        self._learner = Learner(plan.facts, self._settings, seed=plan.seed)
        self._discovery = Discovery(plan.store, plan.store_config) if plan.store is not None else None
        self._receiver = Receiver(plan, self._discovery.watcher if self._discovery is not None else None)
        self._occupied: set[int] = set()
        self._lessons: list[Lesson] = []
        self._waiting_steps = 0
        self._finished: list[FinishedEpisode] = []
        self._episodes = 0
        self._steps = 0
        self._bytes = 0
        self._first_s = self._last_s = 0.0
        self._update: UpdateReport | None = None
        self._update_s = 0.0
        self._started_s = time.monotonic()
        self._reported_s = self._started_s
        for seat in range(plan.workers if self._discovery is None else 0):
            self._occupy(seat, seat)

    def learn(self) -> None:
        """Take turns at fetching and learning until told to stop."""
        while not self._stop:
            self._follow_orders()
            busy = self._take_records()
            self._receiver.start()  # under way while this turn learns
            if self._waiting_steps >= self._settings.batch_steps:
                self._learn_from_waiting()
                busy = True
            for received in self._receiver.collect():
                self._accept(received)
                busy = True
            if time.monotonic() - self._reported_s > _STATUS_EVERY_S:
                self._report()
            if not busy:
                self._stop.wait(_IDLE_WAIT_S)

    def finish(self, error: str) -> None:
        """Take what is still under way, send the final books, and close the packers."""
        if not error:
            for received in self._receiver.collect(wait=True):
                self._accept(received)
        self._queues.status.offer(self._status(final=True, error=error).to_bytes(), wait_s=_FINAL_WAIT_S)
        self._receiver.close()
        if self._discovery is not None:
            self._discovery.close()

    def _follow_orders(self) -> None:
        orders = [SeatOrder.from_bytes(blob) for blob in self._queues.orders.take_all()]
        if self._discovery is not None:
            orders += self._discovery.take()
        for order in orders:
            if order.occupied:
                self._occupy(order.seat, order.worker)
            else:
                self._occupied.discard(order.seat)

    def _occupy(self, seat: int, worker: int) -> None:
        self._receiver.admit(seat, worker)
        self._occupied.add(seat)
        self._seats[seat].weights.offer_latest(self._weights())

    def _take_records(self) -> bool:
        """Take the records that wait, a bounded share of every seat in turn; whether there were any."""
        busy = False
        for seat, queues in enumerate(self._seats):
            for _ in range(_RECORDS_A_TURN):
                if self._stop or not self._receiver.has_room(seat) or (blob := queues.records.take()) is None:
                    break
                busy = True
                self._receiver.bring(seat, msgpack.unpackb(blob))
        return busy

    def _accept(self, received: Received) -> None:
        now_s = time.monotonic() - self._started_s
        lesson = received.lesson
        self._lessons.append(lesson)
        self._waiting_steps += lesson.steps
        self._finished.append(
            FinishedEpisode(
                at_s=now_s, total_reward=float(np.sum(lesson.rewards)), seat=received.seat, steps=lesson.steps
            )
        )
        self._first_s = self._first_s or now_s
        self._last_s = now_s
        self._episodes += 1
        self._steps += lesson.steps
        self._bytes += received.nbytes

    def _learn_from_waiting(self) -> None:
        started_s = time.perf_counter()
        self._update = self._learner.update(self._lessons)
        self._update_s += time.perf_counter() - started_s
        self._lessons.clear()
        self._waiting_steps = 0
        weights = self._weights()
        for seat in self._occupied:
            self._seats[seat].weights.offer_latest(weights)

    def _weights(self) -> bytes:
        return Weights(version=self._learner.version, parameters=self._learner.policy.to_bytes()).to_bytes()

    def _report(self) -> None:
        if self._queues.status.offer(self._status(final=False, error="").to_bytes(), wait_s=0.0):
            self._finished = []
        self._reported_s = time.monotonic()

    def _status(self, *, final: bool, error: str) -> TrainerStatus:
        books, update = self._receiver.books(), self._update
        return TrainerStatus(
            pid=os.getpid(),
            episodes=self._episodes,
            steps=self._steps,
            payload_bytes=self._bytes,
            first_s=self._first_s,
            last_s=self._last_s,
            finished=tuple(self._finished),
            version=self._learner.version,
            entropy=update.entropy if update else 0.0,
            divergence=update.divergence if update else 0.0,
            update_s=self._update_s,
            ways=books.ways,
            seat_transports=books.seat_transports,
            lost=dict(books.lost),
            retried=books.retried,
            verified=books.verified,
            mismatched=books.mismatched,
            clients=dict(books.clients),
            ucx_lanes=books.ucx_lanes,
            joined=self._discovery.joined if self._discovery is not None else 0,
            left=self._discovery.left if self._discovery is not None else 0,
            final=final,
            error=error,
        )
