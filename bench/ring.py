"""What do the ring's own calls cost? Writes, reads in place, and the forms of references and records; no server.

Each figure is the least of many short samples, taken in turn with samples of an empty function call and of a copy of
4 KiB. Targets are stated for a machine whose call takes 70 ns, and scaled by what the call takes here.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Final

import numpy as np

from ucxx_transport.config import RingConfig
from ucxx_transport.ring import SharedRingBuffer
from ucxx_transport.schema import Schema, SlotRef, TensorSpec
from ucxx_transport.schema.episode_record import EpisodeRecord, RewardSummary

__all__ = ["Figure", "measure"]

CALL_NS: Final = 70.0
"""What an empty call takes where the targets in microseconds hold."""

PAYLOAD_BYTES: Final = 4096
SLOTS: Final = 8
MANY_SLOTS: Final = 65536
MANY_RATIO: Final = 1.5
CALLS_A_SAMPLE: Final = 300
EMPTY_CALLS: Final = 5000


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One call.

    Attributes:
        what: in words.
        us: microseconds here.
        calls: in empty calls.
        copies: in copies of 4 KiB.
        scaled_us: microseconds where a call takes 70 ns.
        bound_us: the most that these may be; None without a target.
    """

    what: str
    us: float
    calls: float
    copies: float
    scaled_us: float
    bound_us: float | None

    @property
    def meets(self) -> bool:
        """Whether it is within its bound."""
        return self.bound_us is None or self.scaled_us <= self.bound_us


Sample = Callable[[], float]
"""Seconds that one of it took, on average over a sample."""


def repeated(call: Callable[[], object], number: int = CALLS_A_SAMPLE) -> Sample:
    """A sample of a call that may be repeated as it is."""

    def sample() -> float:
        began = time.perf_counter()
        for _ in range(number):
            call()
        return (time.perf_counter() - began) / number

    return sample


def in_turn(samples: Sequence[Sample], rounds: int) -> list[float]:
    """The least of each over the rounds, in seconds."""
    least = [float("inf")] * len(samples)
    for _ in range(rounds):
        least = [min(best, sample()) for best, sample in zip(least, samples, strict=True)]
    return least


def empty() -> None:
    """Nothing."""


def measure(rounds: int) -> list[Figure]:
    """All figures.

    Args:
        rounds: samples of each.
    """
    source, target = np.zeros(PAYLOAD_BYTES, np.uint8), np.empty(PAYLOAD_BYTES, np.uint8)
    with ExitStack() as stack:
        subjects = list(_subjects(stack))
        samples = [repeated(empty, EMPTY_CALLS), repeated(lambda: np.copyto(target, source))]
        call_s, copy_s, *seconds = in_turn([*samples, *(sample for _, sample, _ in subjects)], rounds)
    figures = []
    of_few_us = 0.0
    for (what, _, target_us), second in zip(subjects, seconds, strict=True):
        bound = target_us
        scaled_us = second / call_s * CALL_NS / 1e3
        if what.startswith("write into 8"):
            of_few_us = scaled_us
        elif what.startswith("write into"):
            bound = MANY_RATIO * of_few_us
        figures.append(
            Figure(
                what=what,
                us=second * 1e6,
                calls=second / call_s,
                copies=second / copy_s,
                scaled_us=scaled_us,
                bound_us=bound,
            )
        )
    return figures


