"""What do UCX's shared-memory lanes bring between processes of one host? Beside our own TCP, and NIXL."""

from __future__ import annotations

from typing import Final

from bench.core.figures import Row
from bench.core.lineup import Lineup
from bench.core.rounds import Lane, Plan, measure_sizes
from bench.peers.bare_ucx import SHM_LANES, BareReader, BareSource
from bench.peers.nixl import nixl_lanes

__all__ = ["BARE", "LANES", "NIXL_LANES", "NIXL_TCP", "SIZES", "TCP", "measure"]

SIZES: Final = (4 << 10, 64 << 10, 1 << 20, 16 << 20)
LANES: Final = "shared-memory lanes"
TCP: Final = "over TCP"
BARE: Final = "bare UCX ping, shared memory"
NIXL_TCP: Final = "NIXL over TCP"
NIXL_LANES: Final = "NIXL, shared memory"


def measure(question: str, plan: Plan) -> list[Row]:
    """Both, with the blocking client, at all sizes."""
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
        lanes.append(
            Lane(
                subject=BARE,
                source=lineup.source(BARE, BareSource, SHM_LANES),
                reader=lineup.reader(BARE, BareReader),
                options={"settings": SHM_LANES},
            )
        )
        nixl, skipped = nixl_lanes(lineup, {NIXL_TCP: "tcp", NIXL_LANES: "shm"})
        return measure_sizes(question, [*lanes, *nixl], plan.sizes(SIZES), plan, skipped=skipped)
