"""What does everything cost that has nothing to do? A worker with 4 ports and 16 connections, in percent of a core."""

from __future__ import annotations

import time
from typing import Any, Final

from bench.core.control import BenchError, ControlledProcess
from bench.core.figures import Row
from bench.core.lineup import Lineup
from bench.core.ours import AsyncClientReader
from bench.core.rounds import Plan
from ucxx_transport import SlotRef

__all__ = ["ALL", "CASE", "measure"]

PORTS: Final = 4
CONNECTIONS: Final = 16
SIZE_BYTES: Final = 4096
CONNECT_TIMEOUT_S: Final = 30.0
SETTLE_S: Final = 1.0
LEAST_S: Final = 1.0
CASE: Final = f"{PORTS} ports, {CONNECTIONS} connections"
ALL: Final = "all processes"
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
    percents: dict[str, list[float]] = {"worker and ports": [], "clients": [], ALL: []}
    with Lineup() as lineup:
        source = lineup.ring("the worker", ports=PORTS)
        clients = lineup.async_reader("16 clients", _Clients)
        source.call("open", size_bytes=SIZE_BYTES, slots=CONNECTIONS)
        clients.call("open", size_bytes=SIZE_BYTES, slots=CONNECTIONS, hold=0, local="off")
        clients.call("verify", offers=source.call("fill"), batch=0)
        _wait_for_connections(source)
        time.sleep(SETTLE_S)
        for process in (source, clients):
            process.watch_cpu()
        for number in range(plan.rounds):
            served, held = _percent_of_a_core(seconds, source, clients)
            for subject, percent in zip(percents, (served, held, served + held), strict=True):
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


def _percent_of_a_core(seconds: float, *processes: ControlledProcess) -> list[float]:
    began_s = [process.cpu_s for process in processes]
    clock_s = time.perf_counter()
    time.sleep(seconds)
    wall_s = time.perf_counter() - clock_s
    return [100 * (process.cpu_s - before_s) / wall_s for process, before_s in zip(processes, began_s, strict=True)]
