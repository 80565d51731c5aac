"""When a trainer is stopped by its losses, and what it reads of them in its log."""

from __future__ import annotations

import itertools
from collections.abc import MutableMapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, cast

import pytest

from tests.support.interrupts import Interrupter
from tests.support.rows import row
from tests.unit.trainer.fake_core import FakeCore
from ucxx_transport import (
    AuthenticationError,
    ChecksumError,
    ConfigError,
    DeadlineExceededError,
    PeerLostError,
    ProtocolError,
    SlotRef,
    StaleSlotError,
    TransportError,
)
from ucxx_transport.client.core import ClientCore
from ucxx_transport.schema.episode_record import EpisodeRecord
from ucxx_transport.trainer import Batch
from ucxx_transport.trainer.batch import FetchLimits
from ucxx_transport.trainer.loss_policy import AskedFor, Loss, Sources, Wanted, loss_of, record_of, sort_out
from ucxx_transport.trainer.pending import LOG_PAUSE_S, MOST_LOGGED, Fetches, PendingBatch

HERE = FakeCore.local.host_id
UNREACHABLE = PeerLostError("the address cannot be reached", reason="unreachable")


def episode(worker: str, sequence: int = 0, *, host: str = "10.77.0.1", host_id: str = "another") -> EpisodeRecord:
    ref = SlotRef(ring_id=bytes(16), ring_name="r", slot=sequence, generation=1, nbytes=1, host_id=host_id, host=host)
    return EpisodeRecord(worker_id=worker, sequence=sequence, ref=ref)


def fetches_of(core: FakeCore, unreachable_batches: int | None = None) -> Fetches:
    return Fetches(cast("ClientCore", core), FetchLimits(unreachable_batches=unreachable_batches))


class Trainer:
    """Batches of episodes whose fetch ended as was given: an error, or None for those that came."""

    def __init__(self, unreachable_batches: int | None = 3) -> None:
        self.sources = Sources(HERE, unreachable_batches)

    def batch(self, *episodes: tuple[AskedFor, TransportError | None], alone: bool = False) -> TransportError | None:
        came = [record for record, error in episodes if error is None and isinstance(record, EpisodeRecord)]
        return self.sources.problem_in(came, lost_of(episodes), alone=alone)


def lost_of(episodes: Sequence[tuple[AskedFor, TransportError | None]]) -> list[Loss]:
    _, losses = sort_out(dict(enumerate(record for record, _ in episodes if not isinstance(record, EpisodeRecord))))
    for place, (record, error) in enumerate(episodes):
        if error is not None and isinstance(record, EpisodeRecord):
            assert record.ref is not None
            losses.append(loss_of(Wanted(place, record, record.ref), error))
    return losses


def test_a_batch_that_is_lost_for_a_reason_that_cannot_heal_stops_at_once_and_names_worker_host_and_remedy() -> None:
    for error in (
        AuthenticationError("the server refused this client: wrong token; give both the same one", status="…"),
        ProtocolError("the server speaks protocol version 9, this side 4; install one release on both", version=9),
        ConfigError("this reference carries no address to read from; start the UCXXServer before writing"),
    ):
        with row(error=error.message):
            problem = Trainer().batch((episode("worker-0", 7), error), (episode("worker-0", 8), error))
            assert type(problem) is type(error)
            assert (
                problem.message
                == f"2 of 2 episodes of a batch are lost: worker 'worker-0' at 10.77.0.1: {error.message}"
            )
            assert problem.__cause__ is error
            own = {"worker": "worker-0", "host": "10.77.0.1", "sequence": 7, "lost": 2}
            assert problem.facts == {**error.facts, **own}


def test_a_record_of_another_release_stops_at_once_and_names_its_worker() -> None:
    record = record_of({**episode("worker-0", 7).to_dict(), "ucxx_transport": 99})
    problem = Trainer().batch((record, None))
    assert isinstance(problem, ProtocolError)
    assert "worker 'worker-0': an episode record of format version 99" in problem.message
    assert problem.facts["sequence"] == 7


