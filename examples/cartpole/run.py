"""One run from its first process to its report; the order of things at the end matters."""

from __future__ import annotations

from rich.console import Console

from cartpole.curve import draw_curve
from cartpole.leftovers import run_segments, wait_until_gone
from cartpole.orchestrator import Orchestrator
from cartpole.plan import DemoPlan
from cartpole.report import Leftovers, RunEnd, Summary, print_report, summarise
from cartpole.signals import StopSignals
from cartpole.view import open_view
from ucxx_transport.ring.orphans import sweep_orphans

__all__ = ["run_plan"]

_GONE_S = 5.0
_EXIT_FAILED = 1
_EXIT_SIGNALLED = 128


def run_plan(plan: DemoPlan, signals: StopSignals, console: Console) -> tuple[Summary, int]:
    """Carry out a plan and report on it.

    Args:
        plan: the run.
        signals: caught already; they end the run early, and cleanly.
        console: gets the live view and the report.

    Returns:
        The summary, and the exit status: 0, 1 when something asked for is missing, 128 + n after signal n.
    """
    plan.log.write_bytes(b"")
    with open_view(console) as view:
        orchestrator = Orchestrator(plan, signals, view.show)
        orchestrator.run()
    processes = wait_until_gone(plan.run_id, limit_s=_GONE_S)
    sweep_orphans()  # a killed worker's segment, where nobody has removed it yet
    leftovers = Leftovers(segments=run_segments(plan.ring_prefix), processes=processes)
    curve = str(draw_curve(plan, orchestrator.books)) if orchestrator.books.finished else None
    end = RunEnd(
        reason=orchestrator.reason,
        failure=orchestrator.failure,
        elapsed_s=orchestrator.ended_after_s,
        leftovers=leftovers,
        curve=curve,
    )
    summary = summarise(plan, orchestrator.books, end)
    print_report(console, summary)
    if plan.log.stat().st_size == 0:
        plan.log.unlink()
    elif not summary["ok"]:
        console.print(f"the processes' own words: {plan.log}", highlight=False)
    if signals.number is not None:
        return summary, _EXIT_SIGNALLED + signals.number
    return summary, 0 if summary["ok"] else _EXIT_FAILED
