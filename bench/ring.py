"""What do the ring's own calls cost? Writes, reads in place, and the forms of references and records; no server.

Each figure is the least of many short samples, taken in turn with samples of an empty function call.
"""

from __future__ import annotations

import random
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, Final

import numpy as np

from bench.core.figures import Row
from bench.core.host import call_ns
from bench.core.rounds import Plan
from ucxx_transport.config import RingConfig
from ucxx_transport.ring import SharedRingBuffer
from ucxx_transport.ring.leases import Hold
from ucxx_transport.schema import Schema, SlotRef, TensorSpec
from ucxx_transport.schema.episode_record import EpisodeRecord, RewardSummary
from ucxx_transport.schema.slot_ref import renumbered
from ucxx_transport.schema.tensors import copy_fields

__all__ = ["FEW", "FULL", "SCATTERED", "measure"]

PAYLOAD_BYTES: Final = 4096
SLOTS: Final = 8
MANY_SLOTS: Final = 65536
CALLS_A_SAMPLE: Final = 300
SAMPLES_A_ROUND: Final = 40

FEW: Final = "write into 8 slots, full"
FULL: Final = "write into 65,536 slots, full"
SCATTERED: Final = "write into 65,536 slots, scattered free ones"

Sample = Callable[[], float]
"""Seconds that one of it took, on average over a sample."""


def measure(question: str, plan: Plan) -> list[Row]:
    """All calls: `us`, and `call_ns` of the same moments."""
    with ExitStack() as stack:
        subjects = list(_subjects(stack))
        figures: dict[str, dict[str, list[float]]] = {what: {"us": [], "call_ns": []} for what, _ in subjects}
        for number in range(plan.rounds):
            least_ns, least = float("inf"), [float("inf")] * len(subjects)
            for _ in range(SAMPLES_A_ROUND):
                least_ns = min(least_ns, call_ns())
                least = [min(best, sample()) for best, (_, sample) in zip(least, subjects, strict=True)]
            for (what, _), second in zip(subjects, least, strict=True):
                figures[what]["us"].append(second * 1e6)
                figures[what]["call_ns"].append(least_ns)
            plan.on_turn(f"{question}: round {number + 1} of {plan.rounds}")
    return [Row(question=question, case="", subject=what, figures=of) for what, of in figures.items()]


def _repeated(call: Callable[[], object]) -> Sample:
    """A sample of a call that may be repeated as it is."""

    def sample() -> float:
        began = time.perf_counter()
        for _ in range(CALLS_A_SAMPLE):
            call()
        return (time.perf_counter() - began) / CALLS_A_SAMPLE

    return sample


def _subjects(stack: ExitStack) -> Iterator[tuple[str, Sample]]:
    def ring(**settings: Any) -> SharedRingBuffer:
        return stack.enter_context(SharedRingBuffer.create(RingConfig(prefault=False, **settings)))

    raw = ring(slots=SLOTS, slot_bytes=PAYLOAD_BYTES)
    raw.publish_address("10.0.0.1", range(5000, 5004))
    data = np.zeros(PAYLOAD_BYTES, np.uint8)
    yield "write_raw of 4 KiB", _repeated(lambda: raw.write_raw(data))
    fields = ring(slots=SLOTS, schema=Schema([TensorSpec("obs", (PAYLOAD_BYTES // 4,), "float32")]))
    arrays = {"obs": np.zeros(PAYLOAD_BYTES // 4, np.float32)}
    yield "write of 4 KiB, one field", _repeated(lambda: fields.write(arrays))
    yield from _parts_of_a_write(fields, arrays)
    yield "acquire and mark_consumed", _reads(ring(slots=CALLS_A_SAMPLE, slot_bytes=64))

    ref = raw.write_raw(data)
    packed = ref.to_bytes()
    yield "SlotRef.to_bytes", _repeated(ref.to_bytes)
    yield "SlotRef.from_bytes", _repeated(lambda: SlotRef.from_bytes(packed))
    rewards = RewardSummary(total=3.0, mean=1.0, least=0.0, most=2.0)
    record = EpisodeRecord(
        worker_id="worker-0", sequence=7, ref=ref, episode_length=3, rewards=rewards, policy_version=1
    )
    form = record.to_dict()
    yield "EpisodeRecord.to_dict", _repeated(record.to_dict)
    yield "EpisodeRecord.from_dict", _repeated(lambda: EpisodeRecord.from_dict(form))
    yield "of that: SlotRef.from_dict", _repeated(lambda: SlotRef.from_dict(form["ref"]))
    yield "of that: RewardSummary.from_dict", _repeated(lambda: RewardSummary.from_dict(form["rewards"]))

    few = ring(slots=SLOTS, slot_bytes=64)
    yield FEW, _writes(few)
    many = ring(slots=MANY_SLOTS, slot_bytes=64)
    for _ in range(MANY_SLOTS):
        many.write_raw(bytes(64))
    yield FULL, _writes(many)
    yield SCATTERED, _scattered(ring(slots=MANY_SLOTS, slot_bytes=64))


def _writes(ring: SharedRingBuffer) -> Sample:
    """Writes, whose references are kept for a sample, as in `_scattered`."""
    return lambda: _timed_writes(ring)[0]


def _timed_writes(ring: SharedRingBuffer) -> tuple[float, list[SlotRef]]:
    small = bytes(64)
    began = time.perf_counter()
    made = [ring.write_raw(small) for _ in range(CALLS_A_SAMPLE)]
    return (time.perf_counter() - began) / CALLS_A_SAMPLE, made


def _parts_of_a_write(ring: SharedRingBuffer, arrays: dict[str, Any]) -> Iterator[tuple[str, Sample]]:
    schema, transitions, target = ring.schema, ring.transitions, np.zeros_like(arrays["obs"])
    words, common = Hold(transitions).words, (ring.ring_id, ring.name, "host", None, (), ring.fingerprint)
    assert schema is not None
    yield "of that: Schema.arrange", _repeated(lambda: schema.arrange(arrays))
    yield "of that: the copy, one field", _repeated(lambda: copy_fields([target], [arrays["obs"]]))
    yield "of that: its reference", _repeated(lambda: renumbered(common, 1, 2, PAYLOAD_BYTES, None, None))

    def transit() -> None:
        transitions.reserve(words, overwrites=True)
        transitions.commit(words, 1)

    yield "of that: reserve and commit, in C", _repeated(transit)


def _reads(ring: SharedRingBuffer) -> Sample:
    def sample() -> float:
        refs = [ring.write_raw(b"x") for _ in range(CALLS_A_SAMPLE)]
        began = time.perf_counter()
        for ref in refs:
            ring.acquire(ref).mark_consumed()
        return (time.perf_counter() - began) / CALLS_A_SAMPLE

    return sample


def _scattered(ring: SharedRingBuffer) -> Sample:
    """Generations are kept, no references: the holes that 65,536 leave in Python's memory cost as much as the ring."""
    first = ring.write_raw(bytes(64))
    generations = array("Q", [first.generation, *(ring.write_raw(bytes(64)).generation for _ in range(MANY_SLOTS - 1))])
    choose = random.Random(1)  # noqa: S311 - it protects nothing

    def sample() -> float:
        for slot in choose.sample(range(MANY_SLOTS), CALLS_A_SAMPLE):
            ring.discard(replace(first, slot=slot, generation=generations[slot]))
        took_s, made = _timed_writes(ring)
        for ref in made:
            generations[ref.slot] = ref.generation
        return took_s

    return sample
