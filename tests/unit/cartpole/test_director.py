from __future__ import annotations

from dataclasses import replace

import pytest

from cartpole.director import Limits, Situation, StopReason, decide

_LIMITS = Limits(goal=450.0, episodes=None, seconds=100.0, kill=True)
_START = Situation(elapsed_s=3.0, episodes=80, window_mean=20.0, all_deliver=True, killed=False, replacement_episodes=0)


def test_at_first_nothing_is_to_be_done() -> None:
    decision = decide(_LIMITS, _START)
    assert (decision.kill, decision.stop) == (False, None)


@pytest.mark.parametrize(
    ("limits", "situation"),
    [
        (_LIMITS, replace(_START, window_mean=225.0)),
        (_LIMITS, replace(_START, elapsed_s=50.0)),
        (replace(_LIMITS, goal=None, episodes=160), _START),
    ],
    ids=["half the goal", "half the time", "half the episodes"],
)
def test_the_kill_comes_half_way(limits: Limits, situation: Situation) -> None:
    assert decide(limits, situation).kill
    assert not decide(limits, replace(situation, killed=True)).kill
    assert not decide(replace(limits, kill=False), situation).kill


def test_no_kill_while_a_worker_is_still_starting_unless_half_the_time_is_gone() -> None:
    starting = replace(_START, window_mean=300.0, all_deliver=False)
    assert not decide(_LIMITS, starting).kill
    assert decide(_LIMITS, replace(starting, elapsed_s=51.0)).kill


def test_no_kill_before_the_first_episode() -> None:
    assert not decide(_LIMITS, replace(_START, elapsed_s=60.0, episodes=0, window_mean=None)).kill


@pytest.mark.parametrize(
    ("limits", "situation", "reason"),
    [
        (_LIMITS, replace(_START, window_mean=450.0), "goal"),
        (replace(_LIMITS, goal=None, episodes=80), _START, "episodes"),
        (_LIMITS, replace(_START, elapsed_s=100.0), "time"),
    ],
)
def test_each_stop_reason(limits: Limits, situation: Situation, reason: StopReason) -> None:
    assert decide(replace(limits, kill=False), situation).stop == reason


def test_a_reached_goal_waits_for_the_replacement_to_deliver_but_the_time_limit_does_not() -> None:
    reached = replace(_START, window_mean=480.0, killed=True)
    assert decide(_LIMITS, reached).stop is None
    assert decide(_LIMITS, replace(reached, replacement_episodes=1)).stop == "goal"
    assert decide(_LIMITS, replace(reached, elapsed_s=101.0)).stop == "time"


def test_without_any_limit_but_time_it_runs_on() -> None:
    limits = Limits(goal=None, episodes=None, seconds=100.0, kill=False)
    assert decide(limits, replace(_START, episodes=10_000, window_mean=1e9)).stop is None
