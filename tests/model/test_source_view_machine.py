"""A Hypothesis state machine drives a SourceView beside a plain dict: what it tells always adds up to what it knows.

The store's content changes; its changes arrive in batches, or are lost and a snapshot comes instead; it is wiped; time
passes. A *step* is one rule. A subscriber that only hears the changes knows what the view knows; once all of them have
arrived that is what the store has, and those whose grace after a wipe is not over.
"""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from tests.support.exhaustive import exhaustive
from tests.support.source_records import delete_event, entry_of, put_event, record
from ucxx_transport.membership import Batch, Event, Snapshot, SourceRecord
from ucxx_transport.membership.entries import source_key
from ucxx_transport.membership.sources import SourceChange, SourceView

STEPS_AN_EXAMPLE = 40
GRACE_S = 10.0
WORKERS = st.sampled_from(["a", "b", "c/d", "%61"])
GARBAGE = st.sampled_from([b"", b"{}", record("somebody else").to_bytes()])


class SourceViewMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.view = SourceView()
        self.heard: dict[str, SourceRecord] = {}
        self.stored: dict[str, SourceRecord | bytes] = {}
        self.on_its_way: list[tuple[str, SourceRecord | bytes | None]] = []
        self.model: dict[str, SourceRecord] = {}
        self.missing_until_s: dict[str, float] = {}
        self.epoch = 0
        self.now = 0.0

    # what happens to the store

    def write(self, worker: str, value: SourceRecord | bytes) -> None:
        self.stored[worker] = value
        self.on_its_way.append((worker, value))

    @rule(worker=WORKERS)
    def publish(self, worker: str) -> None:
        self.epoch += 1
        self.write(worker, record(worker, self.epoch))

    @rule(worker=WORKERS, ports=st.sampled_from([(1,), (2, 3)]))
    def say_otherwise(self, worker: str, ports: tuple[int, ...]) -> None:
        now = self.stored.get(worker)
        if isinstance(now, SourceRecord):
            self.write(worker, record(worker, now.epoch, ports=ports))

    @rule(worker=WORKERS, value=GARBAGE)
    def scribble(self, worker: str, value: bytes) -> None:
        self.write(worker, value)

    @rule(worker=WORKERS)
    def delete(self, worker: str) -> None:
        if self.stored.pop(worker, None) is not None:
            self.on_its_way.append((worker, None))

    # what a watcher sees of it

    @precondition(lambda self: self.on_its_way)
    @rule(count=st.integers(1, 4))
    def a_batch_arrives(self, count: int) -> None:
        part, self.on_its_way = self.on_its_way[:count], self.on_its_way[count:]
        self.hear(self.view.take_batch(Batch(revision=1, events=tuple(event_of(*change) for change in part))))
        for worker, value in part:
            if isinstance(value, SourceRecord):
                self.know(value)
            elif value is None:
                self.forget(worker)

    @rule()
    def a_snapshot_arrives(self) -> None:
        self.resync(grace_s=0.0)

    @rule()
    def the_store_is_wiped(self) -> None:
        self.stored.clear()
        self.resync(grace_s=GRACE_S)

    @rule(seconds=st.sampled_from([1.0, GRACE_S / 2, GRACE_S]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.hear(self.view.expire(self.now))
        for worker in [worker for worker, until_s in self.missing_until_s.items() if self.now >= until_s]:
            self.forget(worker)

    def resync(self, *, grace_s: float) -> None:
        self.on_its_way.clear()
        entries = [
            entry_of(value, source_key(worker)) for worker, value in sorted(self.stored.items(), key=lambda it: it[0])
        ]
        snapshot = Snapshot(revision=1, entries=tuple(entries), identity="")
        self.hear(self.view.take_snapshot(snapshot, now=self.now, grace_s=grace_s))
        for value in self.stored.values():
            if isinstance(value, SourceRecord):
                self.know(value)
        for worker in self.model.keys() - self.stored.keys():
            if grace_s:
                self.missing_until_s.setdefault(worker, self.now + grace_s)
            elif worker not in self.missing_until_s:
                self.forget(worker)

    # the model

    def know(self, source: SourceRecord) -> None:
        self.model[source.worker_id] = source
        self.missing_until_s.pop(source.worker_id, None)

    def forget(self, worker: str) -> None:
        self.model.pop(worker, None)
        self.missing_until_s.pop(worker, None)

    def hear(self, changes: list[SourceChange]) -> None:
        for change in changes:
            worker, before = change.record.worker_id, self.heard.get(change.record.worker_id)
            if change.kind == "add":
                assert before is None
            elif change.kind == "remove":
                assert before == change.record, "removed what nobody was told of"
            else:
                assert before is not None
                assert before != change.record, "no news"
                assert (before.epoch, before.ring_id) == (change.record.epoch, change.record.ring_id)
            if change.kind == "remove":
                del self.heard[worker]
            else:
                self.heard[worker] = change.record

    @invariant()
    def what_is_told_is_what_is_known(self) -> None:
        known = {source.worker_id: source for source in self.view.sources}
        assert self.heard == known == self.model

    @invariant()
    def what_is_known_is_what_is_stored(self) -> None:
        if not self.on_its_way:
            records = {worker: value for worker, value in self.stored.items() if isinstance(value, SourceRecord)}
            assert records.items() <= self.heard.items()
            assert self.heard.keys() <= self.stored.keys() | self.missing_until_s.keys()


def event_of(worker: str, value: SourceRecord | bytes | None) -> Event:
    return delete_event(worker) if value is None else put_event(value, source_key(worker))


@pytest.mark.parametrize("steps", [2000, exhaustive(10_000)])
def test_what_a_view_tells_always_adds_up_to_what_it_knows(steps: int) -> None:
    run_state_machine_as_test(
        SourceViewMachine,
        settings=settings(max_examples=steps // STEPS_AN_EXAMPLE, stateful_step_count=STEPS_AN_EXAMPLE, deadline=None),
    )
