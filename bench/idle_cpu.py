"""What does a server cost that has nothing to do? 4 ports, 16 idle connections, in percent of one core."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

from bench.core.control import BenchError, ControlledProcess, serve_orders_async
from bench.core.reader import Offer, ReaderSettings
from bench.core.ring_source import SourceSettings, run_ring_source
from bench.core.transport_reader import client_config
from bench.naive_protocol import run_naive_reader, run_naive_source
from ucxx_transport import SlotRef, UCXXClient

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

__all__ = ["IdleCpu", "measure_idle_cpu"]

PORTS: Final = 4
CONNECTIONS: Final = 16
SIZE_BYTES: Final = 64 * 1024
CONNECT_TIMEOUT_S: Final = 30.0
SETTLE_S: Final = 1.0
POLL_S: Final = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class IdleCpu:
    """Percent of one core.

    Attributes:
        seconds: how long was measured.
        ports: of the server.
        connections: idle ones, as the server counts them.
        server_percent: the worker and its server process.
        clients_percent: all clients, which share one process.
        naive_server_percent: the naive server with one idle connection.
    """

    seconds: float
    ports: int
    connections: int
    server_percent: float
    clients_percent: float
    naive_server_percent: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def measure_idle_cpu(seconds: float) -> IdleCpu:
    """Connect, wait for quiet, and measure.

    Raises:
        BenchError: the connections did not come about.
    """
    with ExitStack() as stack:
        source = stack.enter_context(ControlledProcess("idle server", run_ring_source, SourceSettings(ports=PORTS)))
        clients = stack.enter_context(ControlledProcess("idle clients", _run_idle_clients))
        source.call("open", size_bytes=SIZE_BYTES, slots=CONNECTIONS)
        clients.call("connect", offers=source.call("fill"))
        connections = _wait_for_connections(source)
        server_percent, clients_percent = _percent_of_a_core(seconds, source, clients)
    return IdleCpu(
        seconds=seconds,
        ports=PORTS,
        connections=connections,
        server_percent=server_percent,
        clients_percent=clients_percent,
        naive_server_percent=_naive_server_percent(seconds),
    )


def _naive_server_percent(seconds: float) -> float:
    with ExitStack() as stack:
        source = stack.enter_context(ControlledProcess("idle naive server", run_naive_source))
        reader = stack.enter_context(ControlledProcess("idle naive client", run_naive_reader))
        source.call("open", size_bytes=SIZE_BYTES, slots=1)
        reader.call("open", **asdict(ReaderSettings(size_bytes=SIZE_BYTES, slots=1)))
        reader.call("verify", offers=source.call("fill"))
        (percent,) = _percent_of_a_core(seconds, source)
        reader.call("close")
    return percent


def _wait_for_connections(source: ControlledProcess) -> int:
    give_up_s = time.monotonic() + CONNECT_TIMEOUT_S
    while (connections := int(source.call("facts")["connections"])) < CONNECTIONS:
        if time.monotonic() > give_up_s:
            raise BenchError(f"the server counts {connections} connections instead of {CONNECTIONS}")
        time.sleep(POLL_S)
    return connections


def _percent_of_a_core(seconds: float, *processes: ControlledProcess) -> tuple[float, ...]:
    time.sleep(SETTLE_S)
    for process in processes:
        process.watch_cpu()
    began_s = [process.cpu_s for process in processes]
    clock_s = time.perf_counter()
    time.sleep(seconds)
    wall_s = time.perf_counter() - clock_s
    return tuple(
        100 * (process.cpu_s - before_s) / wall_s for process, before_s in zip(processes, began_s, strict=True)
    )


def _run_idle_clients(connection: Connection) -> None:
    """Hold one connection a payload: each read by a client of its own, which then keeps its endpoint."""

    async def serve() -> None:
        async with AsyncExitStack() as stack:

            async def connect(*, offers: Sequence[Offer]) -> None:
                config = client_config(ReaderSettings(size_bytes=SIZE_BYTES, slots=CONNECTIONS))
                for _, reference in offers:
                    client = await stack.enter_async_context(UCXXClient(config))
                    (await client.read(SlotRef.from_dict(reference))).release()

            await serve_orders_async(connection, {"connect": connect})

    asyncio.run(serve())
