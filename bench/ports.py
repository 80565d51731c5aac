"""Do more ports and more clients bring more? One client of one port, and four of four, each with batches of 48."""

from __future__ import annotations

from typing import Final

from bench.batch import BATCH
from bench.core.control import ControlledProcess
from bench.core.figures import Row
from bench.core.lineup import Lineup
from bench.core.rounds import Plan

__all__ = ["FOUR", "ONE", "measure"]

SIZE_BYTES: Final = 64 << 10
ONE: Final = "1 client, 1 port"
FOUR: Final = "4 clients, 4 ports"


def measure(question: str, plan: Plan) -> list[Row]:
    """Both, in turn."""
    subjects = {ONE: 1, FOUR: 4}
    whole = BATCH * max(subjects.values())
    slots = max(1, plan.pool_bytes // (SIZE_BYTES * whole)) * whole
    with Lineup() as lineup:
        lanes = {
            subject: (
                lineup.ring(subject, ports=number),
                [lineup.blocking(f"client {which + 1}") for which in range(number)],
            )
            for subject, number in subjects.items()
        }
        figures: dict[str, list[float]] = {subject: [] for subject in subjects}
        for source, clients in lanes.values():
            source.call("open", size_bytes=SIZE_BYTES, slots=slots)
            for client in clients:
                client.call("open", size_bytes=SIZE_BYTES, slots=BATCH, hold=BATCH, local="off")
            _share(source, clients, slots, "verify")
        for number in range(plan.rounds):
            for subject, (source, clients) in lanes.items():
                figures[subject].append(_reads_per_s(source, clients, slots))
            plan.on_turn(f"{question}: round {number + 1} of {plan.rounds}")
        for _, clients in lanes.values():
            for client in clients:
                client.call("close")
    return [
        Row(question=question, case="64 KiB", subject=subject, figures={"per_s": values})
        for subject, values in figures.items()
    ]


def _reads_per_s(source: ControlledProcess, clients: list[ControlledProcess], slots: int) -> float:
    """Of all clients together: each reads its share of the slots, all at the same time."""
    answers = _share(source, clients, slots, "time")
    return sum(slots / len(clients) / (answer["wall_ns"] / 1e9) for answer in answers)


def _share(
    source: ControlledProcess, clients: list[ControlledProcess], slots: int, verb: str
) -> list[dict[str, float]]:
    offers = source.call("fill", count=slots)
    for which, client in enumerate(clients):
        client.order(verb, offers=offers[which :: len(clients)], batch=BATCH)
    return [client.answer(verb) for client in clients]
