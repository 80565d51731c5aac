"""The sidecar as its worker sees it: a process that serves a port of a ring, renews leases, or both; kept alive.

A sidecar is spawned, not forked, in a process group of its own, so that a signal to the worker's group does not end it
before it has cleaned up. It is an interpreter like the worker's own: the same executable
(`multiprocessing.set_executable` is honoured), flags and `sys.path`, which it finds in its standard input: however long
that is. Between the two is a socket that keeps messages apart, each of which is JSON:

| from    | message                              | means                                                               |
|---------|--------------------------------------|---------------------------------------------------------------------|
| worker  | `{"worker_pid": n, "log_level": m,   | the first: whose sidecar it is, and what it serves (None: nothing)  |
|         | "serve": {…}}`                       |                                                                     |
| worker  | `{"leases": {"7": {…}}}`             | renew these leases, each there and so often, and no others          |
| worker  | `{}`                                 | the close frame: end, and leave the leases as they are              |
| worker  | end of file without that             | the worker is dying                                                 |
| sidecar | `{"up": 5001}`                       | it is up, and serves that port (null: none)                         |
| sidecar | `{"failed": class, "reason": …}`     | it could not start, and ends                                        |
| sidecar | `{"died": reason}`                   | an error that no one expected ends it                               |
| sidecar | `{"kept": 7}`                        | this lease was renewed                                              |
"""

from __future__ import annotations

import errno
import json
import math
import multiprocessing.spawn
import multiprocessing.util
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from dataclasses import KW_ONLY, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import IO, Any, Final

from ucxx_transport.backoff import random_pause_s
from ucxx_transport.errors import ConfigError, DeadlineExceededError, TransportError
from ucxx_transport.logs import effective_level, get_logger
from ucxx_transport.machine import Wakeup, open_standard_streams, start_thread
from ucxx_transport.units import Secret

_log = get_logger(__name__)

Order = Mapping[str, object]  # a `descriptor` in it is handed over: inherited, and closed here
LOOK_S: Final = 1.0  # how often a sidecar that is up is looked at
_REAP_S: Final = 5.0
_HEALTHY: Final = 10  # times the first pause: one that was up for so long has died of something else than its start
_ERRORS: Final = {cls.__name__: cls for cls in (ConfigError, DeadlineExceededError)}
_MESSAGE_BYTES: Final = 65536
_WORDS_BYTES: Final = 8192
_BOOT: Final = Path(__file__).with_name("boot.py")
_INTERPRETERS: Final = ("python", "pypy")


