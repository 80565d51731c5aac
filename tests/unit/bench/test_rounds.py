"""How long a turn of the benchmark goes on, and what comes out of it."""

from __future__ import annotations

import array
import os
from typing import Any, cast

from bench.core.control import ControlledProcess
from bench.core.host import pool_bytes
from bench.core.rounds import MOST_HELD, TURN_LIMIT, Lane, Plan, Supply, measure_sizes, take_turn
from tests.support.rows import row

SIZE_BYTES = 1024


class Payloads:
    """A source that takes a while to refill its slots, and a reader that needs `read_ns` for one read."""

    pids = ()

    def __init__(self, *, fill_s: float, read_ns: int) -> None:
        self.now_s = 0.0
        self.cpu_s = 0.0
        self.said: list[str] = []
        self._fill_s = fill_s
        self._read_ns = read_ns
        self.written = 0

    def clock(self) -> float:
        return self.now_s

    def watch_cpu(self) -> None:
        pass

    def call(self, verb: str, **arguments: Any) -> object:
        self.said.append(verb)
        if verb == "fill":
            self.now_s += self._fill_s
            self.cpu_s += 0.5
            self.written += arguments["count"]
            return [(number, None) for number in range(self.written - arguments["count"], self.written)]
        latencies = array.array("q", [self._read_ns]).tobytes()
        timed = {"latencies_ns": latencies, "wall_ns": self._read_ns, "cpu_ns": 2000, "call_ns": 70.0}
        return timed if verb == "time" else None


def lane_of(payloads: Payloads, subject: str = "view") -> Lane:
    return Lane(subject=subject, source=payloads, reader=cast("ControlledProcess", payloads))


def figures_of(payloads: Payloads, turn_s: float) -> dict[str, float]:
    plan = Plan(rounds=1, turn_s=turn_s, reads=1, pool_bytes=SIZE_BYTES, least_slots=1)
    supply = Supply(payloads)
    supply.open(SIZE_BYTES, plan.slots(SIZE_BYTES))
    return take_turn(lane_of(payloads), supply, SIZE_BYTES, plan, clock=payloads.clock)


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
    assert payloads.said == ["open", "open", "fill", "verify", "fill", "time", "close"]


def test_figures_of_a_turn_leave_out_what_filling_took() -> None:
    figures = figures_of(Payloads(fill_s=1.0, read_ns=1_000_000), turn_s=0.001)
    assert figures["p50_us"] == figures["p99_us"] == 1000.0
    assert figures["per_s"] == 1000.0
    assert figures["gb_per_s"] == 1000.0 * SIZE_BYTES / 1e9
    assert (figures["reader_cpu_us"], figures["source_cpu_us"], figures["call_ns"]) == (2.0, 0.0, 70.0)


def test_subjects_of_a_case_take_turns_round_after_round() -> None:
    said: list[str] = []

    class Named(Payloads):
        def call(self, verb: str, **arguments: Any) -> Any:
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


def test_a_payload_is_read_after_all_others_of_its_source_were_written() -> None:
    source = Payloads(fill_s=0.0, read_ns=1)
    supply = Supply(source)
    supply.open(SIZE_BYTES, 6)
    for turn, count in enumerate((2, 2, 1, 5, 6)):
        offers = supply.next(count)
        with row(turn=turn, count=count):
            assert all(source.written - number > 6 - count for number, _ in offers)
    assert source.written == 6 + 2 + 2 + 1 + 5, "as many as were read: each slot is used again when it has been"


def test_a_source_holds_what_caches_do_not_at_every_size() -> None:
    for reads, least_slots in ((64, 4), (96, 96), (1024, 1024)):
        plan = Plan(reads=reads, least_slots=least_slots, pool_bytes=100 << 20)
        for size_bytes in (4 << 10, 64 << 10, 1 << 20, 16 << 20, 64 << 20):
            with row(reads=reads, size_bytes=size_bytes):
                slots = plan.slots(size_bytes)
                assert slots >= least_slots
                assert slots * size_bytes > 0.9 * plan.pool_bytes
    assert 0 < pool_bytes() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 4


def test_a_reader_holds_as_many_as_there_are_but_no_more_than_can_be_warmed() -> None:
    opened: list[tuple[int, int]] = []

    class Opened(Payloads):
        def call(self, verb: str, **arguments: Any) -> object:
            if verb == "open" and "hold" in arguments:
                opened.append((arguments["slots"], arguments["hold"]))
            return super().call(verb, **arguments)

    lane = lane_of(Opened(fill_s=0.0, read_ns=1))
    measure_sizes("q", [lane], [4 << 10, 1 << 20, 16 << 20], Plan(rounds=1, turn_s=0.0, pool_bytes=96 << 20))
    assert opened == [(MOST_HELD, MOST_HELD), (96, 96), (6, 6)]
