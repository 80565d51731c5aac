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
from bench.peers.tcp_socket import SocketReader, SocketSource
from bench.peers.zeromq import ZeromqReader, ZeromqSource

__all__ = ["ASYNCIO", "BARE", "BLOCKING", "NAIVE", "SIZES", "SOCKET", "ZEROMQ", "measure"]

SIZES: Final = (4 << 10, 64 << 10, 1 << 20, 16 << 20, 64 << 20)
BLOCKING: Final = "blocking client"
ASYNCIO: Final = "asyncio client"
ZEROMQ: Final = "pyzmq REQ/REP"
BARE: Final = "bare UCX ping"
SOCKET: Final = "TCP socket"
NAIVE: Final = "naive protocol, stock ucxx"


def measure(question: str, plan: Plan) -> list[Row]:
    """All of them at all sizes."""
    with Lineup() as lineup:
        ring, options = lineup.ring(BLOCKING), {"local": "off"}
        zeromq = lineup.source(ZEROMQ, ZeromqSource, int(zmq.REP))
        bare, plain = lineup.source(BARE, BareSource), lineup.source(SOCKET, SocketSource)
        naive = lineup.source(NAIVE, NaiveSource)
        lanes = [
            Lane(subject=BLOCKING, source=ring, reader=lineup.blocking(), options=options),
            Lane(subject=ZEROMQ, source=zeromq, reader=lineup.reader(ZEROMQ, ZeromqReader)),
            Lane(subject=BARE, source=bare, reader=lineup.reader(BARE, BareReader)),
            Lane(subject=SOCKET, source=plain, reader=lineup.reader(SOCKET, SocketReader)),
            Lane(subject=ASYNCIO, source=ring, reader=lineup.asyncio(), options=options),
            Lane(
                subject=NAIVE,
                source=naive,
                reader=lineup.async_reader(NAIVE, NaiveReader),
                polls=True,
                most_bytes=1 << 20,
            ),
        ]
        return measure_sizes(question, lanes, plan.sizes(SIZES), plan)
