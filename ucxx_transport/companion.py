"""Companions: processes of our own beside a worker. How one is started, and how it sees the worker's end.

A companion is no fork: it starts as a fresh interpreter, in a process group of its own, so that what kills the worker's
group leaves it alive just long enough to put things in order.
"""

from __future__ import annotations

import os
import runpy
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

__all__ = ["DYING_S", "LOOK_S", "WorkerEnd", "start_companion"]

# How often the worker is looked at besides its pidfd: there may be none.
LOOK_S: Final = 1.0
# From the end of the worker's descriptors to its own: the kernel frees some 10 GiB of its memory a second.
DYING_S: Final = 60.0
_STOPPED: Final = frozenset("Tt")


def start_companion(
    module: str, *words: str, stdout: int | None = None, pass_fds: Sequence[int] = ()
) -> subprocess.Popen[bytes]:
    """Run `python -m module words` with a pipe to its standard input, which tells it of this process's end.

    Args:
        module: of this package, found whatever the worker's folder is.
        words: its arguments.
        stdout: as for `subprocess.Popen`.
        pass_fds: descriptors that it inherits.
    """
    root = str(Path(__file__).resolve().parent.parent)
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.Popen(
        # -P: a file of the worker's folder that is named like a standard module must not be imported.
        [sys.executable, "-P", "-m", __name__, module, *words],
        stdin=subprocess.PIPE,
        stdout=stdout,
        pass_fds=pass_fds,
        process_group=0,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )


class WorkerEnd:
    """The worker, as its companion sees it.

    Args:
        pid: the worker's, which started this process.

    Attributes:
        pidfd: readable when the worker has ended; -1 when it had before, or where the kernel has none (before 5.3).
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self.pidfd = -1
        with suppress(OSError):
            self.pidfd = os.pidfd_open(pid)
        if self.pidfd >= 0 and os.getppid() != pid:  # it had ended before: whoever has its pid now is somebody else
            os.close(self.pidfd)
            self.pidfd = -1

    @property
    def is_gone(self) -> bool:
        """Whether it has ended, to its last thread: until then it holds its locks.

        Its children change hands before that, when its main thread has ended and the others are about to.
        """
        if self.pidfd < 0:
            return os.getppid() != self._pid
        ended = select.poll()
        ended.register(self.pidfd, select.POLLIN)
        return bool(ended.poll(0))

    @property
    def is_stopped(self) -> bool:
        """Whether it is stopped, by SIGSTOP or a debugger, and so answers nobody."""
        try:
            with open(f"/proc/{self._pid}/stat", "rb") as stat:
                # the name in parentheses may hold anything
                return stat.read().rpartition(b")")[2].split()[0].decode() in _STOPPED
        except OSError:
            return False  # gone, and then is_gone says so; or not ours to look at

    def wait_until_gone(self, limit_s: float) -> bool:
        """Wait for its end, `limit_s` at most; whether it came."""
        watched = select.poll()
        if self.pidfd >= 0:
            watched.register(self.pidfd, select.POLLIN)
        until_s = time.monotonic() + limit_s
        while not self.is_gone and (left_s := until_s - time.monotonic()) > 0:
            watched.poll(min(left_s, LOOK_S) * 1000)
        return self.is_gone


def _run(module: str, *words: str) -> None:
    sys.argv[1:] = words
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _run(*sys.argv[1:])
