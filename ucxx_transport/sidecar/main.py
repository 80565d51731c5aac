"""The sidecar process, once `boot` has started it for `launch`.

It serves a port of a ring, renews a lease, or both, for as long as its worker lives, whatever else it is sent:
signals that ask a whole job to end are the worker's affair, which may still have payloads to hand out.

| what it sees                                      | the port   | the lease                      | then              |
|---------------------------------------------------|------------|--------------------------------|-------------------|
| the worker runs, however busy                     | is served  | is renewed                     | –                 |
| the worker is stopped (SIGSTOP, a debugger)       | is served  | is not renewed                 | –                 |
| the close frame on its standard input             | is closed  | is left as it is               | it ends           |
| end of file there without it: the worker is dying | is closed  | is revoked when that is dead   | as when it is dead|
| the worker is dead (its pidfd)                    | is closed  | is revoked                     | it sweeps, ends   |
| the thread of its port has died                   | is closed  | is left as it is               | it ends           |
| SIGTERM, SIGINT, SIGHUP                           | is served  | is renewed                     | –                 |
| a store that does not answer                      | is served  | is tried again                 | –                 |
"""

from __future__ import annotations

import enum
import gc
import json
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Final, NoReturn

from ucxx_transport.errors import LeaseLostError, StoreResetError, TransportError
from ucxx_transport.logs import get_logger, log_to_stderr
from ucxx_transport.teardown import MARGIN_S, Teardown

_log = get_logger(__name__)

# How often the ports are looked at.
LOOK_S: Final = 1.0
# From the end of the worker's descriptors to its own: the kernel frees some 10 GiB of its memory a second.
DYING_S: Final = 60.0
# After a failure the store is asked again this soon, so that a short outage costs no lease.
RETRY_S: Final = 0.25
# How long a call of a store that does not answer is waited for at the end: to leave a lease as it is, and to revoke it.
LEAVE_S: Final = 0.5
REVOKE_S: Final = 10.0
# A killed worker is dead that soon, unless it has much memory: so long its port stays open.
SOON_S: Final = 0.5
# After a bounded stop the kernel ends what is left: a process inside UCX may not answer.
_KILL_MARGIN_S: Final = 2.0
_STOPPED: Final = frozenset({b"T", b"t"})
# Fields of /proc/<pid>/stat behind the name.
_STATE: Final = 0
_THREADS: Final = 17
_START: Final = 19
# How often /proc is read where there is no pidfd.
POLL_S: Final = 0.1
# Of the reason of a loss: so short a report (PIPE_BUF) is written whole or not at all.
_REASON_CHARS: Final = 500


