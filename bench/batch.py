"""How many payloads a second does a trainer get that asks for 48 at once? Beside pyzmq one by one.

A DEALER with 16 requests in flight is shown beside them: it is what ZeroMQ gives to one who builds their own protocol.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import zmq

from bench.core.figures import Row
from bench.core.lineup import Lineup
from bench.core.rounds import Lane, Plan, measure_sizes
from bench.peers.zeromq import DealerReader, ZeromqReader, ZeromqSource

__all__ = ["BATCH", "DEALER", "READ_MANY", "SIZES", "ZEROMQ", "measure"]

SIZES: Final = (4 << 10, 64 << 10, 1 << 20)
BATCH: Final = 48
READ_MANY: Final = "read_many of 48"
ZEROMQ: Final = "pyzmq REQ/REP, one by one"
DEALER: Final = "pyzmq DEALER/ROUTER, 16 in flight"


def measure(question: str, plan: Plan) -> list[Row]:
    """All three at all sizes."""
    plan = replace(plan, reads=2 * BATCH, least_slots=2 * BATCH)
    with Lineup() as lineup:
        lanes = [
            Lane(
                subject=READ_MANY,
                source=lineup.ring(READ_MANY),
                reader=lineup.blocking(),
                options={"local": "off"},
                batch=BATCH,
            ),
            Lane(
                subject=ZEROMQ,
                source=lineup.source(ZEROMQ, ZeromqSource, int(zmq.REP)),
                reader=lineup.reader(ZEROMQ, ZeromqReader),
            ),
            Lane(
                subject=DEALER,
                source=lineup.source(DEALER, ZeromqSource, int(zmq.ROUTER)),
                reader=lineup.reader(DEALER, DealerReader),
                batch=BATCH,
            ),
        ]
        return measure_sizes(question, lanes, plan.sizes(SIZES), plan)
