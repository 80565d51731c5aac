"""A process that is stopped while it holds a ring's lock."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.stopping import stop_process
from ucxx_transport import SharedRingBuffer

__all__ = ["held_lock"]

ROOT = Path(__file__).resolve().parents[2]
COMMAND = (sys.executable, "-m", "tests.e2e.programs.ring_roles", "sit_in_section")


@contextmanager
def held_lock(ring: SharedRingBuffer) -> Iterator[Callable[[], None]]:
    """Gives a call that lets the process go on, and waits until it has released the lock."""
    with subprocess.Popen(
        [*COMMAND, ring.name, "between transitions"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        said, answers = process.stdin, process.stdout

        def release() -> None:
            os.kill(process.pid, signal.SIGCONT)
            said.write("\n")
            said.flush()
            assert answers.readline() == '"left"\n'

        try:
            assert answers.readline() == '"ready"\n'
            stop_process(process.pid)
            yield release
        finally:
            process.kill()
