"""What does a worker whose main thread spins in Python add to a read of 64 KiB?

Its ports are processes of their own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from bench.core.figures import Row
from bench.core.lineup import Lineup
from bench.core.rounds import Lane, Plan, Supply, take_turn

__all__ = ["SUBJECT", "measure"]

SIZE_BYTES: Final = 64 << 10
READS: Final = 32
SUBJECT: Final = "blocking client"


def measure(question: str, plan: Plan) -> list[Row]:
    """Quiet and spinning turns, by turns; `added_us` is their difference, round by round."""
    plan = replace(plan, reads=READS)
    quiet_us, spinning_us = [], []
    with Lineup() as lineup:
        source = lineup.ring("the worker")
        lane = Lane(subject="", source=source, reader=lineup.blocking(), options={"local": "off"})
        supply = Supply(source)
        supply.open(SIZE_BYTES, plan.slots(SIZE_BYTES))
        for number in range(plan.rounds):
            quiet_us.append(take_turn(lane, supply, SIZE_BYTES, plan)["p50_us"])
            source.call("spin", on=True)
            spinning_us.append(take_turn(lane, supply, SIZE_BYTES, plan)["p50_us"])
            source.call("spin", on=False)
            plan.on_turn(f"{question}: round {number + 1} of {plan.rounds}")
    added_us = [spinning - quiet for spinning, quiet in zip(spinning_us, quiet_us, strict=True)]
    figures = {"quiet_us": quiet_us, "spinning_us": spinning_us, "added_us": added_us}
    return [Row(question=question, case="64 KiB", subject=SUBJECT, figures=figures)]
