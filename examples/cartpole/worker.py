"""A rollout worker process: environments, a ring, and the server beside it."""

from __future__ import annotations

import os
import time
import traceback
from dataclasses import asdict

import msgpack  # type: ignore[import-untyped]  # ships no types
import numpy as np

from cartpole.discovery import seat_meta
from cartpole.environment import make_environment
from cartpole.learner import LearnerSettings, policy_network
from cartpole.lifeline import StopFlag, begin_child
from cartpole.messages import Weights, WorkerStatus
from cartpole.plan import DemoPlan
from cartpole.queues import SeatQueues
from cartpole.rollout import RolloutLanes
from cartpole.sizing import episode_schema
from cartpole.trajectory import Episode
from ucxx_transport import ServerConfig, SharedRingBuffer, UCXXRolloutMixin, UCXXServer
from ucxx_transport.errors import DeadlineExceededError, RingFullError, StaleSlotError

__all__ = ["run_worker"]

_FIRST_WEIGHTS_S = 60.0
_WEIGHTS_EVERY_STEPS = 8
_STATUS_EVERY_S = 0.4
_WRITE_WAIT_S = 0.5
_FULL_WAITS_BEFORE_DISCARD = 20


def run_worker(plan: DemoPlan, seat: int, worker: int, queues: SeatQueues, orchestrator_pid: int) -> None:
    """Act until told to stop; the whole life of the process of `worker` on `seat`."""
    stop = begin_child(orchestrator_pid, plan.log)
    queues.status.offer(WorkerStatus(pid=os.getpid(), state="starting").to_bytes(), wait_s=1.0)
    try:
        actor = _Worker(plan=plan, seat=seat, worker=worker, queues=queues, stop=stop)
        try:
            actor.act()
            actor.report("stopped")
        finally:
            actor.cleanup_ucxx()
    except Exception as exc:  # noqa: BLE001 - the edge of the process: whatever it was, the orchestrator is told
        traceback.print_exc()
        reason = f"{type(exc).__name__}: {exc}"[:1000]
        queues.status.offer(WorkerStatus(pid=os.getpid(), state="failed", error=reason).to_bytes(), wait_s=1.0)
        raise SystemExit(1) from None
    finally:
        queues.records.abandon()
        queues.weights.abandon()


class _Worker(UCXXRolloutMixin):
    """One policy, a few environments, and the way of their episodes into the ring."""

    def __init__(self, *, plan: DemoPlan, seat: int, worker: int, queues: SeatQueues, stop: StopFlag) -> None:
        self._plan = plan
        self._seat = seat
        self._queues = queues
        self._stop = stop
        self.setup_ucxx(
            f"worker-{worker}",  # a replacement takes the dead one's name, and a larger epoch
            schema=episode_schema(plan.facts, plan.size.max_steps),
            ring={"slots": plan.size.slots, "name": plan.ring_name(seat), "checksum": True, "on_full": "block"},
            server=ServerConfig(ports=plan.ports, shm_lanes=plan.shm_lanes),
            reward="rewards",
            store=plan.store,
            store_config=plan.store_config if plan.store is not None else None,
            store_meta=seat_meta(seat, worker),
        )
        self._policy = policy_network(plan.facts, LearnerSettings(), np.random.default_rng(0))
        self._version = 0
        self._episodes = 0
        self._steps = 0
        self._given_up = 0
        self._reported_s = 0.0

    def act(self) -> None:
        """Step, ship what ended, take over new weights; until told to stop."""
        plan = self._plan
        if not self._await_weights():
            return
        environments = [make_environment(plan.facts.env_id) for _ in range(plan.size.lanes)]
        try:
            lanes = RolloutLanes(
                environments, plan.facts, max_steps=plan.size.max_steps, seed=plan.seed * 100 + self._seat
            )
            turn = 0
            while not self._stop:
                for episode in lanes.step(self._policy, self._version):
                    self._ship(episode)
                turn += 1
                if turn % _WEIGHTS_EVERY_STEPS == 0:
                    self._refresh()
        finally:
            for environment in environments:
                environment.close()

    def report(self, state: str) -> None:
        """Tell the orchestrator how things are."""
        ring, server = self._own()
        statistics = ring.statistics()
        served = server.statistics()
        status = WorkerStatus(
            pid=os.getpid(),
            state=state,
            version=self._version,
            episodes=self._episodes,
            steps=self._steps,
            given_up=self._given_up,
            ready=ring.get_ready_count(),
            ring={name: value for name, value in asdict(statistics).items() if isinstance(value, int)},
            server={name: served.total(name) for name in ("requests", "delivered", "bytes_sent", "released", "stale")},
            server_pid=served.pid,
            ports=server.ports,
        )
        self._queues.status.offer_latest(status.to_bytes())
        self._reported_s = time.monotonic()

    def _own(self) -> tuple[SharedRingBuffer, UCXXServer]:
        writer = self.ucxx_writer
        assert writer is not None
        assert writer.ring is not None, "it was given a schema"
        assert writer.server is not None
        return writer.ring, writer.server

    def _await_weights(self) -> bool:
        deadline_s = time.monotonic() + _FIRST_WEIGHTS_S
        self.report("starting")
        while not self._stop:
            blob = self._queues.weights.take(wait_s=0.1)
            if blob is not None:
                self._adopt(blob)
                return True
            if time.monotonic() > deadline_s:
                raise DeadlineExceededError("the trainer sent no weights", elapsed_s=_FIRST_WEIGHTS_S)
        return False

    def _refresh(self) -> None:
        blob = self._queues.weights.take()
        if blob is not None:
            self._adopt(blob)
        if time.monotonic() - self._reported_s > _STATUS_EVERY_S:
            self.report("running")

    def _adopt(self, blob: bytes) -> None:
        weights = Weights.from_bytes(blob)
        self._policy.load_bytes(weights.parameters)
        self._version = weights.version

    def _ship(self, episode: Episode) -> None:
        """Write one episode into the ring and its record into the queue."""
        record = self._write(episode)
        if record is None:
            return
        self._episodes += 1
        self._steps += episode.steps
        blob = msgpack.packb(record)
        while not self._queues.records.offer(blob, wait_s=_WRITE_WAIT_S):
            if self._stop:
                return

    def _write(self, episode: Episode) -> dict[str, object] | None:
        """Write, waiting for a free slot; None when told to stop meanwhile."""
        meta = {"seat": self._seat, "digest": episode.digest()}
        waits = 0
        while not self._stop:
            try:
                return self.write_to_buffer(
                    episode.to_arrays(), policy_version=self._version, meta=meta, deadline_s=_WRITE_WAIT_S
                )
            except (DeadlineExceededError, RingFullError):
                waits += 1
                self._refresh()
                if waits % _FULL_WAITS_BEFORE_DISCARD == 0:
                    self._discard_oldest()
        return None

    def _discard_oldest(self) -> None:
        """Give up an episode that nobody has fetched in all this time: a lost reference must not block for ever."""
        ring, _ = self._own()
        for ref in ring.ready_refs()[:1]:
            try:
                ring.discard(ref)
                self._given_up += 1
            except StaleSlotError:
                pass  # fetched in this very moment: there is room now
