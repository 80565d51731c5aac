"""When to kill a worker and when to stop: a decision, made anew at every look. It does nothing itself.

| stop reason | when                                                                            |
|-------------|---------------------------------------------------------------------------------|
| goal        | the window's mean reached the goal (and the replacement of the killed one delivers) |
| episodes    | so many were delivered (and the replacement of the killed one delivers)          |
| time        | the time limit                                                                  |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["WINDOW", "Decision", "Limits", "Situation", "StopReason", "decide"]

WINDOW = 50
"""Episodes that the mean return is taken over."""

StopReason = Literal["goal", "episodes", "time"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the run was asked for; None: no such limit."""

    goal: float | None
    episodes: int | None
    seconds: float
    kill: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """How the run stands.

    Attributes:
        elapsed_s: since the run's start.
        episodes: delivered to the trainer.
        window_mean: mean return of the last `WINDOW` episodes, None before there are so many.
        all_deliver: every worker has delivered an episode.
        killed: one worker was killed already.
        replacement_episodes: delivered by the worker that took its place.
    """

    elapsed_s: float
    episodes: int
    window_mean: float | None
    all_deliver: bool
    killed: bool
    replacement_episodes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What to do now."""

    kill: bool
    stop: StopReason | None


def decide(limits: Limits, situation: Situation) -> Decision:
    """Say what the situation calls for."""
    if situation.elapsed_s >= limits.seconds:
        return Decision(kill=False, stop="time")
    reached = _reached(limits, situation)
    shown = not limits.kill or situation.replacement_episodes > 0
    kill = limits.kill and not situation.killed and situation.episodes > 0 and _half_way(limits, situation)
    return Decision(kill=kill, stop=reached if shown else None)


def _reached(limits: Limits, situation: Situation) -> StopReason | None:
    if limits.goal is not None and situation.window_mean is not None and situation.window_mean >= limits.goal:
        return "goal"
    if limits.episodes is not None and situation.episodes >= limits.episodes:
        return "episodes"
    return None


def _half_way(limits: Limits, situation: Situation) -> bool:
    """Half of whichever limit comes first; before half the time only when no worker is still starting."""
    if 2.0 * situation.elapsed_s >= limits.seconds:
        return True
    if not situation.all_deliver:
        return False
    if limits.episodes is not None and 2 * situation.episodes >= limits.episodes:
        return True
    mean = situation.window_mean
    return limits.goal is not None and mean is not None and mean >= limits.goal / 2.0