def _subjects(stack: ExitStack) -> Iterator[tuple[str, Sample, float | None]]:
    def ring(**settings: object) -> SharedRingBuffer:
        made = SharedRingBuffer.create(RingConfig(prefault=False, **settings))  # type: ignore[arg-type]
        return stack.enter_context(made)

    raw = ring(slots=SLOTS, slot_bytes=PAYLOAD_BYTES)
    raw.publish_address("10.0.0.1", range(5000, 5004))
    data = np.zeros(PAYLOAD_BYTES, np.uint8)
    yield "write_raw of 4 KiB", repeated(lambda: raw.write_raw(data)), 10.0
    fields = ring(slots=SLOTS, schema=Schema([TensorSpec("obs", (PAYLOAD_BYTES // 4,), "float32")]))
    arrays = {"obs": np.zeros(PAYLOAD_BYTES // 4, np.float32)}
    yield "write of 4 KiB, one field", repeated(lambda: fields.write(arrays)), 10.0
    yield "acquire and mark_consumed", _reads(ring(slots=CALLS_A_SAMPLE, slot_bytes=64)), 6.0

    ref = raw.write_raw(data)
    packed = ref.to_bytes()
    yield "SlotRef.to_bytes", repeated(ref.to_bytes), 3.0
    yield "SlotRef.from_bytes", repeated(lambda: SlotRef.from_bytes(packed)), 5.0
    rewards = RewardSummary(total=3.0, mean=1.0, least=0.0, most=2.0)
    record = EpisodeRecord(
        worker_id="worker-0", sequence=7, ref=ref, episode_length=3, rewards=rewards, policy_version=1
    )
    form = record.to_dict()
    yield "EpisodeRecord.to_dict", repeated(record.to_dict), 3.0
    yield "EpisodeRecord.from_dict", repeated(lambda: EpisodeRecord.from_dict(form)), 5.0

    small = bytes(64)
    few = ring(slots=SLOTS, slot_bytes=64)
    yield "write into 8 slots, full", repeated(lambda: few.write_raw(small)), None
    many = ring(slots=MANY_SLOTS, slot_bytes=64)
    for _ in range(MANY_SLOTS):
        many.write_raw(small)
    yield "write into 65,536 slots, full", repeated(lambda: many.write_raw(small)), None
    yield "write into 65,536 slots, scattered free ones", _scattered(ring(slots=MANY_SLOTS, slot_bytes=64)), None


def _reads(ring: SharedRingBuffer) -> Sample:
    def sample() -> float:
        refs = [ring.write_raw(b"x") for _ in range(CALLS_A_SAMPLE)]
        began = time.perf_counter()
        for ref in refs:
            ring.acquire(ref).mark_consumed()
        return (time.perf_counter() - began) / CALLS_A_SAMPLE

    return sample


def _scattered(ring: SharedRingBuffer) -> Sample:
    refs = [ring.write_raw(bytes(64)) for _ in range(MANY_SLOTS)]
    choose = random.Random(1)  # noqa: S311 - it protects nothing

    def sample() -> float:
        chosen = choose.sample(range(MANY_SLOTS), CALLS_A_SAMPLE)
        for slot in chosen:
            ring.discard(refs[slot])
        small = bytes(64)
        began = time.perf_counter()
        made = [ring.write_raw(small) for _ in range(CALLS_A_SAMPLE)]
        took_s = time.perf_counter() - began
        for ref in made:
            refs[ref.slot] = ref
        return took_s / CALLS_A_SAMPLE

    return sample


def main(words: Sequence[str] | None = None) -> int:
    """Measure and print; the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=200, help="samples of each call")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--check", action="store_true", help="exit 1 unless every target is met")
    chosen = parser.parse_args(words)
    figures = measure(chosen.rounds)
    if chosen.json:
        print(json.dumps([{**asdict(figure), "meets": figure.meets} for figure in figures], indent=2))
    else:
        print(f"{'':46}{'µs here':>9}{'calls':>8}{'copies':>8}{'µs at 70 ns':>13}{'target':>9}")
        for one in figures:
            bound = "" if one.bound_us is None else f"≤ {one.bound_us:.1f}{'' if one.meets else ' !'}"
            print(f"{one.what:46}{one.us:9.2f}{one.calls:8.0f}{one.copies:8.1f}{one.scaled_us:13.2f}{bound:>9}")
    return int(chosen.check and not all(figure.meets for figure in figures))


if __name__ == "__main__":
    sys.exit(main())
