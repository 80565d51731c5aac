"""Loops that a signal may interrupt, under handlers that must hear of it.

Where `while` with a condition jumps back, Python 3.12 and 3.13 have no handler: neither `except` nor `finally` nor
`with` around it in the same function sees an interrupt that comes there (python/cpython#108214). So it is a function of
its own, or `while True`, in whatever a program's main thread calls.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "ucxx_transport"
ELSEWHERE = {
    "_Waiters.wait",  # an event loop's, which makes a cancellation of a signal
    "Running.__aenter__",
    "ActorRollouts.take",  # its handler is for the end alone
    "Participant._take_part",  # threads of ours, in which no signal is handled
    "Listeners._run",
    "HeartbeatPublisher._run",
    "SourceWatcher._follow",
    "Prefetcher._run",
    "Connection.take_in",
    "Connection._hear_out",
    "PortThread._serve",
}


def uncovered(body: list[ast.stmt], *, is_handled: bool) -> Iterator[ast.While]:
    """Loops with a condition whose handler is in the same function."""
    for node in body:
        if isinstance(node, ast.While) and is_handled and not isinstance(node.test, ast.Constant):
            yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            handles = is_handled or isinstance(node, ast.With | ast.AsyncWith)
            yield from uncovered(getattr(node, "body", []), is_handled=handles or isinstance(node, ast.Try))
            for name in ("orelse", "finalbody"):
                yield from uncovered(getattr(node, name, []), is_handled=handles)
            for handler in getattr(node, "handlers", []):
                yield from uncovered(handler.body, is_handled=handles)


def functions(body: list[ast.stmt], within: str = "") -> Iterator[tuple[str, list[ast.stmt]]]:
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            name = f"{within}{node.name}"
            yield name, node.body
            yield from functions(node.body, f"{name}.")


def test_a_loop_that_an_interrupt_may_end_has_its_handlers_around_the_call_of_it() -> None:
    found = {
        name
        for path in PACKAGE.rglob("*.py")
        for name, body in functions(ast.parse(path.read_text(encoding="utf-8")).body)
        if any(uncovered(body, is_handled=False))
    }
    assert found - ELSEWHERE == set()
    assert ELSEWHERE - found == set(), "what is not there any more"
