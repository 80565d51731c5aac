"""The learning curve as a PNG."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cartpole.books import Books
from cartpole.director import WINDOW
from cartpole.plan import DemoPlan

__all__ = ["draw_curve"]


def draw_curve(plan: DemoPlan, books: Books) -> Path:
    """Draw the episodes' returns, their running mean, the goal and the kill; returns the file written."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    returns = np.array([episode.total_reward for episode in books.finished])
    times = np.array([episode.at_s for episode in books.finished])
    steps = np.cumsum([episode.steps for episode in books.finished])
    for seat, book in books.seats.items():
        mine = np.array([episode.seat == seat for episode in books.finished], dtype=bool)
        label = f"worker {book.worker}, pid {book.pid}, read {book.way}"
        axes.plot(times[mine], returns[mine], ".", markersize=3, alpha=0.35, label=label)
    if len(returns) >= WINDOW:
        means = np.convolve(returns, np.full(WINDOW, 1.0 / WINDOW), mode="valid")
        axes.plot(times[WINDOW - 1 :], means, color="black", linewidth=1.8, label=f"mean of {WINDOW}")
    if plan.goal is not None:
        axes.axhline(plan.goal, color="green", linestyle="--", linewidth=1, label=f"goal {plan.goal:.0f}")
    if books.kill is not None and 0 < books.kill.episode <= len(times):
        axes.axvline(times[books.kill.episode - 1], color="red", linestyle=":", label="SIGKILL")
    total = int(steps[-1]) if len(steps) else 0
    axes.set(
        title=f"{plan.facts.env_id}: {len(returns)} episodes, {total} steps, seed {plan.seed}",
        xlabel="seconds of training",
        ylabel="return of an episode",
    )
    axes.legend(loc="best", fontsize=8, markerscale=3)
    plan.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(plan.out, format="png")
    return plan.out
