"""Loops that a signal may interrupt, under handlers that must hear of it.

Where `while` with a condition jumps back, Python 3.12 and 3.13 have no handler: neither `except` nor `finally` nor
`with` around it in the same function sees an interrupt that comes there (python/cpython#108214). So it is a function of
its own, or `while True`, in whatever a program's main thread calls.
"""

from __future__ import annotations

import ast
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.support.fake_source import FakeSource
from tests.support.local_worker import LocalWorker, silence
from tests.support.memory_store import MemoryData, MemoryStore
from tests.support.rows import row
from tests.support.store_in_front import StoreInFront
from ucxx_transport import RingConfig, RolloutFeed, SharedRingBuffer
from ucxx_transport.machine import LOOK_S
from ucxx_transport.membership import HeartbeatPublisher, SourceWatcher

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


def test_no_wait_sleeps_so_long_that_an_interrupt_just_before_it_is_not_heard_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Python hears of a signal between two bytecodes, or where it ends a system call that has begun."""
    waits: list[float | None] = []
    plain, main = threading.Condition.wait, threading.current_thread()

    def wait(changed: threading.Condition, timeout: float | None = None) -> bool:
        if threading.current_thread() is not main:
            return plain(changed, timeout)
        waits.append(timeout)
        raise KeyboardInterrupt

    store = MemoryStore(MemoryData())
    away = StoreInFront(store)
    away.reachable = False
    config = RingConfig(slots=1, slot_bytes=64)
    with (
        SharedRingBuffer.create(config) as ring,
        RolloutFeed({"connect_timeout_s": 600}, deadline_s=600, link_factory=silence) as feed,
        SourceWatcher(store) as watcher,
        HeartbeatPublisher(away, "worker", FakeSource()) as publisher,
    ):
        feed.start(LocalWorker(ring).play_far_away(1))
        monkeypatch.setattr(threading.Condition, "wait", wait)
        for call in (feed.collect, partial(watcher.wait_for, 1, 600), partial(publisher.wait_published, 600)):
            with row(call=call), pytest.raises(KeyboardInterrupt):
                call()
        monkeypatch.undo()
    assert [timeout is not None and timeout <= LOOK_S for timeout in waits] == [True] * 3
