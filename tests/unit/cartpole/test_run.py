"""The demo's decisions and its report, without a process."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from cartpole.environment import EnvironmentSpec
from cartpole.plan import Local, Plan
from cartpole.report import Episode, Kill, Results, Worker, print_summary
from cartpole.run import next_step

PLAN = Plan(
    run_id="00",
    environment=EnvironmentSpec(name="CartPole-v1", shape=(4,), dtype="float32", actions=2, max_steps=500),
    max_steps=500,
    slots=32,
    workers=2,
    ports=2,
    local="mixed",
    seconds=100.0,
    episodes=None,
    goal=450.0,
    kill=True,
    seed=0,
    store=None,
    out=Path("/tmp/curve.png"),
)


def results(plan: Plan, *, at_s: float, episodes: int, mean: float = 20.0, killed: bool = False) -> Results:
    """A run of two workers; the second one was killed and replaced half-way if `killed`."""
    run = Results(plan, elapsed_s=at_s)
    run.workers = [Worker(worker=0, pid=100, read="in place"), Worker(worker=1, pid=101, read="over UCX")]
    for index in range(episodes):
        seat = index % 2 + (killed and index % 2 and index > episodes // 2)
        if killed and index == episodes // 2:
            run.kill = Kill(at_s / 2, index, 1)
            run.workers[1].state, run.workers[1].replaced_by = "killed", 2
            run.workers.append(Worker(worker=1, pid=102, read="over UCX"))
        run.add(Episode(float(index), mean, 400, 10_000, int(seat)))
    run.trainer = {
        "updates": 40,
        "checksums": {"verified": episodes, "mismatched": 0},
        "lost": {"stale": 1, "unreachable": 2},
        "reads": [
            {
                "transport": "ucx",
                "reads": 30,
                "nbytes": 10,
                "gb_per_s": 0.1,
                "p50_s": 1e-4,
                "p95_s": 1e-4,
                "p99_s": 1e-3,
            }
        ],
    }
    return run


def decisions() -> Iterator[tuple[str, Results, str | None]]:
    of_episodes, alone = replace(PLAN, goal=None, episodes=160), replace(PLAN, kill=False)
    yield "at first", results(PLAN, at_s=3, episodes=80), None
    yield "kill at half the goal", results(PLAN, at_s=3, episodes=80, mean=225), "kill"
    yield "kill at half the time", results(PLAN, at_s=50, episodes=80), "kill"
    yield "kill at half the episodes", results(of_episodes, at_s=3, episodes=80), "kill"
    yield "no second kill", results(PLAN, at_s=50, episodes=80, killed=True), None
    yield "no kill unless asked for", results(alone, at_s=50, episodes=80), None
    yield "no kill before the first episode", results(PLAN, at_s=60, episodes=0), None
    yield "no kill while a worker is starting", results(of_episodes, at_s=3, episodes=1), None
    yield "but at half the time", results(of_episodes, at_s=51, episodes=1), "kill"
    yield "a mean of few episodes is none", results(alone, at_s=3, episodes=49, mean=500), None
    yield "goal", results(alone, at_s=3, episodes=80, mean=450), "goal"
    yield "episodes", results(replace(of_episodes, kill=False), at_s=3, episodes=160), "episodes"
    yield "time", results(alone, at_s=100, episodes=80), "time"
    waiting = results(PLAN, at_s=3, episodes=80, mean=480, killed=True)
    yield "goal, after the replacement's first episode", waiting, "goal"
    waiting = results(PLAN, at_s=3, episodes=80, mean=480, killed=True)
    waiting.workers[2].episodes = 0
    yield "not before", waiting, None
    waiting.elapsed_s = 101
    yield "the time limit does not wait", waiting, "time"
    unlimited = replace(PLAN, goal=None, kill=False)
    yield "no limit but time", results(unlimited, at_s=3, episodes=999, mean=1e9), None


def test_when_to_kill_and_when_to_stop() -> None:
    for what, situation, step in decisions():
        assert next_step(situation) == step, what


def test_what_is_missing_is_a_problem_and_what_is_not_is_none() -> None:
    good = replace(results(PLAN, at_s=30, episodes=60, mean=460, killed=True), reason="goal")
    assert good.summary()["ok"]
    wrong_bytes = {**good.trainer, "checksums": {"verified": 59, "mismatched": 1}}
    for changes, words in (
        ({"reason": "time"}, "the goal of 450 was not reached within 100 s: the mean return of the last 50 is 460"),
        ({"reason": "time", "plan": replace(PLAN, goal=None, episodes=61)}, "60 of 61 episodes within 100 s"),
        ({"reason": "time", "kill": None}, "no worker was killed and replaced in that time"),
        ({"reason": "interrupted"}, "interrupted after 30 s and 60 episodes"),
        ({"reason": "failed", "failure": "worker 0: pid 9 ended"}, "worker 0: pid 9 ended"),
        ({"trainer": wrong_bytes}, "1 episodes were not byte-exact"),
        ({"segments_left": ["a"]}, "segments left in /dev/shm: a"),
        ({"processes_left": [7]}, "processes left: 7"),
    ):
        problems = replace(good, **changes).problems()
        assert any(problem.startswith(words) for problem in problems), (words, problems)


def test_the_summary_is_json_and_knows_who_delivered_after_the_kill() -> None:
    summary = results(PLAN, at_s=30, episodes=60, killed=True).summary()
    assert json.loads(json.dumps(summary)) == summary
    assert summary["kill"] == {
        "worker": 1,
        "after_s": 15.0,
        "after_episode": 30,
        "episodes_of_others_meanwhile": 1,
        "episodes_of_its_replacement": 15,
    }


def test_tables_are_drawn_for_a_run_of_any_length() -> None:
    out = io.StringIO()
    for episodes in (0, 1, 80):
        run = replace(results(PLAN, at_s=30, episodes=episodes, killed=episodes > 1), reason="goal")
        print_summary(Console(file=out, width=110), run.summary())
    for words in (
        "CartPole-v1",
        "transport",
        "p99",
        "unreachable: 2",
        "segments left",
        "everything that was asked for",
    ):
        assert words in out.getvalue(), words


def test_every_second_worker_is_read_over_ucx_unless_asked_otherwise() -> None:
    assert [PLAN.local_of(worker) for worker in range(3)] == ["auto", "off", "auto"]
    copy: Local = "copy"
    assert [replace(PLAN, local=copy).local_of(worker) for worker in range(2)] == ["copy", "copy"]
