"""How long a turn of the benchmark goes on."""

from __future__ import annotations

import array
from types import SimpleNamespace
from typing import Any, cast

from bench.core.rounds import TURN_LIMIT_S, Lane, Plan, take_turn
from bench.core.subjects import Subject

SIZE_BYTES = 1024


class Payloads:
    """A source that takes a while to refill its slots, and a reader that needs `read_ns` for all of them."""

    def __init__(self, *, fill_s: float, read_ns: int) -> None:
        self.now_s = 0.0
        self.cpu_s = 0.0
        self._fill_s = fill_s
        self._read_ns = read_ns

    def clock(self) -> float:
        return self.now_s

    def fill(self) -> list[Any]:
        self.now_s += self._fill_s
        return []

    def call(self, verb: str, **arguments: object) -> object:
        del arguments
        latencies = array.array("q", [self._read_ns]).tobytes()
        timed = {"latencies_ns": latencies, "wall_ns": self._read_ns, "cpu_ns": 0, "transport": "view"}
        return {"open": None, "verify": 4, "time": timed, "close": None}[verb]


def reads_of_a_turn(payloads: Payloads, turn_s: float) -> int:
    source = cast("Any", SimpleNamespace(fill=payloads.fill, cpu_s=0.0))
    lane = Lane(Subject(name="view", label="view", client="sync"), source, cast("Any", payloads))
    return take_turn(lane, SIZE_BYTES, Plan(rounds=1, turn_s=turn_s), 0, clock=payloads.clock).reads


def test_turn_lasts_until_its_reads_have_taken_as_long_as_asked() -> None:
    assert reads_of_a_turn(Payloads(fill_s=0.0, read_ns=1_000_000), turn_s=0.1) == 100


def test_turn_ends_although_its_reads_take_no_time_at_all() -> None:
    payloads = Payloads(fill_s=0.5, read_ns=1)
    assert reads_of_a_turn(payloads, turn_s=0.1) == TURN_LIMIT_S / 0.5


def test_turn_has_one_batch_at_least() -> None:
    assert reads_of_a_turn(Payloads(fill_s=10 * TURN_LIMIT_S, read_ns=1), turn_s=0.1) == 1