@dataclass(eq=False, repr=False)
class Sidecar:
    """Keeps one sidecar beside this process, from a thread: starts it, reads its reports, starts it again when it dies.

    All callables are called in the thread. A forked child must leave it alone. One whose first process does not come
    `up` is to be stopped, too.
    """

    role: str  # in front of its log lines, such as "ucxx port 0"
    pauses_s: tuple[float, float]  # the first and the longest before a new start; the first that dies young has none
    _: KW_ONLY
    serve: Callable[[], Order] | None = None  # makes the order of what it serves, at every start; None: it only renews
    start_timeout_s: float = 30.0  # one that is not up by then is killed and started again
    on_death: Callable[[], object] = lambda: None  # one has died unasked, and is about to be started again
    is_stalled: Callable[[], bool] = lambda: False  # asked every `LOOK_S` or so of one that is up; True: it is killed
    pid: int | None = field(default=None, init=False)  # of the process that is up
    restarts: int = field(default=0, init=False)  # how often one that was up has died unasked
    up: Future[Any] = field(default_factory=Future, init=False)  # the first one's port; or why it could not start
    kept: set[int] = field(default_factory=set, init=False)  # the leases that this process has renewed
    _lock: threading.RLock = field(default_factory=threading.RLock, init=False)  # a signal handler may stop it
    _thread: threading.Thread | None = field(default=None, init=False)
    _wake: Wakeup = field(init=False)  # while there is a thread
    _process: _Process | None = field(default=None, init=False)
    _leases: dict[int, Order] = field(default_factory=dict, init=False)
    _is_unsent: bool = field(default=False, init=False)  # what leases there are
    _stop_by_s: float = field(default=math.inf, init=False)

    def start(self) -> None:
        """Start it from the thread, and return at once; after a stop, too, with the leases that it was to renew."""
        self._stop_by_s, self.up, self._wake = math.inf, Future(), Wakeup()
        self._thread = start_thread(self._run, name="ucxx-sidecar")

    def begin_stop(self, until_s: float) -> None:
        """`stop` without its wait, so that several end side by side."""
        with self._lock:
            if self._thread is not None and self._stop_by_s == math.inf:
                self._stop_by_s = until_s
                self._wake.notify()

    def stop(self, until_s: float) -> None:
        """End it: by the close frame, and by SIGKILL once `until_s` (monotonic) has passed. Idempotent."""
        self.begin_stop(until_s)
        if (thread := self._thread) is None:
            return
        thread.join(max(0.0, until_s - time.monotonic()) + _REAP_S)
        if thread.is_alive():  # the kernel holds it
            raise DeadlineExceededError("the sidecar was killed and has not ended", role=self.role, pid=self.pid)
        with self._lock:
            if self._thread is thread:
                self._thread = None
                del self._wake

    def keep(self, lease_id: int, store: Order | None) -> None:
        """Renew this lease too, there, in every process from now on; None: no longer."""
        with self._lock:
            if store is None:
                self._leases.pop(lease_id, None)
                self.kept.discard(lease_id)
            else:
                self._leases[lease_id] = store
            self._is_unsent = True
            self._send_leases()

    # the thread

    def _run(self) -> None:
        (first_s, longest_s), young, pause_s = self.pauses_s, 0, 0.0
        while not self._wait(pause_s):
            try:
                up_s, reason = self._attend()
            except Exception as error:  # noqa: BLE001 - the edge of a thread: it goes on
                up_s, reason = 0.0, str(error)
                if not self.up.done():
                    self.up.set_exception(error)
                    if self.serve is not None:
                        return  # a server that never came up is its caller's to start again
            if self._is_stopping:
                return
            young = 0 if up_s >= _HEALTHY * first_s else young + 1
            pause_s = random_pause_s(young - 1, first_s=first_s, longest_s=longest_s) if young > 1 else 0.0
            _log.warning(
                "sidecar_died", role=self.role, reason=reason, restarts=self.restarts, pause_s=round(pause_s, 3)
            )

    @property
    def _is_stopping(self) -> bool:
        return self._stop_by_s < math.inf

    def _attend(self) -> tuple[float, str]:
        """One process from its start to its end; returns how long it was up, and how it ended."""
        try:
            process = _Process(self.role, None if self.serve is None else self.serve())
        except (OSError, RuntimeError) as error:  # no memory, no descriptors; or the interpreter is exiting
            reason = f"{type(error).__name__}: {error}"
            raise TransportError("the sidecar could not be started", role=self.role, reason=reason) from error
        with self._lock:
            self._process, self._is_unsent = process, bool(self._leases)
        try:
            self._follow(process)
        finally:
            was_asked = self._is_stopping
            with self._lock:
                self._process = self.pid = None
                self.kept.clear()
                self.restarts += process.came_up_s is not None and not was_asked
            how = process.end(self._stop_by_s if was_asked else -math.inf)
        if process.came_up_s is None:
            raise TransportError(f"the sidecar died at its start: {how}", role=self.role)
        if not was_asked:
            self.on_death()
        return time.monotonic() - process.came_up_s, how

    def _follow(self, process: _Process) -> None:
        """Read its reports until it ends or a stop is asked for."""
        judged_s = time.monotonic()
        start_by_s = judged_s + self.start_timeout_s
        self._send_leases()  # now: this process may hold the interpreter, or die, before it comes to its first look
        while not self._wait(min(LOOK_S, self.start_timeout_s), process.fileno()):
            self._send_leases()
            had_ended = process.popen.poll() is not None  # looked at first: all that it reported is there to be read
            report = process.receive()
            if report:
                self._take(report, process)
            elif report is None or had_ended:  # another thread's fork may have kept its end open
                return
            now_s = time.monotonic()
            if process.came_up_s is None:
                if now_s >= start_by_s:
                    raise DeadlineExceededError("the sidecar did not come up in time", role=self.role)
            elif (since_s := now_s - judged_s) >= LOOK_S:
                judged_s = now_s
                # a worker that was itself stopped meanwhile does not judge
                if since_s < 2 * LOOK_S and self.is_stalled():
                    _log.warning("sidecar_stalled", role=self.role, pid=process.popen.pid)
                    process.popen.kill()

    def _take(self, report: dict[str, Any], process: _Process) -> None:
        if "up" in report:
            process.came_up_s = time.monotonic()
            process.forward()
            self.pid = process.popen.pid
            if not self.up.done():
                self.up.set_result(report["up"])
        elif "failed" in report:
            raise _ERRORS.get(report["failed"], TransportError)(report["reason"])
        elif "died" in report:
            process.last_words = report["died"]
        elif "kept" in report:
            self.kept.add(report["kept"])

    def _send_leases(self) -> None:
        """Unless it has been sent them; one that is stopped may have taken none."""
        with self._lock:
            if self._process is not None and self._is_unsent:
                self._is_unsent = not self._process.send({"leases": self._leases})

    def _wait(self, timeout_s: float, *processes: int) -> bool:
        """Until there is a report, the time is up, or a stop is asked for: True."""
        watched = select.poll()
        for descriptor in (self._wake.fileno(), *processes):
            watched.register(descriptor, select.POLLIN)  # or its end
        watched.poll(timeout_s * 1000)
        return self._is_stopping


