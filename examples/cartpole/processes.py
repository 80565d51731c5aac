"""The run's processes: how they are started, stopped and found again, and the queues between them.

SIGTERM asks a child to stop, and so does its parent's death. Ctrl-C reaches the parent alone.
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.context import SpawnContext, SpawnProcess
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

from ucxx_transport.logs import log_to_stderr

__all__ = ["Seat", "StopSignals", "begin_child", "end_processes", "processes_left", "start_process"]

_RUN_VARIABLE = "DEMO_RUN_ID"
_GRACE_S = 6.0
_POLL_S = 0.02


class StopSignals:
    """Ctrl-C, SIGTERM and SIGHUP as a flag, so that no clean-up is interrupted half-way.

    Attributes:
        number: the last signal that came; None: none yet.
    """

    def __init__(self) -> None:
        self.number: int | None = None

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Catch the signals within."""

        def on_signal(number: int, _frame: object) -> None:
            self.number = number

        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before = {number: signal.signal(number, on_signal) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class Seat:
    """The queues between the trainer and the worker process on one seat.

    Other seats have queues of their own: a worker killed by SIGKILL may hold a queue's lock for ever.

    Attributes:
        records: from the worker: what `write_to_buffer` returned. The ring's slots bound their number.
        weights: to the worker: (version, parameters), the newest alone.
    """

    def __init__(self, context: SpawnContext) -> None:
        self.records: Queue[dict[str, Any]] = context.Queue()
        self.weights: Queue[tuple[int, list[Any]]] = context.Queue(1)

    def offer_weights(self, version: int, parameters: list[Any]) -> None:
        """Put weights in the place of those that were not taken yet. Never waits; the next ones follow soon."""
        with suppress(queue.Empty):
            self.weights.get_nowait()
        with suppress(queue.Full):
            self.weights.put_nowait((version, parameters))

    def close(self) -> None:
        """Close this process's ends; what was not sent yet is dropped, so that no exit waits for a reader."""
        for each in (self.records, self.weights):
            each.cancel_join_thread()
            each.close()


def start_process(context: SpawnContext, run_id: str, target: Callable[..., None], *arguments: object) -> SpawnProcess:
    """Spawn a child that is marked as the run's, and that Ctrl-C does not reach.

    Make the queues first: multiprocessing's own helper process, which they start, is then not marked.
    """
    os.environ[_RUN_VARIABLE] = run_id
    process = context.Process(target=target, args=arguments, daemon=True)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return process


def begin_child(parent_pid: int, log: Path) -> threading.Event:
    """Make this process a child that stops when asked, or when its parent dies; call it first.

    Args:
        parent_pid: the process that started this one.
        log: file that its output is appended to, with UCX's messages and those of its server process.

    Returns:
        Set when this process is to stop. It is killed where it has not stopped `_GRACE_S` after its parent's death.
    """
    with log.open("ab") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    log_to_stderr(f"demo worker {os.getpid()}", logging.WARNING)
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())

    def watch_parent() -> None:
        while os.getppid() == parent_pid:
            time.sleep(0.5)
        stop.set()
        time.sleep(_GRACE_S)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch_parent, name="parent watch", daemon=True).start()
    return stop


def end_processes(processes: Sequence[SpawnProcess], *, limit_s: float) -> int:
    """Ask by SIGTERM, wait at most `limit_s`, and kill what is left; returns how many had to be killed."""
    for process in processes:
        process.terminate()
    deadline_s = time.monotonic() + limit_s
    for process in processes:
        process.join(max(0.0, deadline_s - time.monotonic()))
    late = [process for process in processes if process.is_alive()]
    for process in late:
        process.kill()
        process.join(limit_s)
    return len(late)


def processes_left(run_id: str, *, limit_s: float) -> list[int]:
    """Pids of the run's processes, children's children included, that still live after `limit_s`. Not this one."""
    mark = f"{_RUN_VARIABLE}={run_id}".encode()
    deadline_s = time.monotonic() + limit_s
    while True:
        left = [pid for pid in map(int, filter(str.isdecimal, os.listdir("/proc"))) if mark in _environment_of(pid)]
        if not left or time.monotonic() >= deadline_s:
            return left
        time.sleep(_POLL_S)


def _environment_of(pid: int) -> list[bytes]:
    """What a process was started with; nothing of one that has ended, or is another user's."""
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []
