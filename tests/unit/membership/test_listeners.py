"""Callbacks that block, wait, come back in, or take locks: what they may cost is their own news."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, MutableMapping
from typing import Any

import pytest

from tests.support.interrupts import every_point
from tests.support.memory_store import MemoryData, MemoryStore
from tests.support.rows import row
from tests.support.source_records import record
from tests.support.thread_limit import no_more_threads
from tests.support.waiting import wait_until
from ucxx_transport.client.reads import Membership
from ucxx_transport.errors import ConfigError
from ucxx_transport.membership import ReplicaMonitor, SourceRecord, SourceWatcher
from ucxx_transport.membership.entries import source_key
from ucxx_transport.membership.listeners import ADD, REMOVE, UPDATE, Listeners

MINUTE = 60.0


class Field:
    """A store with sources, the watcher that follows it, and a callback that blocks until it is released."""

    def __init__(self) -> None:
        self.data = MemoryData()
        self.store = MemoryStore(self.data)
        self.watcher = SourceWatcher(MemoryStore(self.data))
        self.is_in, self.go_on = threading.Event(), threading.Event()
        self.notes: list[str] = []

    def publish(self, worker_id: str) -> None:
        self.store.put(source_key(worker_id), record(worker_id).to_bytes())

    def end(self, worker_id: str) -> None:
        self.store.delete(source_key(worker_id))

    def known(self, *worker_ids: str) -> None:
        wait_until(lambda: [one.worker_id for one in self.watcher.sources()] == list(worker_ids), MINUTE)

    def block(self, _: object) -> None:
        self.is_in.set()
        self.go_on.wait(MINUTE)

    def end_two_during_a_callback(self) -> None:
        """Two sources end: the second one while `block` is called for the first."""
        self.watcher.start()
        self.publish("a")
        self.publish("b")
        self.known("a", "b")
        self.end("a")
        assert self.is_in.wait(MINUTE)
        self.end("b")

    def note(self, source: SourceRecord) -> None:
        self.notes.append(source.worker_id)


def is_called() -> bool:
    """Whether a listener has a thread."""
    return "ucxx-listener" in {thread.name for thread in threading.enumerate()}


def waits(field: Field) -> None:
    refused: list[ConfigError] = []

    def wait(_: SourceRecord) -> None:
        with pytest.raises(ConfigError, match=r"wait_for\(\) waits, which a callback must not") as caught:
            field.watcher.wait_for(2, MINUTE)
        refused.append(caught.value)

    field.watcher.subscribe(on_add=wait)
    field.watcher.start()
    field.publish("a")
    wait_until(lambda: refused, MINUTE)
    field.watcher.subscribe(on_add=wait)  # called in this thread, for what is known already: refused as well
    assert len(refused) == 2
    assert field.watcher.wait_for(1, MINUTE)


def reenters(field: Field) -> None:
    done = threading.Event()

    def reenter(_: SourceRecord) -> None:
        field.watcher.subscribe(on_remove=field.note, on_add=field.note)
        field.watcher.sources()
        field.watcher.statistics()
        field.watcher.stop()
        done.set()

    field.watcher.subscribe(on_add=reenter)
    field.watcher.start()
    field.publish("a")
    assert done.wait(MINUTE)
    assert field.notes == ["a"]


def blocks(field: Field) -> None:
    field.watcher.subscribe(on_remove=field.block)
    field.watcher.subscribe(on_remove=field.note)
    field.end_two_during_a_callback()
    wait_until(lambda: field.notes == ["a", "b"], MINUTE, what="another listener hears of both")
    assert field.watcher.statistics().removes == 2


def locks(field: Field) -> None:
    lock = threading.Lock()

    def take(_: SourceRecord) -> None:
        field.is_in.set()
        with lock:
            field.notes.append("got it")

    field.watcher.subscribe(on_add=take)
    field.watcher.start()
    with lock:
        field.publish("a")
        assert field.is_in.wait(MINUTE)
        field.watcher.subscribe(on_remove=field.note)()  # returns, though a callback waits for our lock
        assert field.notes == []
    wait_until(lambda: field.notes == ["got it"], MINUTE)


def reads(field: Field) -> None:
    field.watcher.subscribe(on_remove=field.block)
    client = Membership(field.watcher)
    field.end_two_during_a_callback()
    rings = {record("a").ring_id, record("b").ring_id}
    wait_until(lambda: client.gone.keys() == rings, MINUTE, what="the client knows that b is dead")
    client.close()


def counts_replicas(field: Field) -> None:
    slow = ReplicaMonitor(on_dead=field.block, feed=field.watcher)
    other = ReplicaMonitor(on_dead=lambda name: field.notes.append(str(name)), feed=field.watcher)
    field.watcher.start()
    for worker_id in ("a", "b"):
        field.publish(worker_id)
        wait_until(lambda: other.alive, MINUTE)
        field.end(worker_id)
    wait_until(lambda: field.notes == ["a", "b"], MINUTE)
    slow.close()
    other.close()


@pytest.mark.parametrize(
    "mode", [waits, reenters, blocks, locks, reads, counts_replicas], ids=lambda mode: mode.__name__
)
def test_whatever_a_callback_does_others_hear_and_the_watcher_stops(mode: Callable[[Field], None]) -> None:
    field = Field()
    try:
        mode(field)
        field.watcher.stop()  # returns, though a callback may block
        assert "ucxx-watcher" not in {thread.name for thread in threading.enumerate()}
    finally:
        field.go_on.set()


def test_what_is_no_function_is_refused_where_it_subscribes() -> None:
    listeners = Listeners[str](threading.Condition(), tuple, lambda _: None, keys={})
    with pytest.raises(ConfigError, match="on_remove must be a function, not 5"):
        listeners.subscribe({"add": print, "remove": 5})  # type: ignore[dict-item]  # what is refused


def test_a_process_exits_while_a_callback_blocks_for_ever() -> None:
    program = """if True:
        import threading
        from tests.unit.membership.test_listeners import Field
        field = Field()
        field.watcher.subscribe(on_add=lambda _: (field.is_in.set(), threading.Event().wait()))
        field.watcher.start()
        field.publish("a")
        assert field.is_in.wait(60)
    """
    assert subprocess.run([sys.executable, "-c", program], timeout=MINUTE, check=False).returncode == 0


class Heard:
    """A listener that keeps what it should know by what it heard, and can be held up."""

    def __init__(self) -> None:
        self.known: dict[str, SourceRecord] = {}
        self.free = threading.Event()
        self.calls = 0

    @property
    def callbacks(self) -> dict[str, Callable[[SourceRecord], None]]:
        return {ADD: self.add, UPDATE: self.update, REMOVE: self.remove}

    def add(self, source: SourceRecord) -> None:
        self._heard()
        assert source.worker_id not in self.known
        self.known[source.worker_id] = source

    def update(self, source: SourceRecord) -> None:
        self._heard()
        assert self.known[source.worker_id].life == source.life
        self.known[source.worker_id] = source

    def remove(self, source: SourceRecord) -> None:
        self._heard()
        assert self.known.pop(source.worker_id).life == source.life

    def _heard(self) -> None:
        self.calls += 1
        self.free.wait(MINUTE)


def test_a_listener_whose_queue_overflows_gets_the_difference_and_that_is_counted(
    log_events: list[MutableMapping[str, Any]],
) -> None:
    counts: list[str] = []
    listeners: Listeners[SourceRecord] = Listeners(
        threading.Condition(), tuple, counts.append, keys={"store": "s"}, limit=4
    )
    slow, quick = Heard(), Heard()
    quick.free.set()
    for heard in (slow, quick):
        listeners.subscribe(heard.callbacks)
    known: dict[str, SourceRecord] = {}
    for turn in range(1, 31):
        worker_id = "abcdef"[turn % 6]
        before = known.get(worker_id)
        if before is None:
            news = [(ADD, record(worker_id, turn))]
        elif turn % 4 == 0:
            news = [(REMOVE, before)]
        elif turn % 4 == 1:
            news = [(UPDATE, record(worker_id, before.epoch, ports=(turn,)))]
        else:
            news = [(REMOVE, before), (ADD, record(worker_id, turn))]
        for kind, source in news:
            if kind == REMOVE:
                del known[source.worker_id]
            else:
                known[source.worker_id] = source
        listeners.put(news)
        wait_until(lambda: quick.known == known, MINUTE, what="the quick one knows")
    wait_until(lambda: slow.calls == 1, MINUTE)
    assert {event["event"] for event in log_events} == {"listener_behind"}
    slow.free.set()
    wait_until(lambda: slow.known == known, MINUTE, what="the slow one is up to date")
    assert slow.calls < quick.calls
    assert set(counts) == {"overflows"}, "and no callback failed"
    listeners.close()


def test_news_that_are_no_state_outlast_a_full_queue() -> None:
    listeners: Listeners[SourceRecord] = Listeners(
        threading.Condition(), tuple, lambda _: None, keys={"store": "s"}, limit=2
    )
    is_in, go_on = threading.Event(), threading.Event()
    calls: list[str] = []

    def hear(kind: str) -> Callable[[SourceRecord], None]:
        def call(_: SourceRecord) -> None:
            calls.append(kind)
            is_in.set()
            go_on.wait(MINUTE)

        return call

    listeners.subscribe({kind: hear(kind) for kind in (ADD, REMOVE, "gone")})
    listeners.put([(ADD, record("a"))])
    assert is_in.wait(MINUTE)
    b = record("b")
    listeners.put([("gone", b), (ADD, b), (REMOVE, b), (REMOVE, record("a")), (ADD, record("c"))])
    go_on.set()
    wait_until(lambda: calls == [ADD, "gone", REMOVE, ADD], MINUTE, what="b, which came and went, is left out")
    listeners.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # Python itself is silent
def test_a_callback_that_exits_its_thread_keeps_no_later_news_from_being_heard() -> None:
    field = Field()

    def die(source: SourceRecord) -> None:
        field.note(source)
        raise SystemExit

    field.watcher.subscribe(on_remove=die)
    with field.watcher:
        for worker_id in ("a", "b"):
            field.publish(worker_id)
        field.known("a", "b")
        for worker_id in ("a", "b"):
            field.end(worker_id)
        wait_until(lambda: field.notes == ["a", "b"], MINUTE)


def test_an_interrupt_in_a_first_callback_ends_the_subscription_that_was_not_returned() -> None:
    field = Field()
    calls: list[str] = []

    def interrupt(source: SourceRecord) -> None:
        calls.append(source.worker_id)
        raise KeyboardInterrupt

    with field.watcher:
        field.publish("a")
        field.known("a")
        with pytest.raises(KeyboardInterrupt):
            field.watcher.subscribe(on_add=interrupt)
        field.publish("b")
        field.known("a", "b")
    assert calls == ["a"]


def test_an_interrupt_at_any_bytecode_of_a_subscription_leaves_none_that_was_not_returned() -> None:
    listeners: Listeners[SourceRecord] = Listeners(
        threading.Condition(), lambda: [record("a"), record("b")], lambda _: None, keys={"store": "s"}
    )
    calls: list[SourceRecord] = []
    returned: list[Callable[[], None]] = []
    points = 0
    for where in every_point(
        lambda: returned.append(listeners.subscribe({ADD: calls.append, UPDATE: calls.append})),
        ("membership/listeners.py",),
    ):
        with row(where=where):
            assert returned == []
            calls.clear()
            listeners.put([(UPDATE, record("a"))])
            listeners.wait_idle(MINUTE)
            assert calls == []
        points += 1
    assert points > 20
    assert len(returned) == 1
    listeners.close()


def test_who_waits_for_listeners_is_bounded_and_says_so(log_events: list[MutableMapping[str, Any]]) -> None:
    listeners: Listeners[SourceRecord] = Listeners(threading.Condition(), tuple, lambda _: None, keys={"store": "s"})
    heard = Heard()
    listeners.subscribe(heard.callbacks)
    listeners.put([(ADD, record("a")), (REMOVE, record("a"))])
    wait_until(lambda: heard.calls == 1, MINUTE)
    listeners.close(0.01)
    assert [(event["event"], event["listeners"]) for event in log_events] == [("listener_hung", 1)]
    heard.free.set()
    wait_until(lambda: not is_called(), MINUTE)
    assert heard.calls == 1, "what was closed is called no more"


def test_news_whose_thread_could_not_be_started_are_heard_with_no_further_news(
    log_events: list[MutableMapping[str, Any]],
) -> None:
    field = Field()
    came: list[SourceRecord] = []
    field.watcher.subscribe(on_add=came.append, on_remove=field.note)
    with field.watcher:
        field.publish("a")
        wait_until(lambda: came and not is_called(), MINUTE, what="the thread of the first news has ended")
        with no_more_threads():
            field.end("a")
            wait_until(lambda: log_events, MINUTE)
            assert field.notes == []
        wait_until(lambda: field.notes == ["a"], MINUTE, what="the death is heard")
    assert [(event["event"], event["log_level"]) for event in log_events] == [("listener_waits", "warning")]


def test_news_of_a_kind_that_is_not_listened_for_cost_no_thread_and_are_no_overflow(
    log_events: list[MutableMapping[str, Any]],
) -> None:
    counts: list[str] = []
    listeners: Listeners[SourceRecord] = Listeners(
        threading.Condition(), tuple, counts.append, keys={"store": "s"}, limit=2
    )
    heard: list[SourceRecord] = []
    listeners.subscribe({"gone": heard.append})
    with no_more_threads():
        listeners.put([(ADD, record(name)) for name in "abc"])
        assert not listeners.retry()
    assert (counts, log_events) == ([], [])
    listeners.put([("gone", record("a"))])
    wait_until(lambda: heard == [record("a")], MINUTE)
    listeners.close()


def test_a_retry_says_whether_a_listener_still_waits_for_its_thread() -> None:
    listeners: Listeners[SourceRecord] = Listeners(threading.Condition(), tuple, lambda _: None, keys={"store": "s"})
    heard = Heard()
    heard.free.set()
    listeners.subscribe(heard.callbacks)
    assert not listeners.retry()
    with no_more_threads():
        listeners.put([(ADD, record("a"))])
        assert listeners.retry()
    assert not listeners.retry()
    wait_until(lambda: heard.calls == 1, MINUTE)
    listeners.close()


def test_a_report_that_raises_hides_no_change_from_listeners_or_other_reports() -> None:
    field, reported = Field(), list[str]()

    def fail(_: object) -> None:
        raise LookupError

    field.watcher.subscribe(on_add=field.note, on_remove=field.note)
    field.watcher.report_to(fail)
    field.watcher.report_to(lambda change: reported.append(change.kind))
    with field.watcher:
        field.publish("a")
        wait_until(lambda: field.notes == ["a"], MINUTE)
        field.end("a")
        wait_until(lambda: field.notes == ["a", "a"], MINUTE)
        assert reported == ["add", "remove"]
        counts = field.watcher.statistics()
        assert (counts.listener_errors, counts.resyncs, counts.failures) == (2, 1, 0)