class _Process:
    """One process of a sidecar, and the worker's end of what leads to it."""

    def __init__(self, role: str, serve: Order | None) -> None:
        self._role = role
        self.came_up_s: float | None = None  # from then on it writes to the worker's standard error
        self.last_words = ""  # what it says that it died of
        passed: list[int] = []
        open_standard_streams()  # else what it is handed could have a number that its own streams take
        with ExitStack() as handed, ExitStack() as kept:
            descriptor = None if serve is None else serve.get("descriptor")
            if isinstance(descriptor, int):
                handed.callback(os.close, descriptor)
                passed.append(descriptor)
            passed.append(errors := os.dup(2))
            handed.callback(os.close, errors)
            path = handed.enter_context(_scratch())
            # imports skip what is no string, such as a Path
            path.write(json.dumps([entry for entry in sys.path if type(entry) is str]).encode())
            path.seek(0)
            self._first_words = kept.enter_context(_scratch())
            self._socket, theirs = socket.socketpair(type=socket.SOCK_SEQPACKET)
            kept.enter_context(self._socket)
            worker = handed.enter_context(theirs).fileno()
            flags = multiprocessing.util._args_from_interpreter_flags()  # type: ignore[attr-defined]  # noqa: SLF001 - as multiprocessing starts its own
            self.popen = subprocess.Popen(
                # -P: the folder of the script is none of the worker's `sys.path`
                [interpreter(), *flags, "-P", str(_BOOT), str(worker), str(errors), role],
                stdin=path,
                stdout=self._first_words,  # UCX logs there, and the worker's own may be what it talks to a program by
                stderr=self._first_words,
                pass_fds=(worker, *passed),
                process_group=0,
            )
            kept.pop_all()
        self._socket.settimeout(0.0)
        self.fileno = self._socket.fileno
        self.send({"worker_pid": os.getpid(), "log_level": effective_level(), "serve": serve})

    def send(self, message: Order) -> bool:
        """Send it a message; False when it takes none now, since it is stopped, say. One that has died loses it."""
        try:
            self._socket.send(packed(message))
        except BlockingIOError:
            return False
        except OSError:
            pass
        return True

    def receive(self) -> dict[str, Any] | None:
        """The next report; an empty one where there is none, None at the end of file."""
        for _ in range(2):  # a reset, since it has not read all that it was sent, is said once, before its last reports
            try:
                report = self._socket.recv(_MESSAGE_BYTES)
            except BlockingIOError:
                return {}
            except OSError:
                continue
            return json.loads(report) if report else None
        return None

    def end(self, until_s: float) -> str:
        """End it, by SIGKILL once `until_s` has passed, before that by the close frame; returns how it ended."""
        if until_s > -math.inf:
            self.send({})
            self.popen.terminate()  # in its first moments it does not read yet, but dies of this; later it ignores it
            try:
                self.popen.wait(max(0.0, until_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                _log.warning("sidecar_killed", role=self._role, pid=self.popen.pid, reason="it did not stop in time")
        self.popen.kill()  # unless it has ended
        code = self.popen.wait()
        self._socket.close()
        said = self.forward() if self.came_up_s is None else ""
        if self.last_words:
            return self.last_words
        how = f"exit status {code}"
        with suppress(ValueError):  # a signal without a name
            how = signal.Signals(-code).name
        return f"{how}: {said}" if said else how

    def forward(self) -> str:
        """Write what it has written so far to the worker's standard error; returns the last line."""
        with self._first_words as words:
            words.seek(max(0, words.seek(0, os.SEEK_END) - _WORDS_BYTES))
            text = words.read()
        with suppress(OSError):
            os.write(2, text)
        return text.decode("utf-8", "replace").rstrip().rpartition("\n")[2]


def packed(message: Order) -> bytes:
    """A message to a sidecar; settings can be made of what stands for some in it."""
    return json.dumps(message, default=_plain).encode()


def _plain(value: object) -> object:
    if isinstance(value, Secret):  # it travels by this socket and nowhere else
        return value.reveal().decode("utf-8", "surrogateescape")  # which makes it again, whatever its bytes
    if is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    return dict(value) if isinstance(value, Mapping) else str(value)


def interpreter() -> str:
    """The interpreter that sidecars are started with; a ConfigError where there is none, as in an embedded Python."""
    path = os.fsdecode(multiprocessing.spawn.get_executable() or "")
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
    """A file without a name: in memory where that can be had, since a container may have no folder to write to."""
    try:
        return open(os.memfd_create("ucxx-sidecar"), "w+b")
    except (AttributeError, OSError) as error:  # of an old C library; by seccomp, gVisor, vm.memfd_noexec=2
        if getattr(error, "errno", errno.ENOSYS) not in (errno.ENOSYS, errno.EPERM, errno.EACCES):
            raise
    return tempfile.TemporaryFile()
