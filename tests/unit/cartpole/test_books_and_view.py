from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from cartpole.books import Books, KillRecord, SeatBook
from cartpole.chart import block_chart, means_over_time
from cartpole.environment import EnvironmentFacts
from cartpole.features import FeatureMap
from cartpole.messages import FinishedEpisode, SeatOrder, TrainerStatus, WorkerStatus
from cartpole.plan import DemoPlan
from cartpole.report import Leftovers, RunEnd, print_report, summarise
from cartpole.sizing import plan_ring_size
from cartpole.view import LineView, LiveView
from ucxx_transport.errors import ConfigError

_FACTS = EnvironmentFacts(
    env_id="CartPole-v1",
    features=FeatureMap(kind="vector", shape=(4,)),
    observation_dtype="float32",
    actions=2,
    first_action=0,
    max_steps=500,
)
_END = RunEnd(
    reason="goal", failure="", elapsed_s=30.0, leftovers=Leftovers(segments=[], processes=[]), curve="/tmp/curve.png"
)


def _plan(**changes: object) -> DemoPlan:
    plan = DemoPlan(
        run_id="00",
        facts=_FACTS,
        size=plan_ring_size(_FACTS, slots=None, slot_bytes=None),
        workers=2,
        ports=2,
        local="mixed",
        shm_lanes=False,
        seconds=60.0,
        episodes=None,
        goal=450.0,
        kill=True,
        store=None,
        seed=0,
        out=Path("/tmp/curve.png"),
        log=Path("/tmp/curve.log"),
    )
    return replace(plan, **changes)  # type: ignore[arg-type]  # its own fields


def _books() -> Books:
    books = Books()
    for seat, worker in ((0, 0), (1, 1), (2, 1)):
        books.seats[seat] = SeatBook(seat=seat, worker=worker, pid=100 + seat, way="in place")
    books.kill = KillRecord(at_s=9.0, episode=20, worker=1, pid=101, seat=1, replacement_seat=2, replacement_pid=102)
    books.note(9.0, "worker 1 (pid 101) killed by SIGKILL")
    finished = tuple(
        FinishedEpisode(at_s=float(index), total_reward=400.0 + 2 * index, seat=2 * (index % 2), steps=400)
        for index in range(60)
    )
    way = {"reads": 60, "bytes": 600_000, "busy_s": 0.1, "p50_us": 30.0, "p95_us": 40.0, "p99_us": 50.0}
    status = TrainerStatus(
        pid=99,
        episodes=60,
        steps=24_000,
        payload_bytes=600_000,
        first_s=0.0,
        last_s=59.0,
        finished=finished,
        ways={"view": way},
        seat_transports={0: "view", 2: "ucx"},
        lost={"stale": 1, "unreachable": 2},
        retried=3,
        verified=60,
        clients={"retries": 4},
        ucx_lanes=("tcp",),
    )
    books.hear_trainer(TrainerStatus.from_bytes(status.to_bytes()), 59.0)
    books.hear_worker(0, WorkerStatus(pid=100, state="running", ring={"committed": 61, "overwritten": 0}))
    return books


def test_messages_survive_the_way_to_bytes_and_back() -> None:
    order = SeatOrder(seat=3, worker=1, occupied=True)
    assert SeatOrder.from_bytes(order.to_bytes()) == order
    status = TrainerStatus(pid=1, finished=[FinishedEpisode(at_s=1.5, total_reward=2.0, seat=0, steps=3)])
    assert TrainerStatus.from_bytes(status.to_bytes()).finished == status.finished


def test_books_know_the_window_and_who_delivered() -> None:
    books = _books()
    assert books.window_mean == pytest.approx(sum(400.0 + 2 * index for index in range(10, 60)) / 50)
    assert books.replacement_episodes == 30
    assert books.rates() == (0.0, 0.0)


def test_a_killed_worker_stays_killed_whatever_it_reported_before() -> None:
    books = _books()
    books.seats[1].state = "killed"
    books.bury(1, {"committed": 9})
    books.hear_worker(1, WorkerStatus(pid=101, state="running", ring={"committed": 7}))
    assert books.seats[1].state == "killed"
    assert books.ring_totals()["committed"] == 61 + 9


