"""How long a turn of the benchmark goes on, and what comes out of it."""

from __future__ import annotations

import array
from typing import Any, cast

from bench.core.control import ControlledProcess
from bench.core.rounds import TURN_LIMIT, Lane, Plan, measure_sizes, take_turn

SIZE_BYTES = 1024


class Payloads:
    """A source that takes a while to refill its slots, and a reader that needs `read_ns` for one read."""

    def __init__(self, *, fill_s: float, read_ns: int) -> None:
        self.now_s = 0.0
        self.cpu_s = 0.0
        self.said: list[str] = []
        self._fill_s = fill_s
        self._read_ns = read_ns

    def clock(self) -> float:
        return self.now_s

    def watch_cpu(self) -> None:
        pass

    def call(self, verb: str, **arguments: object) -> object:
        del arguments
        self.said.append(verb)
        if verb == "fill":
            self.now_s += self._fill_s
            self.cpu_s += 0.5
            return [(0, None)]
        latencies = array.array("q", [self._read_ns]).tobytes()
        timed = {"latencies_ns": latencies, "wall_ns": self._read_ns, "cpu_ns": 2000, "call_ns": 70.0}
        return timed if verb == "time" else None


def lane_of(payloads: Payloads, subject: str = "view") -> Lane:
    return Lane(subject=subject, source=payloads, reader=cast("ControlledProcess", payloads))


def figures_of(payloads: Payloads, turn_s: float) -> dict[str, float]:
    return take_turn(lane_of(payloads), SIZE_BYTES, Plan(rounds=1, turn_s=turn_s), clock=payloads.clock)


def batches(payloads: Payloads) -> int:
    return payloads.said.count("time")


def test_turn_lasts_until_its_reads_have_taken_as_long_as_asked() -> None:
    payloads = Payloads(fill_s=0.0, read_ns=1_000_000)
    figures_of(payloads, turn_s=0.1)
    assert batches(payloads) == 100


def test_turn_ends_although_its_reads_take_no_time_at_all() -> None:
    payloads = Payloads(fill_s=0.25, read_ns=1)
    figures_of(payloads, turn_s=0.5)
    assert batches(payloads) == TURN_LIMIT * 0.5 / 0.25


def test_turn_has_one_batch_at_least_and_is_verified_before_it_is_timed() -> None:
    payloads = Payloads(fill_s=10 * TURN_LIMIT, read_ns=1)
    figures_of(payloads, turn_s=0.1)
    assert payloads.said == ["open", "fill", "verify", "fill", "time", "close"]


def test_figures_of_a_turn_leave_out_what_filling_took() -> None:
    figures = figures_of(Payloads(fill_s=1.0, read_ns=1_000_000), turn_s=0.001)
    assert figures["p50_us"] == figures["p99_us"] == 1000.0
    assert figures["per_s"] == 1000.0
    assert figures["gb_per_s"] == 1000.0 * SIZE_BYTES / 1e9
    assert (figures["reader_cpu_us"], figures["source_cpu_us"], figures["call_ns"]) == (2.0, 0.0, 70.0)


def test_subjects_of_a_case_take_turns_round_after_round() -> None:
    said: list[str] = []

    class Named(Payloads):
        def call(self, verb: str, **arguments: object) -> Any:
            if verb == "verify":
                said.append(str(id(self)))
            return super().call(verb, **arguments)

    one, other = Named(fill_s=0.0, read_ns=1), Named(fill_s=0.0, read_ns=1)
    rows = measure_sizes("q", [lane_of(one, "a"), lane_of(other, "b")], [4096, 1 << 20], Plan(rounds=3, turn_s=0.0))
    assert said == [str(id(one)), str(id(other))] * 3 * 2
    assert [(row.case, row.subject) for row in rows] == [
        *(("4 KiB", "a"), ("4 KiB", "b"), ("1 MiB", "a"), ("1 MiB", "b"))
    ]
    assert all(len(values) == 3 for row in rows for values in row.figures.values())