class WorkerEnd:
    """The worker, as its sidecar sees it: gone once its last thread has ended, since until then it holds its locks.

    Args:
        pid: the worker's, which started this process.

    Attributes:
        pidfd: readable when the worker is gone; -1 where there is none: then /proc is polled.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self.pidfd = -1
        with suppress(OSError, AttributeError):  # AttributeError: a Python that was built without it
            self.pidfd = os.pidfd_open(pid)
        # a pid is given to another process some day, and its start time tells the two apart
        stat = self._stat()
        self._start = stat[_START] if stat is not None and os.getppid() == pid else None
        if self._start is None and self.pidfd >= 0:  # it had ended before
            os.close(self.pidfd)
            self.pidfd = -1

    @property
    def is_gone(self) -> bool:
        """Whether it has ended."""
        return self.wait_until_gone(0.0)

    @property
    def is_stopped(self) -> bool:
        """Whether it is stopped, by SIGSTOP or a debugger, and so answers no request."""
        stat = self._stat()
        return stat is not None and stat[_STATE] in _STOPPED

    def wait_until_gone(self, limit_s: float) -> bool:
        """Wait for its end, `limit_s` at most; whether it came."""
        if self._start is None:
            return True
        if self.pidfd >= 0:
            ended = select.poll()
            ended.register(self.pidfd, select.POLLIN)
            return bool(ended.poll(limit_s * 1000))
        until_s = time.monotonic() + limit_s
        while self._runs():
            if (left_s := until_s - time.monotonic()) <= 0:
                return False
            time.sleep(min(left_s, POLL_S))
        return True

    def _runs(self) -> bool:
        stat = self._stat()
        if stat is None or stat[_START] != self._start:
            return False
        return not (stat[_STATE] in b"ZX" and int(stat[_THREADS]) <= 1)

    def _stat(self) -> list[bytes] | None:
        """Its line in /proc from the state on (proc(5)); None when it is gone, or not ours to look at."""
        try:
            with open(f"/proc/{self._pid}/stat", "rb") as stat:
                return stat.read().rpartition(b")")[2].split()  # the name in parentheses may hold anything
        except OSError:
            return None


class Renewer:
    """Renews one lease at a time, in a thread of its own: a store's client blocks, and the ports must not wait for it.

    Args:
        store: the order of `ucxx_transport.membership.renewal`: which store, and how often.
        worker: while it is stopped, nothing is renewed.
        report: sends what came of a renewal.
    """

    def __init__(self, store: Mapping[str, Any], worker: WorkerEnd, report: Callable[..., None]) -> None:
        self.store = store
        self._worker = worker
        self._report = report
        self._changed = threading.Condition()
        self._lease_id: int | None = None
        self._due_s = 0.0
        self._ending = self._revoking = self._is_away = False
        self._thread = threading.Thread(target=self._run, name="ucxx-renewer", daemon=True)
        self._thread.start()

    def keep(self, lease_id: int | None) -> None:
        """Renew this lease from now on, or none."""
        with self._changed:
            self._lease_id, self._due_s, self._is_away = lease_id, 0.0, False
            self._changed.notify_all()

    def end(self, *, revoke: bool) -> None:
        """Renew no more; `revoke`: end the lease when the worker is dead."""
        with self._changed:
            self._ending, self._revoking = True, revoke
            self._changed.notify_all()

    def join(self, limit_s: float) -> None:
        """Wait until it has ended; a store that does not answer is not waited for longer than that."""
        self._thread.join(limit_s)

    def _run(self) -> None:
        while not self._ending:
            try:
                self._renew_on()
            except Exception as error:  # noqa: BLE001 - the edge of a thread: the ports go on whatever it was
                self._note(error)
                with self._changed:
                    self._changed.wait_for(lambda: self._ending, RETRY_S)

    def _renew_on(self) -> None:
        from ucxx_transport.membership.renewal import open_ordered, renew

        interval_s = float(self.store["interval_s"])
        retry_s = min(RETRY_S, interval_s)
        with open_ordered(self.store) as store:
            while (lease_id := self._next()) is not None:
                began_s = time.monotonic()
                self._due_s = began_s + interval_s
                if self._worker.is_stopped:
                    self._due_s = began_s + retry_s
                    continue
                try:
                    renew(store, lease_id, timeout_s=interval_s)  # one that hangs must leave time for another
                except (LeaseLostError, StoreResetError) as error:
                    with self._changed:
                        if self._lease_id == lease_id:
                            self._lease_id = None
                    self._report(lease_id=lease_id, lost=str(error)[:_REASON_CHARS])
                except TransportError as error:
                    self._due_s = time.monotonic() + retry_s
                    self._note(error)
                else:
                    self._is_away = False
                    self._report(lease_id=lease_id, renewed_s=began_s)
            if self._revoking and self._lease_id is not None and self._worker.wait_until_gone(DYING_S):
                store.revoke(self._lease_id)

    def _next(self) -> int | None:
        """Wait until a lease is to be renewed; None: the end."""
        with self._changed:
            while not self._ending:
                left_s = self._due_s - time.monotonic()
                if self._lease_id is not None and left_s <= 0:
                    return self._lease_id
                self._changed.wait(None if self._lease_id is None else left_s)
        return None

    def _note(self, error: Exception) -> None:
        """Once for each row of failures."""
        if not self._is_away:
            self._is_away = True
            _log.warning("lease_not_renewed", lease=self._lease_id, reason=f"{type(error).__name__}: {error}")


class _End(enum.Enum):
    CLOSED = "the close frame"
    ABANDONED = "the worker is dead or dying"
    BROKEN = "the port has died"


class Served:
    """One port of a ring.

    Args:
        order: which ring, which of its server's ports, and the server's settings; see `ucxx_transport.server.server`.

    Raises:
        TransportError: the ring is gone, or the port cannot listen.
    """

    def __init__(self, order: Mapping[str, Any]) -> None:
        from ucxx_transport.ring import SharedRingBuffer
        from ucxx_transport.server.port_thread import PortThread, of_order

        settings = of_order(order["settings"])
        self._stop_timeout_s = settings.stop_timeout_s
        descriptor = order.get("descriptor")
        self._ring = SharedRingBuffer.attach(order["ring_name"], folder=order["ring_folder"], descriptor=descriptor)
        if descriptor is not None:
            os.close(descriptor)
        gc.freeze()  # what is loaded is no garbage: to look through all of it would halt the port for some 10 ms
        self._thread = PortThread(self._ring, settings, order["index"])
        self.port = self._thread.start(time.monotonic() + settings.start_timeout_s)

    @property
    def is_alive(self) -> bool:
        """Whether the port still runs."""
        return self._thread.alive

    def stop(self, teardown: Teardown) -> None:
        """Close the port and unmap the ring, in bounded steps."""
        until_s = time.monotonic() + self._stop_timeout_s
        # SIGALRM ends a process whose interpreter hangs, in a call of UCX that keeps its lock
        signal.setitimer(signal.ITIMER_REAL, self._stop_timeout_s + _KILL_MARGIN_S)
        # its own bound is a later one, so that a port that hangs is seen hanging, with all stacks
        teardown.step("port", lambda: self._thread.stop(until_s + 2 * MARGIN_S), until_s)
        teardown.step("ring", self._ring.close, until_s)
        signal.setitimer(signal.ITIMER_REAL, 0)

    def sweep(self) -> None:
        """Remove the segments of dead workers."""
        from ucxx_transport.ring.orphans import sweep_orphans

        sweep_orphans(self._ring.folder)


class _Main:
    """What a sidecar has been ordered to do."""

    def __init__(self, order: Mapping[str, Any], report_fd: int, stderr_fd: int) -> None:
        os.set_blocking(report_fd, False)
        self._report_fd = report_fd
        self._stderr_fd = stderr_fd
        self._worker = WorkerEnd(order["worker_pid"])
        self._serve = order["serve"]
        self._served: Served | None = None
        self._renewer: Renewer | None = None

    def report(self, **report: object) -> None:
        """Send the worker a report; one that does not fit is dropped: the worker has been blocked for a long time."""
        with suppress(OSError):  # or it has died: what follows notices
            os.write(self._report_fd, json.dumps(report, ensure_ascii=False).encode() + b"\n")

    def run(self, role: str) -> int:
        """Serve and renew until the close frame, or the worker's end; returns the exit status."""
        try:
            self._served = None if self._serve is None else Served(self._serve)
        except TransportError as error:
            self.report(failed=type(error).__name__, reason=str(error))
            return 1
        for descriptor in (1, 2):  # UCX logs to standard output, which may be what the worker talks to a program by
            os.dup2(self._stderr_fd, descriptor)
        self.report(up={"port": None if self._served is None else self._served.port})
        end = self._obey()
        if self._renewer is not None:
            self._renewer.end(revoke=end is _End.ABANDONED)
        if end is _End.ABANDONED and self._sweep_within(SOON_S):
            self._leave_at_once()
        teardown = Teardown("sidecar", role=role)
        if self._served is not None:
            self._served.stop(teardown)
        is_dead = end is _End.ABANDONED and self._sweep_within(DYING_S)
        if self._renewer is not None:
            self._renewer.join(REVOKE_S if is_dead else LEAVE_S)
        return 0 if teardown.is_clean and end is not _End.BROKEN else 1

    def _leave_at_once(self) -> NoReturn:
        """Once nothing is left to be done: peers see their connections reset, and UCX has no chance to crash."""
        if self._renewer is not None:
            self._renewer.join(REVOKE_S)
        os._exit(0)

    def _sweep_within(self, limit_s: float) -> bool:
        """Remove the segments of dead workers once this one is dead; False: it is not yet."""
        is_dead = self._worker.wait_until_gone(limit_s)
        if is_dead and self._served is not None:
            self._served.sweep()
        return is_dead

    def _obey(self) -> _End:
        watched = select.poll()
        watched.register(0, select.POLLIN | select.POLLHUP)
        if self._worker.pidfd >= 0:
            watched.register(self._worker.pidfd, select.POLLIN)
        unread = b""
        while True:
            seen = {descriptor for descriptor, _ in watched.poll(LOOK_S * 1000)}
            if 0 in seen:
                part = os.read(0, 65536)
                *lines, unread = (unread + part).split(b"\n")
                for line in map(json.loads, lines):
                    if line.get("close"):
                        return _End.CLOSED
                    self._keep(line["lease_id"], line["store"])
                if not part:
                    return _End.ABANDONED
            elif self._worker.is_gone:  # and all that it had sent was read
                return _End.ABANDONED
            elif self._served is not None and not self._served.is_alive:
                return _End.BROKEN

    def _keep(self, lease_id: int | None, store: Mapping[str, Any]) -> None:
        if self._renewer is None or self._renewer.store != store:
            if self._renewer is not None:
                self._renewer.end(revoke=False)
            self._renewer = Renewer(store, self._worker, self.report)
        self._renewer.keep(lease_id)


def main(order: Mapping[str, Any], *, report_fd: int, stderr_fd: int, role: str) -> int:
    """The process; returns its exit status.

    Args:
        order: the first line on standard input; see `launch`.
        report_fd: where reports are written to.
        stderr_fd: the worker's standard error, for the time when it is up.
        role: in front of its log lines.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    log_to_stderr(role, order["log_level"])
    return _Main(order, report_fd, stderr_fd).run(role)
