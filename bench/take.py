"""What do payloads cost that are taken, not named? Beside the same ring read by name, one at a time and 16 a call.

A `take` names a worker; the answer brings names, records and payloads. Then two trainers take from one ring at the same
time: every payload has to go to one of them, and to no more than one.
"""

from __future__ import annotations

import time
from collections import Counter
from typing import Final

from bench.core.figures import Row
from bench.core.lineup import Lineup
from bench.core.ours import DEADLINE_S, TakingReader
from bench.core.rounds import Lane, Plan, measure_sizes
from ucxx_transport import ClientConfig, SlotRef, SyncUCXXClient
from ucxx_transport.units import format_bytes

__all__ = ["BATCH", "READ", "READ_MANY", "SIZES", "TAKE", "TAKERS", "TAKE_MANY", "measure"]

SIZES: Final = (4 << 10, 64 << 10)
BATCH: Final = 16
MOST_FOR_TAKERS: Final = 8192

READ: Final = "read, by name"
TAKE: Final = "take of 1"
READ_MANY: Final = f"read_many of {BATCH}"
TAKE_MANY: Final = f"take of {BATCH}"
TAKERS: Final = f"2 takers of {BATCH}"


class Taker:
    """A trainer that takes until a ring is empty."""

    def __init__(self) -> None:
        self._client = SyncUCXXClient(ClientConfig(local="off", deadline_s=DEADLINE_S))

    def take_all(self, *, source: bytes) -> tuple[list[tuple[int, int]], float]:
        """Slot and generation of everything that came, and the seconds until the last of it was there."""
        ref, came = SlotRef.from_bytes(source), []
        began_s = last_s = time.perf_counter()
        while payloads := self._client.take(ref, max_payloads=BATCH):
            last_s = time.perf_counter()
            for payload in payloads:
                came.append((payload.ref.slot, payload.ref.generation))
                payload.release()
        return came, last_s - began_s

    def close(self) -> None:
        """Close the client."""
        self._client.close()


def measure(question: str, plan: Plan) -> list[Row]:
    """One taker beside one reader, then two takers of one ring."""
    with Lineup() as lineup:
        ring, by_name, taking = lineup.ring("the ring"), lineup.blocking(), lineup.reader("taker", TakingReader)
        lanes = [
            Lane(subject=subject, source=ring, reader=reader, options={"local": "off"}, batch=batch)
            for subject, reader, batch in (
                (READ, by_name, 0),
                (TAKE, taking, 0),
                (READ_MANY, by_name, BATCH),
                (TAKE_MANY, taking, BATCH),
            )
        ]
        rows = measure_sizes(question, lanes, plan.sizes(SIZES), plan)
    return rows + [_two_takers(question, plan, size_bytes) for size_bytes in SIZES]


def _two_takers(question: str, plan: Plan, size_bytes: int) -> Row:
    figures: dict[str, list[float]] = {"per_s": [], "once_share": []}
    case = format_bytes(size_bytes)
    with Lineup() as lineup:
        ring = lineup.ring("the ring")
        slots = min(MOST_FOR_TAKERS, plan.slots(size_bytes))
        ring.call("open", size_bytes=size_bytes, slots=slots)
        takers = [lineup.source(f"taker {which + 1}", Taker) for which in range(2)]
        for number in range(plan.rounds + 1):
            references = [SlotRef.from_bytes(reference) for _, reference in ring.call("fill", count=slots)]
            for taker in takers:
                taker.order("take_all", source=references[0].to_bytes())
            answers = [taker.answer("take_all") for taker in takers]
            if not number:
                continue  # connections were opened
            times = Counter((slot, generation) for came, _ in answers for slot, generation in came)
            once = sum(times[ref.slot, ref.generation] == 1 for ref in references)
            figures["once_share"].append(once / len(references))
            figures["per_s"].append(len(references) / max(seconds for _, seconds in answers))
            plan.on_turn(f"{question}: {TAKERS}, {case}, round {number} of {plan.rounds}")
    return Row(question=question, case=case, subject=TAKERS, figures=figures)
