"""Starting the run's processes and ending them, each step with a bound."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.context import SpawnContext, SpawnProcess

__all__ = ["RUN_VARIABLE", "end_processes", "start_process"]

RUN_VARIABLE = "DEMO_RUN_ID"
"""Set in the environment of every process of a run, its children's children included: how they are found again."""

# Three to five processes share the cores; BLAS threads on top of that only get in each other's way.
_ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
_POLL_S = 0.02


def start_process(
    context: SpawnContext, name: str, run_id: str, target: Callable[..., None], arguments: tuple[object, ...]
) -> SpawnProcess:
    """Spawn a child with single-threaded BLAS, and with SIGINT blocked.

    Ctrl-C reaches the whole foreground group, children that are still importing included; blocked, it waits for nobody
    there, and it is delivered here as soon as this returns. Call it from the main thread: the kernel ties the child's
    parent-death signal to the thread that made it.
    """
    process = context.Process(target=target, args=arguments, name=name, daemon=True)
    with _environment({**dict.fromkeys(_ONE_THREAD, "1"), RUN_VARIABLE: run_id}):
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return process


def end_processes(processes: Sequence[SpawnProcess], *, limit_s: float, meanwhile: Callable[[], None]) -> int:
    """Ask by SIGTERM, wait, and kill what is left.

    Args:
        processes: some may be gone already.
        limit_s: how long they may take for a clean end.
        meanwhile: called while waiting; it drains the queues, without which a child may not be able to exit.

    Returns:
        How many had to be killed.
    """
    for process in processes:
        if process.is_alive():
            process.terminate()
    _wait(processes, limit_s, meanwhile)
    stubborn = [process for process in processes if process.is_alive()]
    for process in stubborn:
        process.kill()
    _wait(stubborn, limit_s, meanwhile)
    return len(stubborn)


def _wait(processes: Sequence[SpawnProcess], limit_s: float, meanwhile: Callable[[], None]) -> None:
    deadline_s = time.monotonic() + limit_s
    while any(process.is_alive() for process in processes) and time.monotonic() < deadline_s:
        meanwhile()
        time.sleep(_POLL_S)
    meanwhile()


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Set variables for the children started within, and put the old ones back."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
