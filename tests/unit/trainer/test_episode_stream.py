from __future__ import annotations

import gc
import itertools
import os
import queue
import sys
import threading
from collections.abc import Iterator, MutableMapping
from typing import Any

import pytest

from tests.support.local_worker import LocalWorker, silence
from tests.support.rows import row
from tests.support.waiting import wait_until
from ucxx_transport import ClientConfig, ConfigError, PeerLostError, SlotState
from ucxx_transport.testing import Faults, MemoryNetwork
from ucxx_transport.trainer import EpisodeStream, Loss, LossReason, RolloutFeed

LOCAL = ClientConfig(local="view")


def number_in(arrays: Any) -> int:
    return int.from_bytes(arrays["data"].tobytes(), "little")


def wait_until_held(worker: LocalWorker, count: int) -> None:
    wait_until(lambda: worker.ring.slot_states().count(SlotState.READING) == count, what=f"{count} slots are held")


def test_episodes_come_in_the_order_of_their_references(worker: LocalWorker) -> None:
    first, second, third = worker.play(3)
    with EpisodeStream([first, second.to_dict(), third.ref], LOCAL, ahead=2) as stream:
        found = [(episode.record.sequence, number_in(episode.arrays)) for episode in stream]
        assert found[:2] == [(0, 0), (1, 1)]
        assert found[2][1] == 2
        assert list(stream) == []  # it stays at its end
        assert stream.statistics().episodes == 3
    gc.collect()
    assert worker.ring.slot_states() == [SlotState.FREE] * 32


def test_a_reference_is_read_before_the_next_is_asked_for(worker: LocalWorker) -> None:
    def references() -> Iterator[object]:
        reused: dict[str, object] = {}
        for record in worker.play(3):
            reused.update(record.to_dict())
            yield reused
            reused.clear()

    with EpisodeStream(references(), LOCAL) as stream:
        assert [episode.record.sequence for episode in stream] == [0, 1, 2]


def test_no_more_episodes_are_held_than_was_asked_for(worker: LocalWorker) -> None:
    taken = itertools.count()

    def references() -> Iterator[object]:
        for record in worker.play(20):
            next(taken)
            yield record

    with EpisodeStream(references(), LOCAL, ahead=3) as stream:
        held = []
        for expected in (3, 4, 5):
            wait_until_held(worker, expected)
            held.append(next(stream))
        assert next(taken) <= 3 + 3 + 1  # the next reference is taken, and waits for its turn
        assert [number_in(episode.arrays) for episode in held] == [0, 1, 2]


def test_an_episode_is_handed_out_before_the_next_reference_comes(worker: LocalWorker) -> None:
    records: queue.Queue[Any] = queue.Queue()
    with EpisodeStream(iter(records.get, None), LOCAL) as stream:
        for number in range(3):
            records.put(worker.play(1)[0])
            assert number_in(next(stream).arrays) == number
        records.put(None)
        with pytest.raises(StopIteration):
            next(stream)


def test_a_lost_episode_is_left_out_and_told_of(worker: LocalWorker) -> None:
    losses: list[Loss] = []
    first, gone, last = worker.play(3)
    assert gone.ref is not None
    worker.ring.discard(gone.ref)
    malformed = {**first.to_dict(), "sequence": -1}
    with EpisodeStream([malformed, first, gone, first, last], LOCAL, on_loss=losses.append) as stream:
        assert [number_in(episode.arrays) for episode in stream] == [0, 2]
        assert [loss.reason for loss in losses] == [LossReason.MALFORMED, LossReason.STALE, LossReason.DUPLICATE]
        assert stream.statistics().losses == {"malformed": 1, "stale": 1, "duplicate": 1}


def test_a_lost_episode_is_logged_whatever_else_is_done_about_it(
    worker: LocalWorker, log_events: list[MutableMapping[str, Any]]
) -> None:
    losses: list[Loss] = []
    for on_loss in (None, losses.append):
        for reader in (EpisodeStream, RolloutFeed):
            (gone,) = worker.play(1)
            assert gone.ref is not None
            worker.ring.discard(gone.ref)
            with row(reader=reader.__name__, on_loss=on_loss):
                if reader is EpisodeStream:
                    with EpisodeStream([gone], LOCAL, on_loss=on_loss) as stream:
                        assert list(stream) == []
                else:
                    with RolloutFeed(LOCAL, on_loss=on_loss) as feed:
                        feed.start([gone])
                        assert feed.collect() == []
                (line,) = [event for event in log_events if event["event"] == "episodes_lost"]
                assert (line["lost"], line["of"], line["reason"]) == (1, 1, "stale")
                assert (line["worker"], line["sequences"], line["since"]) == ("w", (gone.sequence,), 0)
            log_events.clear()
    assert len(losses) == 2


def test_a_stream_that_gets_nothing_stops_and_goes_on_if_it_is_asked_to(worker: LocalWorker) -> None:
    network = MemoryNetwork(faults=Faults(refuse=True))
    far_away = worker.play_far_away(9)
    stopped = []
    with EpisodeStream(
        far_away, deadline_s=2, max_fetch_rounds=1, ahead=2, unreachable_batches=2, link_factory=network.link
    ) as stream:
        for _ in range(2):
            with pytest.raises(
                PeerLostError, match=r"nothing came in 4 batches in a row: worker 'w' at 192.0.2.1"
            ) as caught:
                next(stream)
            stopped.append(caught.value.facts["sequence"])
        assert list(stream) == []
        assert stream.statistics().losses == {"unreachable": 9}
    assert stopped == [3, 7]


def test_what_the_references_raise_comes_after_the_episodes_before_it(worker: LocalWorker) -> None:
    def references() -> Iterator[object]:
        yield from worker.play(2)
        raise ZeroDivisionError

    with EpisodeStream(references(), LOCAL) as stream:
        assert [number_in(next(stream).arrays) for _ in range(2)] == [0, 1]
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                next(stream)
    with EpisodeStream(map(sys.exit, [3]), LOCAL) as stream, pytest.raises(SystemExit):
        list(stream)
    with (
        EpisodeStream([worker.play(1)[0], "text"], LOCAL) as stream,
        pytest.raises(ConfigError, match="'text' is no episode record"),
    ):
        list(stream)


def test_what_the_references_raise_does_not_grow_each_time_it_is_raised() -> None:
    def references() -> Iterator[object]:
        yield from ()
        raise ZeroDivisionError

    depths = []
    with EpisodeStream(references(), LOCAL) as stream:
        for _ in range(3):
            with pytest.raises(ZeroDivisionError) as caught:
                next(stream)
            depths.append([entry.name for entry in caught.traceback])
    assert depths[0] == depths[1] == depths[2]
    assert depths[0][-1] == "references"  # where it was raised


def test_closing_ends_who_waits_and_what_is_on_its_way(worker: LocalWorker) -> None:
    never = threading.Event()

    def references() -> Iterator[object]:
        yield from worker.play_far_away(2)
        never.wait()

    stream = EpisodeStream(references(), deadline_s=600, link_factory=silence)
    told: list[str] = []

    def take() -> None:
        try:
            next(stream)
        except ConfigError as error:
            told.append(error.message)

    waiting = threading.Thread(target=take)
    waiting.start()
    stream.close()
    stream.close()
    waiting.join()
    assert len(told) == 1
    with pytest.raises(ConfigError, match="closed"):
        next(stream)
    never.set()


def test_a_thread_that_fails_ends_who_waits(worker: LocalWorker) -> None:
    never = threading.Event()

    def references() -> Iterator[object]:
        yield from worker.play(1)
        never.wait()

    def fail() -> None:
        raise ZeroDivisionError

    with EpisodeStream(references(), LOCAL) as stream:
        next(stream)
        stream.core.reactor.submit(fail)
        with pytest.raises(ConfigError, match="closed") as caught:
            next(stream)
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
        never.set()


def test_what_was_fetched_ahead_comes_back_when_it_is_closed(worker: LocalWorker) -> None:
    with EpisodeStream(worker.play(5), LOCAL, ahead=5) as stream:
        wait_until_held(worker, 5)
        assert number_in(next(stream).arrays) == 0
    gc.collect()
    assert SlotState.READING not in worker.ring.slot_states()
    assert stream.statistics().losses == {"closed": 4}


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ConfigError, match="ahead"):
        EpisodeStream([], ahead=0)
    with pytest.raises(ConfigError, match="ahead must be a whole number, at least 1, not '8'"):
        EpisodeStream([], ahead="8")  # type: ignore[arg-type]  # what is refused
    with pytest.raises(ConfigError, match="device"):
        EpisodeStream([], device="tpu")
    with pytest.raises(ConfigError, match=r"Unknown setting of EpisodeStream 'ahed'; did you mean 'ahead'?"):
        EpisodeStream([], ahed=3)  # type: ignore[call-arg]  # what is refused
    with pytest.raises(ConfigError, match=r"a stream has no policy_version .*: take batches of a RolloutFeed"):
        EpisodeStream([], max_staleness=1)
    with EpisodeStream([], LOCAL, max_staleness=None) as stream:
        assert list(stream) == []


def test_a_forked_child_is_refused_at_once(worker: LocalWorker) -> None:
    with EpisodeStream(worker.play(3), LOCAL, ahead=1) as stream:
        assert next(stream).record.sequence == 0
        child = os.fork()
        if child == 0:
            try:
                next(stream)
            except ConfigError as error:
                os._exit(3 if "forked" in error.message else 4)
            os._exit(5)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
        assert [episode.record.sequence for episode in stream] == [1, 2]
