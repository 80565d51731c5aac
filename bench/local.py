"""What does a read on the worker's own host take? In place, and copied, beside memcpy.

A view moves no byte: its time says how soon a reader may start, whatever the size. The first ones behind a refill find
the caches full of payloads and take several times as long: so there are as many to a refill at every size, and enough
for the median to lie beyond those.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from bench.core.figures import Row
from bench.core.lineup import Lineup
from bench.core.rounds import Lane, Plan, measure_sizes
from bench.peers.memcpy import MemcpyReader, OwnMemory

__all__ = ["SIZES", "VIEW_ASYNCIO", "VIEW_BLOCKING", "measure"]

SIZES: Final = (4 << 10, 64 << 10, 1 << 20, 16 << 20, 64 << 20)
READS: Final = 16
VIEW_BLOCKING: Final = "view, blocking"
VIEW_ASYNCIO: Final = "view, asyncio"


def measure(question: str, plan: Plan) -> list[Row]:
    """All ways at all sizes; each payload is released at once."""
    with Lineup() as lineup:
        ring, blocking, asyncio = lineup.ring("the ring", ports=1), lineup.blocking(), lineup.asyncio()
        view, copy = {"local": "view"}, {"local": "copy"}
        lanes = [
            Lane(subject=VIEW_BLOCKING, source=ring, reader=blocking, options=view, hold=False),
            Lane(subject=VIEW_ASYNCIO, source=ring, reader=asyncio, options=view, hold=False),
            Lane(subject="copy, blocking", source=ring, reader=blocking, options=copy, hold=False),
            Lane(subject="copy, asyncio", source=ring, reader=asyncio, options=copy, hold=False),
            Lane(subject="memcpy", source=OwnMemory(), reader=lineup.reader("memcpy", MemcpyReader), hold=False),
        ]
        few = replace(plan, turn_s=plan.turn_s / 2, reads=READS, least_slots=READS)
        return measure_sizes(question, lanes, plan.sizes(SIZES), few)
