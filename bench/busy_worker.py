"""What does a worker whose main thread spins in Python cost its readers? The added p50 of a 64 KiB read."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, Literal

from bench.core.control import ControlledProcess
from bench.core.results import Spread
from bench.core.ring_source import SourceSettings, run_ring_source
from bench.core.rounds import Lane, Plan, ProcessSource, open_sources, take_turn
from bench.core.subjects import TCP_SUBJECTS
from bench.core.transport_reader import run_transport_reader_async

__all__ = ["BusyWorker", "measure_busy_worker"]

SIZE_BYTES: Final = 64 * 1024
MAX_SLOTS: Final = 32
"""A server in a thread of a worker that spins takes 80 ms a read: a turn reads all slots twice, and is to end."""

ASYNC_TCP: Final = next(subject for subject in TCP_SUBJECTS if subject.client == "async")


@dataclass(frozen=True, slots=True, kw_only=True)
class BusyWorker:
    """UCX over TCP, async client.

    Attributes:
        mode: where the server runs.
        size_bytes: of every payload.
        quiet_p50_us: with a worker that waits.
        spinning_p50_us: with a worker whose main thread spins in Python.
        added_p50_us: their difference, round by round.
    """

    mode: Literal["process", "thread"]
    size_bytes: int
    quiet_p50_us: Spread
    spinning_p50_us: Spread
    added_p50_us: Spread

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def measure_busy_worker(mode: Literal["process", "thread"], plan: Plan) -> BusyWorker:
    """Alternate quiet and spinning turns."""
    plan = replace(plan, max_slots=min(plan.max_slots, MAX_SLOTS))
    quiet_us, spinning_us = [], []
    with ExitStack() as stack:
        source = stack.enter_context(ControlledProcess("busy worker", run_ring_source, SourceSettings(mode=mode)))
        reader = stack.enter_context(ControlledProcess("its reader", run_transport_reader_async))
        lane = Lane(ASYNC_TCP, ProcessSource(source), reader)
        open_sources([lane], SIZE_BYTES, plan)
        for number in range(plan.rounds):
            quiet_us.append(take_turn(lane, SIZE_BYTES, plan, number).p50_us)
            source.call("spin", on=True)
            spinning_us.append(take_turn(lane, SIZE_BYTES, plan, number).p50_us)
            source.call("spin", on=False)
    added_us = [spinning - quiet for spinning, quiet in zip(spinning_us, quiet_us, strict=True)]
    return BusyWorker(
        mode=mode,
        size_bytes=SIZE_BYTES,
        quiet_p50_us=Spread.of(quiet_us),
        spinning_p50_us=Spread.of(spinning_us),
        added_p50_us=Spread.of(added_us),
    )