def test_what_costs_its_episodes_alone_stops_nothing() -> None:
    wrong = AuthenticationError("wrong token")
    malformed = record_of({**episode("w").to_dict(), "more": 1})
    for batch in (
        [(episode("a"), None), (episode("b"), wrong)],
        [(episode("a"), StaleSlotError("stale"))],
        [(episode("a"), ProtocolError("the payload is not what its reference promised"))],
        [(episode("a"), ChecksumError("not the bytes that were written"))],
        [(episode("a"), PeerLostError("the source is gone", reason="removed"))],
        [(malformed, None)],
        [],
    ):
        trainer = Trainer(unreachable_batches=1)
        with row(batch=batch):
            assert [trainer.batch(*batch) for _ in range(3)] == [None] * 3


def test_a_source_that_never_answers_stops_after_so_many_batches_though_others_come() -> None:
    for error in (UNREACHABLE, DeadlineExceededError("the payload did not arrive in time")):
        trainer = Trainer()
        batch = [(episode("a"), None), (episode("b", 5), error), (episode("b", 6), error)]
        with row(error=error.message):
            for _ in range(2):  # once more, after as many again
                assert [trainer.batch(*batch), trainer.batch(batch[0]), trainer.batch(*batch)] == [None] * 3
                problem = trainer.batch(*batch)
                assert type(problem) is type(error)
                assert problem.message.startswith("nothing came in 3 batches in a row: worker 'b' at 10.77.0.1: ")
                assert error.message in problem.message
                assert (problem.facts["lost"], problem.facts["sequence"]) == (2, 5)


def test_a_source_that_has_answered_before_may_die_as_long_as_others_go_on() -> None:
    trainer = Trainer()
    dead, alive = episode("dead"), episode("alive")
    assert trainer.batch((dead, None), (alive, None)) is None
    for _ in range(5):
        assert trainer.batch((dead, UNREACHABLE), (alive, None)) is None
    lonely = [trainer.batch((dead, UNREACHABLE)) for _ in range(2)]
    lonely.append(trainer.batch((alive, None)))
    lonely += [trainer.batch((dead, UNREACHABLE)) for _ in range(2)]
    assert lonely == [None] * 5
    assert isinstance(trainer.batch((dead, UNREACHABLE)), PeerLostError)


def test_an_answer_of_any_kind_begins_the_count_again() -> None:
    trainer = Trainer()
    for answer in (None, StaleSlotError("stale"), ChecksumError("torn")):
        found = [trainer.batch((episode("a"), error)) for error in (UNREACHABLE, UNREACHABLE, answer)]
        with row(answer=answer):
            assert found == [None] * 3


def test_silence_is_never_a_reason_to_stop_where_that_is_said() -> None:
    never = Trainer(unreachable_batches=None)
    for alone in (False, True):
        assert [never.batch((episode("a"), UNREACHABLE), alone=alone) for _ in range(10)] == [None] * 10


def test_an_episode_asked_for_by_itself_is_a_batch_to_a_source_that_never_answered() -> None:
    trainer = Trainer()
    lost, other = (episode("a"), UNREACHABLE), (episode("b"), None)
    assert [trainer.batch(lost, alone=True), trainer.batch(lost, other), trainer.batch(other, alone=True)] == [None] * 3
    problem = trainer.batch(lost, alone=True)
    assert isinstance(problem, PeerLostError)
    assert problem.message.startswith("nothing came in 3 batches in a row: worker 'a' at 10.77.0.1: ")


def test_an_episode_asked_for_by_itself_stops_for_a_source_that_has_died_only_where_there_is_no_other() -> None:
    trainer = Trainer()
    dead, other = episode("dead"), episode("other")
    assert trainer.batch((dead, None), alone=True) is None
    for _ in range(2):  # once more, after as many again
        found = [trainer.batch((dead, UNREACHABLE), alone=True) for _ in range(3)]
        assert found[:2] == [None] * 2
        assert isinstance(found[2], PeerLostError)
    assert trainer.batch((other, None), alone=True) is None
    assert [trainer.batch((dead, UNREACHABLE), alone=True) for _ in range(9)] == [None] * 9
    lonely = [trainer.batch((other, UNREACHABLE)), trainer.batch((dead, UNREACHABLE), alone=True)]
    lonely += [trainer.batch((other, UNREACHABLE)) for _ in range(2)]
    assert lonely[:3] == [None] * 3
    assert isinstance(lonely[3], PeerLostError), "of which nothing came, in between neither"