def test_a_good_end_is_ok_and_json_safe() -> None:
    summary = summarise(_plan(), _books(), _END)
    assert summary["ok"]
    assert summary["counts"]["retried"] == 7
    assert summary["counts"]["stale"] == 1
    assert summary["reads"]["view"]["gb_per_s"] == pytest.approx(0.006)
    assert json.loads(json.dumps(summary))["episodes"] == 60


@pytest.mark.parametrize(
    ("end", "words"),
    [
        (replace(_END, reason="time"), "the goal of 450 was not reached within 60 s"),
        (replace(_END, reason="interrupted"), "interrupted after 30 s"),
        (replace(_END, reason="failed", failure="the trainer ended: oops"), "the trainer ended: oops"),
        (replace(_END, leftovers=Leftovers(segments=["a"], processes=[])), "segments left in /dev/shm: a"),
        (replace(_END, leftovers=Leftovers(segments=[], processes=[7])), "processes left: 7"),
    ],
)
def test_what_is_missing_is_said(end: RunEnd, words: str) -> None:
    summary = summarise(_plan(), _books(), end)
    assert not summary["ok"]
    assert any(words in problem for problem in summary["problems"])


def test_an_episode_that_is_not_byte_exact_is_a_failure() -> None:
    books = _books()
    assert books.trainer is not None
    books.trainer = replace(books.trainer, mismatched=1)
    assert summarise(_plan(), books, _END)["problems"] == ["1 episodes were not byte-exact"]


class _Scene:
    def __init__(self, books: Books) -> None:
        self.plan = _plan()
        self.books = books
        self.elapsed_s = 12.0


def test_views_and_report_draw_from_the_first_moment_to_the_last() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=110)
    for books in (Books(), _books()):
        with LiveView(console) as live:
            live.show(_Scene(books))
        with LineView(console) as lines:
            lines.show(_Scene(books))
        print_report(console, summarise(_plan(), books, _END))
    text = out.getvalue()
    for words in ("CartPole-v1", "killed by SIGKILL", "checksum verified", "segments left", "2 unreachable"):
        assert words in text


def test_the_chart_fills_columns_from_the_bottom() -> None:
    assert block_chart([0.0, 0.5, 1.0, 2.0], height=2, low=0.0, high=1.0) == ["  ██", " ███"]
    assert block_chart([0.25], height=1, low=0.0, high=1.0) == ["▂"]


def test_means_over_time_fill_a_silent_span_with_the_mean_before_it() -> None:
    points = [(10.0, 1.0), (10.5, 3.0), (13.0, 5.0), (14.0, 7.0)]
    assert means_over_time(points, 4) == [2.0, 2.0, 2.0, 6.0]
    assert means_over_time([(3.0, 9.0)], 2) == [9.0, 9.0]
    assert means_over_time([], 5) == []


def test_sizes_follow_the_environment() -> None:
    small = plan_ring_size(_FACTS, slots=None, slot_bytes=None)
    assert (small.max_steps, small.slots, small.lanes) == (500, 32, 8)
    frames = replace(
        _FACTS, features=FeatureMap(kind="image", shape=(210, 160, 3)), observation_dtype="uint8", max_steps=100_000
    )
    large = plan_ring_size(frames, slots=None, slot_bytes=None)
    assert large.slot_bytes <= 128 << 20
    assert large.max_steps > 1300
    assert (large.slots, large.lanes) == (8, 1)


def test_a_slot_smaller_than_one_step_is_refused_with_the_size_needed() -> None:
    with pytest.raises(ConfigError, match="an episode of one step takes"):
        plan_ring_size(_FACTS, slots=None, slot_bytes=64)


def test_given_sizes_win() -> None:
    size = plan_ring_size(_FACTS, slots=5, slot_bytes=4096)
    assert size.slots == 5
    assert size.slot_bytes <= 4096
    assert size.max_steps < 500


def test_every_second_worker_is_read_over_ucx_unless_told() -> None:
    assert [_plan().local_of(worker) for worker in range(3)] == ["auto", "off", "auto"]
    assert [_plan(local="copy").local_of(worker) for worker in range(2)] == ["copy", "copy"]
