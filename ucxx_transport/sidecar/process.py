"""One process of a sidecar, and its pipes, as the worker has them.

It is an interpreter like the worker's own: the same executable (`multiprocessing.set_executable` is honoured), flags
and `sys.path`. Until it is up its standard error goes to a file, so that what kept it from coming up can be named.
"""

from __future__ import annotations

import json
import multiprocessing.spawn
import multiprocessing.util
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from ucxx_transport.errors import ConfigError
from ucxx_transport.logs import effective_level, get_logger

_log = get_logger(__name__)

_READ_BYTES: Final = 65536
_BOOT: Final = Path(__file__).with_name("boot.py")
_INTERPRETERS: Final = ("python", "pypy")


class SidecarProcess:
    """A started process.

    Args:
        role: in front of its log lines.
        serve: what it serves; None: nothing. A `descriptor` in it is handed over: inherited, and closed here.

    Attributes:
        reports: descriptor that its reports are read from.
        pidfd: readable when it has ended; -1 where the kernel, a filter of system calls or this Python has none.

    Raises:
        ConfigError: there is no interpreter to start.
        OSError: it cannot be started: no memory, no descriptors.
    """

    def __init__(self, role: str, serve: Mapping[str, object] | None) -> None:
        handed = serve.get("descriptor") if serve is not None else None
        inherited = [handed] if isinstance(handed, int) else []
        try:
            self._start(role, inherited)
        finally:
            for number in inherited:
                os.close(number)
        self._role = role
        order = {"worker_pid": os.getpid(), "log_level": effective_level(), "serve": serve}
        entries: list[object] = [*sys.path]  # imports skip what is no string, such as a Path
        self.write({"sys_path": [entry for entry in entries if isinstance(entry, str)], **order})

    def _start(self, role: str, inherited: list[int]) -> None:
        command = [interpreter(), *multiprocessing.util._args_from_interpreter_flags()]  # type: ignore[attr-defined]  # noqa: SLF001 - as multiprocessing starts its own
        self._unread = b""
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - open for as long as the process is
        self.reports, theirs = os.pipe()
        stderr = _own_stderr()
        try:
            self.popen = subprocess.Popen(
                # -P: the folder of the script is none of the worker's `sys.path`
                [*command, "-P", str(_BOOT), str(theirs), str(stderr), role],
                stdin=subprocess.PIPE,
                stdout=self._errors,
                stderr=self._errors,
                bufsize=0,
                pass_fds=(theirs, stderr, *inherited),
                process_group=0,
            )
        except BaseException:
            os.close(self.reports)
            self._errors.close()
            raise
        finally:
            os.close(theirs)
            os.close(stderr)
        os.set_blocking(self.reports, False)
        self.pidfd = _pidfd_of(self.popen.pid)

    def write(self, line: Mapping[str, object]) -> None:
        """Send it a line; one that has died loses it."""
        assert self.popen.stdin is not None
        with suppress(OSError):
            self.popen.stdin.write(json.dumps(line).encode() + b"\n")

    def read(self) -> list[dict[str, Any]] | None:
        """The reports that have arrived; None at the end of file."""
        try:
            part = os.read(self.reports, _READ_BYTES)
        except BlockingIOError:
            return []
        *lines, self._unread = (self._unread + part).split(b"\n")
        return [json.loads(line) for line in lines] if part else None

    @property
    def has_ended(self) -> bool:
        """Whether it has."""
        return self.popen.poll() is not None

    def pass_errors_on(self) -> str:
        """Write what it has written to standard error so far to the worker's; returns the last line."""
        self._errors.seek(0)
        text = self._errors.read()
        self._errors.truncate(0)
        with suppress(OSError):
            os.write(2, text)
        lines = text.decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")

    def end(self, until_s: float) -> None:
        """By the close frame, and by SIGKILL once `until_s` has passed."""
        self.write({"close": True})
        self.popen.terminate()  # in its first moments it does not read yet, but dies of this; later it ignores it
        try:
            self.popen.wait(max(0.0, until_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            _log.warning("sidecar_killed", role=self._role, pid=self.popen.pid, reason="it did not stop in time")
            self.popen.kill()

    def reap(self) -> str:
        """Wait for its end, close what is left of it, and say how it ended."""
        code = self.popen.wait()
        self.pass_errors_on()
        self._errors.close()
        os.close(self.reports)
        if self.pidfd >= 0:
            os.close(self.pidfd)
        assert self.popen.stdin is not None
        self.popen.stdin.close()
        if code >= 0:
            return f"exit status {code}"
        try:
            return signal.Signals(-code).name
        except ValueError:
            return f"signal {-code}"


def interpreter() -> str:
    """The interpreter that sidecars are started with.

    Raises:
        ConfigError: `sys.executable` is none, as in an application that embeds Python, and no other was set.
    """
    chosen = multiprocessing.spawn.get_executable()
    path = os.fsdecode(chosen) if chosen else ""
    # an application that embeds Python would start itself again
    if path and (path != sys.executable or Path(path).name.lower().startswith(_INTERPRETERS)):
        return path
    raise ConfigError(
        f"sys.executable is {sys.executable!r}, which is no Python interpreter, so no sidecar can be started: call "
        "multiprocessing.set_executable('/path/to/python'), or use ServerConfig(mode='thread') and "
        "PublisherConfig(keeper='thread')",
        field="mode",
        value=sys.executable,
    )


_pidfd_is_missed = False


def _pidfd_of(pid: int) -> int:
    global _pidfd_is_missed  # noqa: PLW0603 - logged once a process
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError) as error:
        if not _pidfd_is_missed:
            _pidfd_is_missed = True
            _log.info("pidfd_missing", reason=f"{type(error).__name__}: {error}")
        return -1


def _own_stderr() -> int:
    """A copy of this process's standard error; of /dev/null where that is closed."""
    try:
        return os.dup(2)
    except OSError:
        return os.open(os.devnull, os.O_WRONLY)