def test_the_error_says_what_may_be_in_the_way() -> None:
    for host, host_id, expected in (
        ("127.0.0.1", "another", "loopback of another host? set ServerConfig(host=…)"),
        ("::1", "another", "loopback of another host?"),
        ("localhost", "another", "loopback of another host?"),
        ("10.77.0.1", "another", "a firewall? both directions must be open: docs/operations.md#firewalls"),
        ("127.0.0.1", HERE, None),
        ("10.77.0.1", HERE, None),
    ):
        with row(host=host, host_id=host_id):
            problem = Trainer(1).batch((episode("a", host=host, host_id=host_id), UNREACHABLE))
            assert problem is not None
            if expected is None:
                assert problem.message.endswith(UNREACHABLE.message)
            else:
                assert f"{UNREACHABLE.message}; {expected}" in problem.message


class Log:
    """What a trainer's log says of batches lost one after the other."""

    def __init__(self, events: list[MutableMapping[str, Any]]) -> None:
        self.core = FakeCore()
        self.events = events
        self.fetches = fetches_of(self.core)

    def lines(self, at_s: float, *losses: Loss, of: int = 8) -> list[MutableMapping[str, Any]]:
        self.core.now_s = at_s
        self.events.clear()
        records = [loss.record or ProtocolError("malformed") for loss in losses]
        records += [episode("w")] * (of - len(losses))
        asked = dict(enumerate(records))
        batch = Batch(payloads={}, losses=losses, retried=0, took_s=0.0)
        self.fetches.count(self.fetches.add(PendingBatch(self.fetches, asked, None)), batch)
        return self.events


def test_an_interrupt_anywhere_in_the_count_of_a_batch_counts_it_once_when_it_is_counted_again() -> None:
    for at in itertools.count():
        fetches = fetches_of(FakeCore(), 2)
        losses = lost_of([(episode("a"), UNREACHABLE), (episode("b"), UNREACHABLE)])
        batch = Batch(payloads={}, losses=tuple(losses), retried=0, took_s=0.0)
        asked = {0: episode("a"), 1: episode("b")}
        first, second = (fetches.add(PendingBatch(fetches, asked, None)) for _ in range(2))
        interrupter = Interrupter(at, ("ucxx_transport/trainer/",))
        with suppress(KeyboardInterrupt), interrupter:
            fetches.count(first, batch)
        fetches.count(first, batch)
        with row(where=interrupter.where):
            assert first.problem is None
            fetches.count(second, batch)
            assert isinstance(second.problem, PeerLostError)
            found = fetches.counts
            assert (found.batches, found.losses) == (2, {"unreachable": 4})
        if interrupter.where is None:
            break
    assert at > 30


@pytest.fixture
def log(log_events: list[MutableMapping[str, Any]]) -> Log:
    return Log(log_events)


def test_a_batch_has_one_line_a_reason_with_worker_host_and_sequences(log: Log) -> None:
    unreachable = lost_of([(episode("worker-0", number), UNREACHABLE) for number in range(10)])
    (stale,) = lost_of([(episode("worker-1", 3), StaleSlotError("stale slot"))])
    first, second = log.lines(0.0, *unreachable, replace(unreachable[0], record=episode("w")), stale, of=20)
    expected = {
        "event": "episodes_lost",
        "log_level": "warning",
        "lost": 11,
        "of": 20,
        "reason": "unreachable",
        "worker": "worker-0",
        "sequences": tuple(range(8)),
        "others": ("w",),
        "workers": 2,
        "host": "10.77.0.1",
        "error": str(UNREACHABLE),
        "hint": "a firewall? both directions must be open: docs/operations.md#firewalls",
        "since": 0,
    }
    assert expected.items() <= first.items()
    assert (second["lost"], second["reason"], second["worker"], second["sequences"]) == (1, "stale", "worker-1", (3,))
    assert second["hint"] is None


def test_a_reason_that_lasts_is_logged_now_and_then_with_how_many_there_were_since(log: Log) -> None:
    (loss,) = lost_of([(episode("w"), UNREACHABLE)])
    pause = int(LOG_PAUSE_S)
    logged = [(at_s, line["since"]) for at_s in range(2 * pause + 30) for line in log.lines(float(at_s), loss)]
    assert logged == [(0, 0), (pause, pause - 1), (2 * pause, pause - 1)]
    (stale,) = lost_of([(episode("w"), StaleSlotError("stale"))])
    assert [line["reason"] for line in log.lines(2 * pause + 30, loss, stale)] == ["stale"]  # another reason, at once
    assert [line["since"] for line in log.lines(9 * pause, loss)] == [30]


