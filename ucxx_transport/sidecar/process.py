"""One process of a sidecar, and its pipes, as the worker has them.

It is an interpreter like the worker's own: the same executable (`multiprocessing.set_executable` is honoured), flags
and `sys.path`.
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
from typing import IO, Any, Final

from ucxx_transport.errors import ConfigError
from ucxx_transport.logs import effective_level, get_logger

_log = get_logger(__name__)

_READ_BYTES: Final = 65536
_WORDS_BYTES: Final = 8192
_BOOT: Final = Path(__file__).with_name("boot.py")
_INTERPRETERS: Final = ("python", "pypy")


class SidecarProcess:
    """A started process, and its pipes.

    Args:
        role: in front of its log lines.
        serve: what it serves; None: nothing. A `descriptor` in it is handed over: inherited, and closed here.

    Attributes:
        reports: descriptor that its reports are read from.
        came_up_s: when it was up, and so writes to the worker's standard error; before, that is kept for the error.
        last_words: what it says that it died of.

    Raises:
        ConfigError: there is no interpreter to start.
        OSError: it cannot be started: no memory, no descriptors.
    """

    def __init__(self, role: str, serve: Mapping[str, object] | None) -> None:
        self._role = role
        self._unread = b""
        self.came_up_s: float | None = None
        self.last_words = ""
        handed = serve.get("descriptor") if serve is not None else None
        inherited = [handed] if isinstance(handed, int) else []
        self._first_words = _scratch()
        self.reports, theirs = os.pipe()
        errors = _errors()
        try:
            flags = multiprocessing.util._args_from_interpreter_flags()  # type: ignore[attr-defined]  # noqa: SLF001 - as multiprocessing starts its own
            self.popen = subprocess.Popen(
                # -P: the folder of the script is none of the worker's `sys.path`
                [interpreter(), *flags, "-P", str(_BOOT), str(theirs), str(errors), role],
                stdin=subprocess.PIPE,
                stdout=self._first_words,  # UCX logs there, and the worker's own may be what it talks to a program by
                stderr=self._first_words,
                bufsize=0,
                pass_fds=(theirs, errors, *inherited),
                process_group=0,
            )
        except BaseException:
            os.close(self.reports)
            self._first_words.close()
            raise
        finally:
            for number in (theirs, errors, *inherited):
                os.close(number)
        os.set_blocking(self.reports, False)
        entries: list[object] = [*sys.path]  # imports skip what is no string, such as a Path
        sys_path = [entry for entry in entries if isinstance(entry, str)]
        self.write({"sys_path": sys_path, "worker_pid": os.getpid(), "log_level": effective_level(), "serve": serve})

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
        os.close(self.reports)
        assert self.popen.stdin is not None
        self.popen.stdin.close()
        said = self._forwarded() if self.came_up_s is None else ""
        if self.last_words:
            return self.last_words
        how = f"exit status {code}"
        with suppress(ValueError):  # a signal without a name
            how = signal.Signals(-code).name
        return f"{how}: {said}" if said else how

    def came_up(self) -> None:
        """It serves, and writes to the worker's standard error from now on."""
        self.came_up_s = time.monotonic()
        self._forwarded()

    def _forwarded(self) -> str:
        """The last line of what it has written so far, all of which goes where it belongs."""
        with self._first_words as words:
            words.seek(max(0, words.seek(0, os.SEEK_END) - _WORDS_BYTES))
            text = words.read()
        errors = _errors()
        with suppress(OSError):
            os.write(errors, text)
        os.close(errors)
        return text.decode("utf-8", "replace").rstrip().rpartition("\n")[2]


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


def _scratch() -> IO[bytes]:
    """A file without a name: in memory, since a container may have no folder to write to; some builds lack the call."""
    if hasattr(os, "memfd_create"):
        return open(os.memfd_create("ucxx-sidecar"), "w+b")
    return tempfile.TemporaryFile()


def _errors() -> int:
    """A descriptor of this process's standard error; of nothing, where that is closed."""
    try:
        return os.dup(2)
    except OSError:
        return os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
