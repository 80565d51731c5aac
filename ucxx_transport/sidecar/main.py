"""The sidecar process, once `boot` has started it for `launch`.

It serves a port of a ring, renews a lease, or both, for as long as its worker lives, whatever else it is sent:
signals that ask a whole job to end are the worker's affair, which may still have payloads to hand out.

| what it sees                                      | the port   | the lease                      | then              |
|---------------------------------------------------|------------|--------------------------------|-------------------|
| the worker runs, however busy                     | is served  | is renewed                     | –                 |
| the worker is stopped (SIGSTOP, a debugger)       | is served  | is not renewed                 | –                 |
| the close frame on its standard input             | is closed  | is left as it is               | it ends           |
| end of file there without it: the worker is dying | is closed  | is revoked when that is dead   | as when it is dead|
| the worker is dead                                | is closed  | is revoked                     | it sweeps, ends   |
| the thread of its port has died                   | is closed  | is left as it is               | it ends           |
| SIGTERM, SIGINT, SIGHUP                           | is served  | is renewed                     | –                 |
| a store that does not answer                      | is served  | is tried again                 | –                 |
"""

from __future__ import annotations

import gc
import json
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal, NoReturn

from ucxx_transport.errors import LeaseLostError, StoreResetError, TransportError
from ucxx_transport.logs import get_logger, log_to_stderr
from ucxx_transport.teardown import Teardown

if TYPE_CHECKING:
    from ucxx_transport.membership.store import Store
    from ucxx_transport.ring import SharedRingBuffer
    from ucxx_transport.server.port_thread import PortThread

_log = get_logger(__name__)

# How often the worker and the port are looked at; the worker's end shows at once by the end of file, unless a process
# that it has forked keeps the pipe open.
LOOK_S: Final = 0.5
# How often the worker is looked at while its end is waited for.
_POLL_S: Final = 0.01
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
# Of the reason of a loss: so short a report (PIPE_BUF) is written whole or not at all.
_REASON_CHARS: Final = 500


