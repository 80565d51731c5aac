"""The folder of one test process's segments and default store, so that runs beside each other never meet.

`UCXX_TRANSPORT_RING__FOLDER` names it, and every process that a test starts inherits that.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Final

from ucxx_transport.ring.segment import NAME_PREFIX

__all__ = ["VARIABLE", "SegmentFolder", "segments"]

VARIABLE: Final = "UCXX_TRANSPORT_RING__FOLDER"

_SHARED_MEMORY: Final = Path("/dev/shm")
_PREFIX: Final = "ucxx_transport_tests-"


class SegmentFolder:
    """A new folder in /dev/shm, removed by `remove`; what a killed run left is removed first.

    Its `flock` says that the run lives: pids of other containers mean nothing here.

    Args:
        name: tells it from those of the same run's other processes.
    """

    def __init__(self, name: str) -> None:
        for old in _SHARED_MEMORY.glob(f"{_PREFIX}*"):
            _remove_if_abandoned(old)
        while True:  # another process that starts may take a new folder, still without a lock, for an abandoned one
            self.path = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-{name}-", dir=_SHARED_MEMORY))
            with suppress(FileNotFoundError):
                self._fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                fcntl.flock(self._fd, fcntl.LOCK_EX)
                if self.path.exists():
                    break
                os.close(self._fd)
        self.path.chmod(0o1777)  # as /dev/shm: some tests take another user's part

    def remove(self) -> list[str]:
        """Remove the folder; returns the names of the segments still in it."""
        left = [path.name for path in segments()]
        shutil.rmtree(self.path)
        os.close(self._fd)
        return left


def segments() -> list[Path]:
    """The files of all segments in this test process's folder."""
    return sorted(Path(os.environ[VARIABLE]).glob(f"{NAME_PREFIX}*"))


def _remove_if_abandoned(folder: Path) -> None:
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    except BlockingIOError:
        pass
    finally:
        os.close(fd)
