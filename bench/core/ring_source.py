"""The worker's side: a ring with a server, in a process that takes orders.

| order | what it does                                                                                      |
|-------|---------------------------------------------------------------------------------------------------|
| open  | create a ring of the given shape and start its server (in place of the present ones)              |
| fill  | write one payload into every slot; answers (number of the payload, its `SlotRef`) each            |
| spin  | from now on this process's main thread spins in Python between orders, as a busy worker's does    |
| facts | what the server says of itself                                                                    |
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal

from bench.core.control import Handlers, serve_orders
from bench.core.payloads import PayloadPattern
from ucxx_transport import RingConfig, ServerConfig, SharedRingBuffer, UCXXServer

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

__all__ = ["SourceSettings", "run_ring_source", "server_config"]

HOST: Final = "127.0.0.1"
FILL_TIMEOUT_S: Final = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceSettings:
    """How the source's server runs.

    Attributes:
        mode: a process of its own, or threads of the worker.
        ports: how many it listens on.
        shm_lanes: whether UCX may use shared memory.
        ucx: further settings of UCX.
    """

    mode: Literal["process", "thread"] = "process"
    ports: int = 4
    shm_lanes: bool = False
    ucx: Mapping[str, str] = field(default_factory=dict)


def run_ring_source(connection: Connection, settings: SourceSettings) -> None:
    """Be a source process until the pipe closes."""
    with _RingSource(settings) as source:
        handlers: Handlers = {"open": source.open, "fill": source.fill, "spin": source.spin, "facts": source.facts}
        serve_orders(connection, handlers, before_order=source.spin_until_readable)


def server_config(settings: SourceSettings) -> ServerConfig:
    """The server's settings: its defaults on loopback, but for what is being measured."""
    return ServerConfig(
        host=HOST, ports=settings.ports, mode=settings.mode, shm_lanes=settings.shm_lanes, ucx=settings.ucx
    )


class _RingSource(ExitStack):
    def __init__(self, settings: SourceSettings) -> None:
        super().__init__()
        self._settings = settings
        self._written = 0
        self._spinning = False

    def open(self, *, size_bytes: int, slots: int) -> None:
        self.close()
        self._slots = slots
        self._pattern = PayloadPattern(size_bytes)
        # `block`: a payload that was not consumed would stop the benchmark here instead of being overwritten unseen.
        ring_config = RingConfig(slots=slots, slot_bytes=size_bytes, on_full="block", block_timeout_s=FILL_TIMEOUT_S)
        self._ring = SharedRingBuffer.create(ring_config)
        self.callback(self._ring.unlink)
        self.callback(self._ring.close)
        self._server = UCXXServer(self._ring, server_config(self._settings))
        self._server.start()
        self.callback(self._server.stop)

    def fill(self) -> list[tuple[int, dict[str, Any]]]:
        offers = []
        for _ in range(self._slots):
            ref = self._ring.write_raw(self._pattern.payload(self._written).data)
            offers.append((self._written, ref.to_dict()))
            self._written += 1
        return offers

    def spin(self, *, on: bool) -> None:
        self._spinning = on

    def facts(self) -> dict[str, Any]:
        statistics = self._server.statistics()
        return {
            "connections": statistics.total("connections"),
            "restarts": statistics.restarts,
            "ports": [asdict(port) for port in statistics.ports],
        }

    def spin_until_readable(self, connection: Connection) -> None:
        """Hold the interpreter as a busy worker's main thread does, until an order has come."""
        if not self._spinning:
            return
        waiter = threading.Thread(target=connection.poll, args=(None,), name="order-waiter")
        waiter.start()
        turns = 0
        while waiter.is_alive():
            turns += 1
        waiter.join()
