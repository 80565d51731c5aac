"""What does one read over TCP take, and what does it cost? Beside a peer, the floor, and what the kernel gives.

All of them over loopback TCP between two processes, one read at a time; the asyncio client beside the blocking one.
"""

from __future__ import annotations

from typing import Final

import zmq

from bench.core.figures import Row
from bench.core.lineup import Lineup
from bench.core.rounds import Lane, Plan, measure_sizes
from bench.peers.bare_ucx import BareReader, BareSource
from bench.peers.naive import NaiveReader, NaiveSource
from bench.peers.nixl import NixlReader, NixlSource, why_not
from bench.peers.tcp_socket import SocketReader, SocketSource
from bench.peers.zeromq import ZeromqReader, ZeromqSource
from ucxx_transport.units import format_bytes

__all__ = ["ASYNCIO", "BARE", "BLOCKING", "NAIVE", "NIXL", "SIZES", "SOCKET", "ZEROMQ", "measure"]

SIZES: Final = (4 << 10, 64 << 10, 1 << 20, 16 << 20, 64 << 20)
BLOCKING: Final = "blocking client"
ASYNCIO: Final = "asyncio client"
ZEROMQ: Final = "pyzmq REQ/REP"
BARE: Final = "bare UCX ping"
SOCKET: Final = "TCP socket"
NIXL: Final = "NIXL over TCP"
NAIVE: Final = "naive protocol, stock ucxx"


def measure(question: str, plan: Plan) -> list[Row]:
    """All of them at all sizes."""
    skipped = why_not()
    sizes = plan.sizes(SIZES)
    with Lineup() as lineup:
        ring, options = lineup.ring(BLOCKING), {"local": "off"}
        lanes = [
            Lane(subject=BLOCKING, source=ring, reader=lineup.blocking(), options=options),
            Lane(
                subject=ZEROMQ,
                source=lineup.source(ZEROMQ, ZeromqSource, int(zmq.REP)),
                reader=lineup.reader(ZEROMQ, ZeromqReader),
            ),
            Lane(subject=BARE, source=lineup.source(BARE, BareSource), reader=lineup.reader(BARE, BareReader)),
            Lane(
                subject=SOCKET, source=lineup.source(SOCKET, SocketSource), reader=lineup.reader(SOCKET, SocketReader)
            ),
            Lane(subject=ASYNCIO, source=ring, reader=lineup.asyncio(), options=options),
        ]
        if not skipped:
            lanes.append(
                Lane(
                    subject=NIXL,
                    source=lineup.source(NIXL, NixlSource, "tcp"),
                    reader=lineup.reader(NIXL, NixlReader),
                    options={"transports": "tcp"},
                    polls=True,
                )
            )
        naive, reader = lineup.source(NAIVE, NaiveSource), lineup.async_reader(NAIVE, NaiveReader)
        lanes.append(Lane(subject=NAIVE, source=naive, reader=reader, polls=True))
        rows = measure_sizes(question, lanes, sizes, plan)
    if skipped:
        rows += [Row(question=question, case=format_bytes(size), subject=NIXL, skipped=skipped) for size in sizes]
    return rows
