"""What ties a child process to the orchestrator: SIGTERM is the order to stop, and a dead orchestrator is one too.

Two ways notice the orchestrator's death, because the kernel's parent-death signal is lost when it died before the child
asked for it: PR_SET_PDEATHSIG, and a thread that looks at the parent's pid. A child that has not stopped by itself
`_GRACE_S` after that kills itself.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType

__all__ = ["StopFlag", "begin_child"]

_PR_SET_PDEATHSIG = 1
_LOOK_S = 0.5
_GRACE_S = 6.0


class StopFlag:
    """Set by SIGTERM or by the orchestrator's death; looked at between two steps of a child's loop."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def __bool__(self) -> bool:
        """Whether to stop."""
        return self._event.is_set()

    def set(self) -> None:
        """Ask the process to stop."""
        self._event.set()

    def wait(self, timeout_s: float) -> bool:
        """Sleep at most `timeout_s`, less when asked to stop; True then."""
        return self._event.wait(timeout_s)


def begin_child(orchestrator_pid: int, log: Path) -> StopFlag:
    """Make this process a well-behaved child; call it first, from the main thread.

    Its output, and with it UCX's own messages and the server process's, goes to `log`: the terminal belongs to the live
    view, and with --json standard output is one object.

    Args:
        orchestrator_pid: the process that spawned this one.
        log: file to append to.
    """
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    stop = StopFlag()

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        stop.set()

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the orchestrator decides
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    threading.Thread(target=_watch, args=(orchestrator_pid, stop), name="lifeline", daemon=True).start()
    return stop


def _watch(orchestrator_pid: int, stop: StopFlag) -> None:
    never = threading.Event()
    while os.getppid() == orchestrator_pid:
        never.wait(_LOOK_S)
    stop.set()
    never.wait(_GRACE_S)
    os.kill(os.getpid(), signal.SIGKILL)
