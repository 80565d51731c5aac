"""kill -9 at random moments of writers, servers and clients that are all busy, and the books afterwards.

```
 home:    this process (ring, server) ── its sidecar            writer (attached)
 worker:  worker process (ring, server, writer) ── its sidecar
 readers: two over UCX, one in place (view or copy)              each reads from both rings
 takers:  one over UCX, one in place                             each takes from both
```

One cycle: everything is busy; after a random number of answers and a random moment one of them (at times two) gets
SIGKILL; all the others go on; the dead are replaced; the work is let run dry; no slot of any ring is WRITING or
READING, and every payload is accounted for (`ledger`). A killed worker leaves neither segment nor server process.

`python -m tests.soak.kill_soak --cycles 500 --seed 7` runs it by itself (see `scripts/soak`).
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.soak.actors import Message
from tests.soak.ledger import Ledger
from tests.soak.sources import Source, is_running, segment_exists
from tests.soak.summary import SoakSettings, Summary
from tests.soak.traffic import STEP_DEADLINE_S, TAKER, Traffic
from tests.support.waiting import wait_until
from ucxx_transport import SharedRingBuffer, SlotState

__all__ = ["VICTIMS", "KillSoak"]

VICTIMS = ("writer", "home server", "ucx reader", "local reader", "taker", "worker", "worker server")
READERS = ("ucx reader 1", "ucx reader 2", "local reader", f"ucx {TAKER}", f"local {TAKER}")
# How many answers may pass before a kill, and how far into the work after them it may come.
ANSWERS_BEFORE_KILL = 40
MOMENT_S = 0.02
_HELD = (SlotState.WRITING, SlotState.READING)
_TELLING = (
    "reclaimed_reads",
    "reclaimed_writes",
    "lock_recoveries",
    "repaired_slots",
    "released",
    "stale",
    "late_finalise",
)


class KillSoak:
    """The harness; use `run()`.

    Args:
        settings: how many cycles, which seed. folder: for the processes' logs.
        on_cycle: told what was killed, after each cycle.
    """

    def __init__(
        self, settings: SoakSettings, folder: Path, on_cycle: Callable[[int, list[str]], None] = lambda *_: None
    ) -> None:
        self.summary = Summary(settings=settings)
        self._settings = settings
        self._on_cycle = on_cycle
        self._rng = random.Random(settings.seed)
        server: Message = {"host": "127.0.0.1", "ports": 2, "shm_lanes": settings.shm_lanes}
        self._home = Source(name="home", server=server, first_stream=1_000_000)
        self._worker = Source(name="worker", server=server, first_stream=2_000_000)
        self._sources = (self._home, self._worker)
        self._ledgers: list[Ledger] = []
        self._deck: list[str] = []
        self._traffic = Traffic(self._sources, self._rng, folder, self.summary)

    def run(self) -> Summary:
        """All cycles, then the end of everything.

        Raises:
            AssertionError: something was lost, left or stuck.
        """
        began = time.monotonic()
        with self._everything_up():
            for number in range(self._settings.cycles):
                victims = self._draw()
                self._cycle(victims)
                self.summary.cycles, self.summary.seconds = number + 1, time.monotonic() - began
                self._on_cycle(number + 1, victims)
            self._traffic.run_dry(empty=True)
            self._settle()
            assert not any(self._ring_of(source).get_ready_count() for source in self._sources)
            self._end()
        for ledger in self._ledgers:
            self.summary.payloads.update(ledger.counts)
        self.summary.seconds = time.monotonic() - began
        return self.summary

    @contextmanager
    def _everything_up(self) -> Iterator[None]:
        try:
            for source in self._sources:
                source.open(self._traffic.stage)
                self._ledgers.append(source.ledger)
            for kind in READERS:
                self._start_reader(kind)
            yield
        finally:
            self._traffic.stage.close()
            for source in self._sources:
                source.close()

    def _end(self) -> None:
        names = [self._ring_of(source).name for source in self._sources]
        servers = [self._traffic.find_server(source) for source in self._sources]
        self._traffic.stage.stop_all(STEP_DEADLINE_S)
        for source in self._sources:
            self._count_ring(source)
            source.close()
        wait_until(lambda: not any(map(segment_exists, names)), STEP_DEADLINE_S, what=f"segments {names} are gone")
        wait_until(lambda: not any(map(is_running, servers)), STEP_DEADLINE_S, what=f"servers {servers} have ended")

    def _draw(self) -> list[str]:
        """Every kind of victim is as frequent as the others; one draw in eight is a pair."""
        victims: list[str] = []
        while len(victims) < (2 if self._rng.random() < 1 / 8 else 1):
            if not self._deck:
                self._deck = self._rng.sample(VICTIMS, len(VICTIMS))
            victims.append(self._deck.pop())
        return victims

    def _cycle(self, victims: list[str]) -> None:
        traffic = self._traffic
        servers = {source.name: traffic.find_server(source) for source in self._sources}
        traffic.go_on()
        self._everyone_works("all work, the replacements too")
        due = traffic.answered + self._rng.randrange(ANSWERS_BEFORE_KILL)
        traffic.run_until(lambda: traffic.answered >= due, "work goes on")
        time.sleep(self._rng.uniform(0, MOMENT_S))  # the random moment itself, not a wait for anything
        survivors = [actor.name for actor in traffic.stage.actors]
        checks = [check for victim in victims for check in self._kill(victim, servers)]
        present = {actor.name for actor in traffic.stage.actors}
        self._work_is_done_by([name for name in survivors if name in present], f"the others go on without {victims}")
        traffic.run_dry()  # also waits until the replacements are there
        for check in checks:
            traffic.run_until(check, f"{victims}: killed, and what was theirs is gone or back")
        self._settle()

    def _everyone_works(self, what: str) -> None:
        """Each process, and UCX from each ring: a server that was killed has been replaced."""
        over_ucx = [f"ucx from {source.name}" for source in self._sources]
        self._work_is_done_by([*(actor.name for actor in self._traffic.stage.actors), *over_ucx], what)

    def _work_is_done_by(self, names: list[str], what: str) -> None:
        done = self._traffic.done
        marks = {name: done[name] + 2 for name in names}
        self._traffic.run_until(lambda: all(done[name] >= mark for name, mark in marks.items()), what)

    def _kill(self, victim: str, servers: dict[str, int]) -> list[Callable[[], bool]]:
        """Kill one, replace it; returns what must come true while the others work."""
        self.summary.kills[victim] += 1
        match victim:
            case "writer":
                return self._kill_writer()
            case "worker":
                return self._kill_worker(servers["worker"])
            case "ucx reader":
                return self._kill_reader(self._rng.choice(("ucx reader 1", "ucx reader 2")))
            case "local reader":
                return self._kill_reader(victim)
            case "taker":
                return self._kill_reader(self._rng.choice((f"ucx {TAKER}", f"local {TAKER}")))
            case "home server":
                return self._kill_server(self._home, servers["home"])
            case _:
                return self._kill_server(self._worker, servers["worker"])

    def _kill_writer(self) -> list[Callable[[], bool]]:
        writer = self._home.writer
        assert writer is not None
        self._traffic.stage.kill(writer)
        self._home.ledger.writer_killed(len(writer.unanswered))
        self._home.start_writer(self._traffic.stage)
        return []

    def _kill_reader(self, kind: str) -> list[Callable[[], bool]]:
        reader = self._traffic.readers.pop(kind)
        self._traffic.stage.kill(reader)
        self._traffic.reader_killed(reader)
        self._start_reader(kind)
        return []

    def _kill_server(self, source: Source, pid: int) -> list[Callable[[], bool]]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return []  # it went with its worker, the other victim of this cycle
        began = time.monotonic()
        source.server_killed(pid)

        def is_back() -> bool:
            if not self._traffic.server_of(source):
                return False
            self.summary.server_back_s.append(time.monotonic() - began)
            source.turn += 1
            return True

        return [is_back]

    def _kill_worker(self, server_pid: int) -> list[Callable[[], bool]]:
        worker = self._worker
        assert worker.writer is not None
        ring = self._ring_of(worker)
        self._traffic.stage.kill(worker.writer)
        began = time.monotonic()
        self._count_ring(worker)
        worker.ledger.closed = True
        worker.close()
        worker.server_killed(server_pid)
        worker.open(self._traffic.stage)
        self._ledgers.append(worker.ledger)

        def is_swept() -> bool:
            if segment_exists(ring.name) or is_running(server_pid):
                return False
            self.summary.swept_s.append(time.monotonic() - began)
            return True

        return [is_swept]

    def _start_reader(self, kind: str) -> None:
        local = self._rng.choice(("view", "copy")) if kind.startswith("local") else "off"
        self._traffic.start_reader(kind, {"local": local, "shm_lanes": self._settings.shm_lanes})

    def _settle(self) -> None:
        began = time.monotonic()
        for source in self._sources:
            ring = self._ring_of(source)
            self._wait_until_idle(ring)
            try:
                for ref in source.ledger.settle(ring.ready_refs()):
                    assert ring.discard(ref)
            except AssertionError as error:
                raise self._traffic.stage.failure(f"{source.name}: {error}") from error
        self.summary.slots_idle_s.append(time.monotonic() - began)

    def _wait_until_idle(self, ring: SharedRingBuffer) -> None:
        try:
            wait_until(lambda: not any(state in _HELD for state in ring.slot_states()), STEP_DEADLINE_S)
        except AssertionError as error:
            states = [state.name for state in ring.slot_states()]
            raise self._traffic.stage.failure(f"slots of {ring.name} stay held: {states}") from error

    def _count_ring(self, source: Source) -> None:
        seen = self._ring_of(source).statistics()
        self.summary.rings.update({name: getattr(seen, name) for name in _TELLING})

    def _ring_of(self, source: Source) -> SharedRingBuffer:
        assert source.is_open()
        assert source.ring is not None
        return source.ring