def test_another_worker_that_is_lost_later_is_named_at_once_and_again_when_it_had_come_meanwhile(log: Log) -> None:
    (one,) = lost_of([(episode("worker-0"), UNREACHABLE)])
    (other,) = lost_of([(episode("worker-1"), UNREACHABLE)])
    pause = int(LOG_PAUSE_S)
    said = [
        (at_s, line["worker"], line["others"], line["since"])
        for at_s in range(3 * pause)
        for line in log.lines(float(at_s), one, *([other] if at_s in {10, 11, 140} else []))
    ]
    assert said == [
        (0, "worker-0", (), 0),
        (10, "worker-1", ("worker-0",), 9),
        (pause, "worker-0", (), pause - 10),
        (2 * pause, "worker-0", (), pause - 1),
        (140, "worker-1", ("worker-0",), 19),
    ]


def test_many_workers_lost_at_once_are_one_line_that_counts_them_and_names_the_first(log: Log) -> None:
    losses = lost_of([(episode(f"worker-{number}"), UNREACHABLE) for number in range(64)])
    (line,) = log.lines(0.0, *losses, of=64)
    assert (line["lost"], line["workers"], line["worker"]) == (64, 64, "worker-0")
    assert line["others"] == tuple(f"worker-{number}" for number in range(1, MOST_LOGGED))
    assert log.lines(1.0, *losses, of=64) == []  # who was counted is none that is lost later
    (new,) = lost_of([(episode("new"), UNREACHABLE)])
    (line,) = log.lines(2.0, *losses, new, of=65)
    assert (line["worker"], line["workers"], line["since"]) == ("new", 65, 64)


def test_many_workers_lost_one_after_the_other_are_a_few_lines_in_a_while(log: Log) -> None:
    losses = lost_of([(episode(f"worker-{number}"), UNREACHABLE) for number in range(64)])
    said = [line["worker"] for loss in losses for line in log.lines(0.0, loss)]
    assert said == [f"worker-{number}" for number in range(MOST_LOGGED)]
    (line,) = log.lines(LOG_PAUSE_S, losses[63])
    assert (line["worker"], line["since"]) == ("worker-63", 64 - MOST_LOGGED)


def test_what_can_be_read_of_a_malformed_record_says_whose_it_is(log_events: list[MutableMapping[str, Any]]) -> None:
    for output, expected in (
        ({"ucxx_transport": 1, "worker_id": "worker-0", "sequence": 5}, ("worker-0", 5)),
        ({"ucxx_transport": 1, "worker_id": 3, "sequence": -1}, (None, None)),
        ({"ucxx_transport": 1, "worker_id": "x" * 1000, "sequence": 1 << 70}, ("x" * 128, None)),
        ({"ucxx_transport": 1}, (None, None)),
    ):
        with row(output=output):
            (line,) = Log(log_events).lines(0.0, *lost_of([(record_of(output), None)]))
            assert (line["reason"], line["worker"], line["sequences"][0]) == ("malformed", *expected)


def test_what_is_counted_as_a_batch_is_not_counted_as_closed_too() -> None:
    fetches = fetches_of(FakeCore(), 2)
    fetch = fetches.add(PendingBatch(fetches, {0: episode("a")}, None))
    fetches.count(fetch, Batch(payloads={}, losses=(), retried=0, took_s=0.0))
    fetches.count_closed(1, fetch=fetch)
    assert fetches.counts.losses == {}
    fetches.count_closed(1, fetch=fetches.add(PendingBatch(fetches, {0: episode("a")}, None)))
    assert fetches.counts.losses == {"closed": 1}


@pytest.mark.parametrize("comes", [True, False])
def test_a_batch_that_is_cancelled_while_it_is_taken_is_counted_as_closed_alone(comes: bool) -> None:
    fetches = fetches_of(FakeCore())
    batch = fetches.add(PendingBatch(fetches, {0: episode("a")}, None))
    batch.start() if comes else batch.fail(ValueError("not a loss of one episode"))
    count = fetches.count

    def cancel_first(*args: Any) -> bool:
        batch.cancel()  # as another thread may, from the moment that the lock is free
        return count(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fetches, "count", cancel_first)
        with pytest.raises(ConfigError, match="was taken or cancelled"):
            batch.result(0)
    counts = fetches.counts
    assert (counts.batches, counts.episodes, counts.losses) == (0, 0, {"closed": 1})