class WorkerEnd:
    """The worker, as its sidecar sees it in /proc. Not by a pidfd, which old kernels and some builds of Python lack.

    Args:
        pid: the worker's, which started this process.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        # a pid is given to another process some day, and its start time tells the two apart
        self._start = self._stat()[_START] if os.getppid() == pid else b""

    @property
    def is_gone(self) -> bool:
        """Whether its last thread has ended: until then it holds its locks."""
        stat = self._stat()
        return not self._start or stat[_START] != self._start or (stat[_STATE] in b"ZX" and int(stat[_THREADS]) <= 1)

    @property
    def is_stopped(self) -> bool:
        """Whether it is stopped, by SIGSTOP or a debugger, and so answers no request."""
        return self._stat()[_STATE] in _STOPPED

    def wait_until_gone(self, limit_s: float) -> bool:
        """Wait for its end, `limit_s` at most; whether it came."""
        until_s = time.monotonic() + limit_s
        while not self.is_gone:
            if time.monotonic() >= until_s:
                return False
            time.sleep(_POLL_S)
        return True

    def _stat(self) -> list[bytes]:
        """Its line in /proc from the state on (proc(5)); nothing but empty fields when it is gone."""
        try:
            with open(f"/proc/{self._pid}/stat", "rb") as stat:
                return stat.read().rpartition(b")")[2].split()  # the name in parentheses may hold anything
        except OSError:
            return [b""] * (_START + 1)


class Renewer:
    """Renews one lease, in a thread of its own: a store's client blocks, and the port must not wait for it.

    Args:
        lease_id: the lease.
        store: the order of `ucxx_transport.membership.renewal`: which store, and how often.
        worker: while it is stopped, nothing is renewed.
        report: sends what came of a renewal.
    """

    def __init__(self, lease_id: int, store: Mapping[str, Any], worker: WorkerEnd, report: Callable[..., None]) -> None:
        self._lease_id, self._store = lease_id, store
        self._worker, self._report = worker, report
        self._ending = threading.Event()
        self._revokes = self._is_away = False
        self._thread = threading.Thread(target=self._run, name="ucxx-renewer", daemon=True)
        self._thread.start()

    def end(self, *, revoke: bool) -> None:
        """Renew no more; `revoke`: end the lease when the worker is dead."""
        self._revokes = revoke
        self._ending.set()

    def join(self, limit_s: float) -> None:
        """Wait until it has ended; a store that does not answer is not waited for longer than that."""
        self._thread.join(limit_s)

    def _run(self) -> None:
        from ucxx_transport.membership.renewal import open_ordered

        is_last = False
        while not is_last:  # once at least: the lease may have come together with the end
            is_last = self._ending.is_set()
            try:
                with open_ordered(self._store) as store:
                    if not self._renew_until_lost(store) and self._revokes and self._worker.wait_until_gone(DYING_S):
                        store.revoke(self._lease_id)
            except Exception as error:  # noqa: BLE001 - the edge of a thread: the port goes on whatever it was
                self._note(error)
                self._ending.wait(RETRY_S)
            else:
                return

    def _renew_until_lost(self, store: Store) -> bool:
        """Whether the lease was lost before the end."""
        from ucxx_transport.membership.renewal import renew

        interval_s = float(self._store["interval_s"])
        pause_s = 0.0
        while not self._ending.wait(pause_s):
            began_s, pause_s = time.monotonic(), min(RETRY_S, interval_s)
            if self._worker.is_stopped:
                continue
            try:
                renew(store, self._lease_id, timeout_s=interval_s)  # one that hangs must leave time for another
            except (LeaseLostError, StoreResetError) as error:
                self._report(lease_id=self._lease_id, lost=str(error)[:_REASON_CHARS])
                return True
            except TransportError as error:
                self._note(error)
            else:
                self._is_away = False
                self._report(lease_id=self._lease_id, renewed_s=began_s)
                pause_s = max(0.0, began_s + interval_s - time.monotonic())
        return False

    def _note(self, error: Exception) -> None:
        """Once for each row of failures."""
        if not self._is_away:
            self._is_away = True
            _log.warning("lease_not_renewed", lease=self._lease_id, reason=f"{type(error).__name__}: {error}")


class _Main:
    """What a sidecar has been ordered to do."""

    def __init__(self, order: Mapping[str, Any], report_fd: int, errors_fd: int) -> None:
        os.set_blocking(report_fd, False)
        self._report_fd = report_fd
        self._errors_fd = errors_fd
        self._worker = WorkerEnd(order["worker_pid"])
        self._ring: SharedRingBuffer | None = None
        self._port: PortThread | None = None
        self._renewer: Renewer | None = None

    def report(self, **report: object) -> None:
        """Send the worker a report; one that does not fit is dropped: the worker has been blocked for a long time."""
        with suppress(OSError):  # or it has died: what follows notices
            os.write(self._report_fd, json.dumps(report, ensure_ascii=False).encode() + b"\n")

    def run(self, role: str, serve: Mapping[str, Any] | None) -> int:
        """Serve and renew until the close frame, or the worker's end; returns the exit status."""
        try:
            port = None if serve is None else self._start_port(serve)
            for number in (1, 2):  # until here that was kept, for the error of a start that fails
                os.dup2(self._errors_fd, number)
            os.close(self._errors_fd)
            self.report(up=port)
        except TransportError as error:
            self.report(failed=type(error).__name__, reason=str(error))
            return 1
        end = self._obey()
        if self._renewer is not None:
            self._renewer.end(revoke=end == "abandoned")
        if end == "abandoned" and self._sweep_within(SOON_S):
            self._leave_at_once()
        teardown = Teardown("sidecar", role=role)
        self._stop_port(teardown)
        is_dead = end == "abandoned" and self._sweep_within(DYING_S)
        if self._renewer is not None:
            self._renewer.join(REVOKE_S if is_dead else LEAVE_S)
        return 0 if teardown.is_clean and end != "broken" else 1

    def _start_port(self, serve: Mapping[str, Any]) -> int:
        """Serve one port of a ring, as `ucxx_transport.server.server` orders it; returns the port."""
        from ucxx_transport.ring import SharedRingBuffer
        from ucxx_transport.server.port_thread import PortThread, of_order

        settings = of_order(serve["settings"])
        self._stop_timeout_s = settings.stop_timeout_s
        descriptor = serve.get("descriptor")
        self._ring = SharedRingBuffer.attach(serve["ring_name"], folder=serve["ring_folder"], descriptor=descriptor)
        if descriptor is not None:
            os.close(descriptor)
        gc.freeze()  # what is loaded is no garbage: to look through all of it would halt the port for some 10 ms
        self._port = PortThread(self._ring, settings, serve["index"], serve["candidates"])
        self._port.start()
        return self._port.wait_up(time.monotonic() + settings.start_timeout_s)

    def _stop_port(self, teardown: Teardown) -> None:
        """Close the port and unmap the ring, in bounded steps."""
        if self._port is None or self._ring is None:
            return
        until_s = time.monotonic() + self._stop_timeout_s
        # SIGALRM ends a process whose interpreter hangs, in a call of UCX that keeps its lock
        signal.setitimer(signal.ITIMER_REAL, self._stop_timeout_s + _KILL_MARGIN_S)
        teardown.step("port", partial(self._port.stop, until_s), until_s)
        teardown.step("ring", self._ring.close, until_s)
        signal.setitimer(signal.ITIMER_REAL, 0)

    def _leave_at_once(self) -> NoReturn:
        """Once nothing is left to be done: peers see their connections reset, and UCX has no chance to crash."""
        if self._renewer is not None:
            self._renewer.join(REVOKE_S)
        os._exit(0)

    def _sweep_within(self, limit_s: float) -> bool:
        """Remove the segments of dead workers once this one is dead; False: it is not yet."""
        is_dead = self._worker.wait_until_gone(limit_s)
        if is_dead and self._ring is not None:
            from ucxx_transport.ring.orphans import sweep_orphans

            sweep_orphans(self._ring.folder)
        return is_dead

    def _obey(self) -> Literal["closed", "abandoned", "broken"]:
        watched = select.poll()
        watched.register(0, select.POLLIN | select.POLLHUP)
        unread = b""
        while True:
            if watched.poll(LOOK_S * 1000):
                part = os.read(0, 65536)
                *lines, unread = (unread + part).split(b"\n")
                for line in map(json.loads, lines):
                    if line.get("close"):
                        return "closed"
                    self._keep(line["lease_id"], line["store"])
                if not part:
                    return "abandoned"
            elif self._worker.is_gone:  # and all that it had sent was read
                return "abandoned"
            elif self._port is not None and not self._port.alive:
                return "broken"

    def _keep(self, lease_id: int | None, store: Mapping[str, Any]) -> None:
        if self._renewer is not None:
            self._renewer.end(revoke=False)
        self._renewer = None if lease_id is None else Renewer(lease_id, store, self._worker, self.report)


def main(order: Mapping[str, Any], *, report_fd: int, errors_fd: int, role: str) -> int:
    """The process; returns its exit status.

    Args:
        order: the first line on standard input; see `launch`.
        report_fd: where reports are written to.
        errors_fd: what becomes its standard output and error when it is up.
        role: in front of its log lines.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    log_to_stderr(role, order["log_level"])
    return _Main(order, report_fd, errors_fd).run(role, order["serve"])
