"""What does everything cost that has nothing to do? A worker with 4 ports and 16 connections, in percent of a core.

Beside it: processes that do nothing but sleep, one for each of its threads, and together wake as often. That is what
the machine takes for it: on some 1 ms of CPU a time, and more the longer the sleep.
"""

from __future__ import annotations

import subprocess
import sys
import time
from contextlib import ExitStack
from typing import Any, Final

from bench.core.control import BenchError, ControlledProcess
from bench.core.cpu_time import tree_cpu_s
from bench.core.figures import Row
from bench.core.lineup import Lineup
from bench.core.ours import AsyncClientReader
from bench.core.rounds import Plan
from ucxx_transport import SlotRef

__all__ = ["ALL", "CASE", "SLEEPERS", "measure"]

PORTS: Final = 4
CONNECTIONS: Final = 16
SIZE_BYTES: Final = 4096
CONNECT_TIMEOUT_S: Final = 30.0
SETTLE_S: Final = 1.0
LEAST_S: Final = 1.0
CASE: Final = f"{PORTS} ports, {CONNECTIONS} connections"
ALL: Final = "all processes"
SLEEPERS: Final = "as many that only sleep"
POLL_S: Final = 0.05


class _Clients:
    """As many asyncio clients on one loop as there are connections; each keeps the one of its first read."""

    async def open(self, *, size_bytes: int, slots: int, **options: Any) -> None:
        self._clients = [AsyncClientReader() for _ in range(slots)]
        for client in self._clients:
            await client.open(size_bytes=size_bytes, slots=slots, **options)
        self._next = 0

    def resolve(self, reference: bytes) -> SlotRef:
        return SlotRef.from_bytes(reference)

    async def read(self, reference: SlotRef) -> Any:
        client = self._clients[self._next]
        self._next += 1
        return await client.read(reference)

    async def close(self) -> None:
        for client in self._clients:
            await client.close()


def measure(question: str, plan: Plan) -> list[Row]:
    """Connect, wait for quiet, and measure for a round after another."""
    seconds = max(LEAST_S, 5 * plan.turn_s)
    percents: dict[str, list[float]] = {"worker and ports": [], "clients": [], ALL: [], SLEEPERS: []}
    with Lineup() as lineup:
        source = lineup.ring("the worker", ports=PORTS)
        clients = lineup.async_reader("16 clients", _Clients)
        source.call("open", size_bytes=SIZE_BYTES, slots=CONNECTIONS)
        clients.call("open", size_bytes=SIZE_BYTES, slots=CONNECTIONS, hold=0, local="off")
        clients.call("verify", offers=source.call("fill", count=CONNECTIONS), batch=0)
        _wait_for_connections(source)
        time.sleep(SETTLE_S)
        for process in (source, clients):
            process.watch_cpu()
        for number in range(plan.rounds):
            (served, held), threads, sleeps_per_s = _percent_of_a_core(seconds, source, clients)
            slept = _percent_of_sleepers(seconds, threads, sleeps_per_s)
            for subject, percent in zip(percents, (served, held, served + held, slept), strict=True):
                percents[subject].append(percent)
            plan.on_turn(f"{question}: round {number + 1} of {plan.rounds}")
        clients.call("close")
    return [
        Row(question=question, case=CASE, subject=subject, figures={"percent": values})
        for subject, values in percents.items()
    ]


def _wait_for_connections(source: ControlledProcess) -> None:
    until_s = time.monotonic() + CONNECT_TIMEOUT_S
    while (connections := source.call("connections")) < CONNECTIONS:
        if time.monotonic() > until_s:
            raise BenchError(f"the server counts {connections} connections instead of {CONNECTIONS}")
        time.sleep(POLL_S)


def _percent_of_a_core(seconds: float, *processes: ControlledProcess) -> tuple[list[float], int, float]:
    """Of each; then how many threads have slept, and how often a second all of them together."""
    began_s = [process.cpu_s for process in processes]
    slept = {thread: count for process in processes for thread, count in process.sleeps.items()}
    clock_s = time.perf_counter()
    time.sleep(seconds)
    wall_s = time.perf_counter() - clock_s
    used_s = [process.cpu_s - before_s for process, before_s in zip(processes, began_s, strict=True)]
    now = {thread: count for process in processes for thread, count in process.sleeps.items()}
    sleeps = [count - slept[thread] for thread, count in now.items() if count > slept.get(thread, count)]
    return [100 * each_s / wall_s for each_s in used_s], len(sleeps), sum(sleeps) / wall_s


def _percent_of_sleepers(seconds: float, number: int, sleeps_per_s: float) -> float:
    """Of so many processes, which together sleep so often."""
    program = f"import time\nprint(flush=True)\nwhile True: time.sleep({number / max(sleeps_per_s, 1.0)})"
    with ExitStack() as stack:
        sleepers = []
        for _ in range(number):
            sleeper = subprocess.Popen([sys.executable, "-I", "-S", "-c", program], stdout=subprocess.PIPE)
            stack.enter_context(sleeper)
            stack.callback(sleeper.kill)
            sleepers.append(sleeper)
        for sleeper in sleepers:
            if sleeper.stdout is None or not sleeper.stdout.readline():
                raise BenchError("a process that is to sleep has ended instead")
        pids = tuple(sleeper.pid for sleeper in sleepers)
        began_s, clock_s = tree_cpu_s(pids), time.perf_counter()
        time.sleep(seconds)
        return 100 * (tree_cpu_s(pids) - began_s) / (time.perf_counter() - clock_s)
