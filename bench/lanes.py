"""What do UCX's shared-memory lanes bring between processes of one host? Beside our own TCP, and NIXL."""

from __future__ import annotations

from typing import Final

from bench.core.figures import Row
from bench.core.lineup import Lineup
from bench.core.rounds import Lane, Plan, measure_sizes
from bench.peers.nixl import NixlReader, NixlSource, why_not
from ucxx_transport.units import format_bytes

__all__ = ["LANES", "NIXL_LANES", "NIXL_TCP", "SIZES", "TCP", "measure"]

SIZES: Final = (4 << 10, 64 << 10, 1 << 20, 16 << 20)
LANES: Final = "shared-memory lanes"
TCP: Final = "over TCP"
NIXL_TCP: Final = "NIXL over TCP"
NIXL_LANES: Final = "NIXL, shared memory"


def measure(question: str, plan: Plan) -> list[Row]:
    """Both, with the blocking client, at all sizes."""
    skipped = why_not()
    sizes = plan.sizes(SIZES)
    with Lineup() as lineup:
        reader = lineup.blocking()
        lanes = [
            Lane(
                subject=subject,
                source=lineup.ring(subject, shm_lanes=shared),
                reader=reader,
                options={"local": "off", "shm_lanes": shared},
            )
            for subject, shared in ((LANES, True), (TCP, False))
        ]
        if not skipped:
            lanes += [
                Lane(
                    subject=subject,
                    source=lineup.source(subject, NixlSource, transports),
                    reader=lineup.reader(subject, NixlReader),
                    options={"transports": transports},
                    polls=True,
                )
                for subject, transports in ((NIXL_TCP, "tcp"), (NIXL_LANES, "shm"))
            ]
        rows = measure_sizes(question, lanes, sizes, plan)
    if skipped:
        rows += [
            Row(question=question, case=format_bytes(size), subject=subject, skipped=skipped)
            for size in sizes
            for subject in (NIXL_TCP, NIXL_LANES)
        ]
    return rows
