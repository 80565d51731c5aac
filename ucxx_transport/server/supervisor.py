"""Keeps one server process alive beside a worker.

A thread starts the child, waits on its pidfd, and starts it again when it dies: at once the first time, with a growing
pause (at most `RESTART_PAUSE_LIMIT_S`) while it keeps dying young.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Thread

from ucxx_transport.companion import start_companion
from ucxx_transport.errors import DeadlineExceededError, TransportError
from ucxx_transport.logs import get_logger
from ucxx_transport.server.port_settings import PortSettings
from ucxx_transport.server.process_protocol import GOODBYE, ServerOrder, ServerReport

_log = get_logger(__name__)

RESTART_PAUSE_S = 0.05
RESTART_PAUSE_LIMIT_S = 1.0
# A port that something else took while the server was down is waited for this long; then any free ports do, published
# anew.
SAME_PORTS_FOR_S = 10.0
# A child that served this long died of something else than its start.
HEALTHY_AFTER_S = 1.0
_REPORT_LIMIT_BYTES = 65536


@dataclass(slots=True)
class _Child:
    process: subprocess.Popen[bytes]
    pidfd: int
    started_s: float

    def say_goodbye(self) -> None:
        """Told so, it stops by itself."""
        assert self.process.stdin is not None
        with suppress(OSError):  # it is gone already
            self.process.stdin.write(GOODBYE)
            self.process.stdin.flush()

    def reap(self) -> int:
        code = self.process.wait()
        os.close(self.pidfd)
        assert self.process.stdin is not None
        with suppress(OSError):  # what it never read is still to be flushed
            self.process.stdin.close()
        return code


class Supervisor:
    """Runs `ucxx_transport.server.child` for one ring.

    Args:
        ring_name: the segment the child attaches.
        ring_folder: where it is.
        settings: of its ports.
        on_death: called in the supervising thread when a child has died unasked, before it is replaced.
        on_ports: called there with the ports of every child that came up.
    """

    def __init__(
        self,
        ring_name: str,
        ring_folder: Path,
        settings: PortSettings,
        *,
        on_death: Callable[[], None],
        on_ports: Callable[[tuple[int, ...]], None],
    ) -> None:
        self._ring_name = ring_name
        self._ring_folder = ring_folder
        self._settings = settings
        self._on_death = on_death
        self._on_ports = on_ports
        self._up: Future[tuple[int, ...]] = Future()
        self._wake_read, self._wake_write = os.pipe()
        self._stopping = False
        self._stop_by_s = 0.0
        self._thread = Thread(target=self._run, name="ucxx-supervisor", daemon=True)
        self.restarts = 0
        self.pid: int | None = None

    def start(self, deadline_s: float) -> tuple[int, ...]:
        """Start the child and wait for its ports.

        Raises:
            ConfigError, DeadlineExceededError: the child could not serve, and is gone.
        """
        self._thread.start()
        try:
            return self._up.result(max(0.0, deadline_s - time.monotonic()))
        except FutureTimeoutError:
            self.stop(time.monotonic() + self._settings.stop_timeout_s)
            message = "the server process did not come up in time; see ServerConfig(start_timeout_s=…)"
            raise DeadlineExceededError(message) from None
        except BaseException:
            self.stop(time.monotonic() + self._settings.stop_timeout_s)
            raise

    def stop(self, deadline_s: float) -> None:
        """End the child: politely, and by SIGKILL once `deadline_s` (monotonic clock) has passed. Idempotent."""
        if not self._stopping:
            self._stop_by_s = deadline_s
            self._stopping = True
            os.write(self._wake_write, b"s")
        if self._thread.ident is not None:
            # SIGKILL is sent at the deadline; the thread ends as soon as the kernel has reaped the child.
            self._thread.join(max(0.0, deadline_s - time.monotonic()) + self._settings.stop_timeout_s)
        if not self._thread.is_alive() and self._wake_write >= 0:
            os.close(self._wake_write)
            os.close(self._wake_read)
            self._wake_write = self._wake_read = -1

    def _run(self) -> None:
        pause_s = RESTART_PAUSE_S
        settings = self._settings
        last_up_s = time.monotonic()
        while not self._stopping:
            child: _Child | None = None
            try:
                child = self._spawn(settings)
                ports = self._await_report(child, settings)
                settings = replace(settings, ports=ports, base_port=None)
                up_s = time.monotonic()
                self._serve(child, ports)
                last_up_s = time.monotonic()
                if last_up_s - up_s > HEALTHY_AFTER_S:
                    pause_s = RESTART_PAUSE_S
            except Exception as error:  # noqa: BLE001 - whatever it was (no memory, no descriptors): go on supervising
                if child is not None and child.process.returncode is None:
                    self._end(child)
                self.pid = None
                if not self._up.done():
                    self._up.set_exception(_told(error))
                    return
                _log.warning("server process did not come up; trying again", ring=self._ring_name, reason=str(error))
                if time.monotonic() - last_up_s > SAME_PORTS_FOR_S and 0 in self._settings.ports:
                    settings = self._settings
            self._pause(pause_s)
            pause_s = min(2 * pause_s, RESTART_PAUSE_LIMIT_S)

    def _serve(self, child: _Child, ports: tuple[int, ...]) -> None:
        self.pid = child.process.pid
        self._on_ports(ports)
        if not self._up.done():
            self._up.set_result(ports)
        self._wait((child.pidfd,), None)
        if self._stopping:
            self._end(child)
            self.pid = None
            return
        code = child.reap()
        self.pid = None
        self.restarts += 1
        _log.warning("server process died; restarting", ring=self._ring_name, reason=_how(code), restarts=self.restarts)
        self._on_death()

    def _spawn(self, settings: PortSettings) -> _Child:
        ready_read, ready_write = os.pipe()
        try:
            process = start_companion("ucxx_transport.server.child", str(ready_write), pass_fds=(ready_write,))
            pidfd = _pidfd_of(process)
        except BaseException:
            os.close(ready_read)
            raise
        finally:
            os.close(ready_write)
        self._ready_fd = ready_read
        child = _Child(process, pidfd, time.monotonic())
        order = ServerOrder(
            ring_name=self._ring_name,
            ring_folder=str(self._ring_folder),
            worker_pid=os.getpid(),
            settings=settings,
        )
        assert process.stdin is not None
        try:
            process.stdin.write(order.to_line())
            process.stdin.flush()
        except BrokenPipeError:
            pass  # it died already; its missing report says so
        return child

    def _await_report(self, child: _Child, settings: PortSettings) -> tuple[int, ...]:
        line = b""
        deadline_s = child.started_s + settings.start_timeout_s
        try:
            while not line.endswith(b"\n"):
                # Its end is looked at too: another thread's fork may hold the pipe's other end open.
                seen = self._wait((self._ready_fd, child.pidfd), deadline_s - time.monotonic())
                if not seen or self._stopping:
                    raise DeadlineExceededError("the server process did not report in time")
                part = os.read(self._ready_fd, _REPORT_LIMIT_BYTES) if self._ready_fd in seen else b""
                if not part:
                    raise TransportError("the server process died at its start; its standard error says why")
                line += part
        finally:
            os.close(self._ready_fd)
        report = ServerReport.from_line(line)
        report.raise_error()
        return report.ports

    def _wait(self, descriptors: tuple[int, ...], timeout_s: float | None) -> set[int]:
        """Those of `descriptors` that are readable; none when the time is up or a stop is asked for."""
        watched = select.poll()
        for descriptor in descriptors:
            watched.register(descriptor, select.POLLIN | select.POLLHUP)
        watched.register(self._wake_read, select.POLLIN)
        ready = watched.poll(None if timeout_s is None else max(0.0, timeout_s) * 1000)
        return {number for number, _ in ready} - {self._wake_read}

    def _pause(self, seconds: float) -> None:
        watched = select.poll()
        watched.register(self._wake_read, select.POLLIN)
        watched.poll(seconds * 1000)

    def _end(self, child: _Child) -> None:
        child.say_goodbye()
        child.process.terminate()  # while it is starting it does not listen yet, but dies of this; later it ignores it
        limit_s = self._stop_by_s if self._stopping else time.monotonic() + self._settings.stop_timeout_s
        watched = select.poll()
        watched.register(child.pidfd, select.POLLIN)
        if not watched.poll(max(0.0, limit_s - time.monotonic()) * 1000):
            _log.warning("server process did not stop in time; killing it", pid=child.process.pid)
            child.process.kill()
        child.reap()


def _told(error: Exception) -> TransportError:
    if isinstance(error, TransportError):
        return error
    told = TransportError("the server process could not be started", reason=f"{type(error).__name__}: {error}")
    told.__cause__ = error
    return told


def _pidfd_of(process: subprocess.Popen[bytes]) -> int:
    try:
        return os.pidfd_open(process.pid)
    except OSError:
        process.kill()
        process.communicate()
        raise


def _how(code: int) -> str:
    if code >= 0:
        return f"exit status {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"
