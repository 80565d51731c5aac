"""The sidecar as its worker sees it: a process that serves a port of a ring, renews a lease, or both; kept alive.

A sidecar is spawned, not forked, in a process group of its own, so that a signal to the worker's group does not end it
before it has cleaned up. Each way goes a pipe with lines of JSON:

| from    | line                                         | means                                                       |
|---------|----------------------------------------------|-------------------------------------------------------------|
| worker  | `{"sys_path": […], "worker_pid": n,          | the first: where its modules are, whose sidecar it is,      |
|         | "log_level": m, "serve": {…}}`               | and what it serves (null: nothing)                          |
| worker  | `{"lease_id": 7, "store": {…}}`              | renew this lease from now on (null: none), there, so often  |
| worker  | `{"close": true}`                            | the close frame: end, and leave the lease as it is          |
| worker  | end of file without that                     | the worker is dying                                         |
| sidecar | `{"up": 5001}`                               | it is up, and serves that port (null: none)                 |
| sidecar | `{"failed": class, "reason": …}`             | it could not start, and ends                                |
| sidecar | `{"died": reason}`                           | an error that no one expected ends it                       |
| sidecar | `{"lease_id": 7, "renewed_s": …}`            | renewed, by a call made then (CLOCK_MONOTONIC)              |
| sidecar | `{"lease_id": 7, "lost": reason}`            | the store answered twice that there is no such lease        |
"""

from __future__ import annotations

import math
import os
import select
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any, Final, NamedTuple

from ucxx_transport.backoff import random_pause_s
from ucxx_transport.errors import ConfigError, DeadlineExceededError, TransportError
from ucxx_transport.logs import get_logger
from ucxx_transport.sidecar.process import SidecarProcess

_log = get_logger(__name__)

Order = Mapping[str, object]
"""What a sidecar is to do, as plain JSON values. A `descriptor` in it is handed over: inherited, and closed here."""

Hear = Callable[[dict[str, Any] | None], None]
"""Gets the reports of a lease's renewal, and None when the process has died or could not be started."""

LOOK_S: Final = 1.0
"""How often a sidecar that is up is looked at."""

_REAP_S: Final = 5.0
_HEALTHY: Final = 10
_ERRORS: Final = {cls.__name__: cls for cls in (ConfigError, DeadlineExceededError)}


class Status(NamedTuple):
    """The pid of the process that is up, None while there is none; and how often one that was up has died unasked."""

    pid: int | None
    restarts: int


class Sidecar:
    """Keeps one sidecar beside this process, from a thread: starts it, reads its reports, starts it again when it dies.

    It may be started again after a stop. A forked child must leave it alone.

    Args:
        role: in front of its log lines, such as "ucxx port 0".
        serve: makes the order of what it serves, at every start; None: it only renews.
        start_timeout_s: one that is not up by then is killed and started again.
        on_up: called in the thread with what each that is up says: its port.
        on_death: called in the thread when one has died unasked, before it is started again.
        pauses_s: the first and the longest before it is started again; for the first that dies young there is none.
            One that was up for ten times the first pause has died of something else than its start.
        is_stalled: asked in the thread every `LOOK_S` or so while one is up; True: it is killed, and so started again.

    Attributes:
        status: now.
    """

    def __init__(
        self,
        role: str,
        *,
        pauses_s: tuple[float, float],
        serve: Callable[[], Order] | None = None,
        start_timeout_s: float = 30.0,
        on_up: Callable[[Any], None] = lambda _: None,
        on_death: Callable[[], None] = lambda: None,
        is_stalled: Callable[[], bool] = lambda: False,
    ) -> None:
        self._role = role
        self._serve = serve
        self._pauses_s = pauses_s
        self._start_timeout_s = start_timeout_s
        self._on_up, self._on_death, self._is_stalled = on_up, on_death, is_stalled
        self._lock = threading.RLock()  # a signal handler may stop what is just being stopped
        self._thread: threading.Thread | None = None
        self._process: SidecarProcess | None = None
        self._tenant: Hear | None = None
        self._tenant_order: Order | None = None
        self._first: Future[Any] = Future()
        self._stop_by_s = math.inf
        self._wake = -1
        self.status = Status(None, 0)

    @property
    def is_running(self) -> bool:
        """Whether it was started and not stopped."""
        return self._thread is not None

    def start(self) -> None:
        """Start it from the thread, and return at once; one that runs goes on."""
        with self._lock:
            if self._thread is None:
                self._stop_by_s, self._first, self._wake = math.inf, Future(), os.eventfd(0)
                self._thread = threading.Thread(target=self._run, name="ucxx-sidecar", daemon=True)
                self._thread.start()

    def wait_up(self, until_s: float) -> Any:
        """Wait until the first one is up; returns what it says, its port. After an error `stop` it.

        Args:
            until_s: on `time.monotonic()`.

        Raises:
            ConfigError, TransportError: it could not start.
            DeadlineExceededError: it was not up in time.
        """
        try:
            return self._first.result(max(0.0, until_s - time.monotonic()))
        except FutureTimeoutError:
            raise DeadlineExceededError("the sidecar did not come up in time", role=self._role) from None

    def begin_stop(self, until_s: float) -> None:
        """`stop` without its wait, so that several end side by side."""
        with self._lock:
            if self._thread is not None and self._stop_by_s == math.inf:
                self._stop_by_s = until_s
                os.eventfd_write(self._wake, 1)

    def stop(self, until_s: float) -> None:
        """End it: by the close frame, and by SIGKILL once `until_s` (monotonic) has passed. Idempotent.

        Raises:
            DeadlineExceededError: it has not ended, although it was killed: the kernel holds it.
        """
        self.begin_stop(until_s)
        thread = self._thread
        if thread is None:
            return
        thread.join(max(0.0, until_s - time.monotonic()) + _REAP_S)
        if thread.is_alive():
            raise DeadlineExceededError(
                "the sidecar was killed and has not ended", role=self._role, pid=self.status.pid
            )
        with self._lock:
            if self._thread is thread:
                self._thread = None
                os.close(self._wake)

    def keep(self, hear: Hear, order: Order | None) -> bool:
        """Renew a lease too, in every process from now on; None: no longer. False: it renews another's."""
        with self._lock:
            if self._tenant not in {None, hear}:
                return False
            self._tenant, self._tenant_order = (hear, order) if order is not None else (None, None)
            if self._process is not None and order is not None:
                self._process.write(order)
            return True

    # the thread

    def _run(self) -> None:
        (first_s, longest_s), young, pause = self._pauses_s, 0, 0.0
        while not self._wait(pause):
            up_s = 0.0
            try:
                up_s, reason = self._attend()
            except Exception as error:  # noqa: BLE001 - the edge of a thread: it goes on
                reason = str(error)
                if not isinstance(error, TransportError):  # no memory, no descriptors
                    reason = f"{type(error).__name__}: {error}"
                    cause = error
                    error = TransportError("the sidecar could not be started", role=self._role, reason=reason)
                    error.__cause__ = cause
                if not self._first.done():
                    self._first.set_exception(error)
                    if self._serve is not None:
                        return  # a server that never came up is its caller's to start again
            if self._is_stopping:
                return
            if (hear := self._tenant) is not None:
                hear(None)
            young = 0 if up_s >= _HEALTHY * first_s else young + 1
            pause = 0.0
            if young > 1:
                pause = random_pause_s(young - 1, first_s=first_s, longest_s=longest_s)
            _log.warning(
                "sidecar_died", role=self._role, reason=reason, restarts=self.status.restarts, pause_s=round(pause, 3)
            )

    @property
    def _is_stopping(self) -> bool:
        return self._stop_by_s < math.inf

    def _attend(self) -> tuple[float, str]:
        """One process from its start to its end; returns how long it was up, and how it ended.

        Raises:
            TransportError: it did not come up.
        """
        process = SidecarProcess(self._role, None if self._serve is None else self._serve())
        with self._lock:
            self._process = process
            if self._tenant_order is not None:
                process.write(self._tenant_order)
        try:
            self._follow(process)
        finally:
            was_asked, came_up_s = self._is_stopping, process.came_up_s
            with self._lock:
                self._process = None
                self.status = Status(None, self.status.restarts + (came_up_s is not None and not was_asked))
            if was_asked:
                process.end(self._stop_by_s)
            else:
                process.popen.kill()  # unless it has ended
            how = process.reap()
        if was_asked:
            return 0.0, how
        if came_up_s is None:
            raise TransportError(f"the sidecar died at its start: {how}", role=self._role)
        self._on_death()
        return time.monotonic() - came_up_s, how

    def _follow(self, process: SidecarProcess) -> None:
        """Read its reports until it ends or a stop is asked for."""
        judged_s = time.monotonic()
        start_by_s = judged_s + self._start_timeout_s
        while not self._wait(min(LOOK_S, self._start_timeout_s), process.reports):
            had_ended = process.popen.poll() is not None  # looked at first: all that it reported is there to be read
            reports = process.read()
            for report in reports or ():
                self._take(report, process)
            if reports is None or (had_ended and not reports):  # another thread's fork may have kept its pipe open
                return
            now_s = time.monotonic()
            if process.came_up_s is None:
                if now_s >= start_by_s:
                    raise DeadlineExceededError("the sidecar did not come up in time", role=self._role)
            elif (since_s := now_s - judged_s) >= LOOK_S:
                judged_s = now_s
                # a worker that was itself stopped meanwhile does not judge
                if since_s < 2 * LOOK_S and self._is_stalled():
                    _log.warning("sidecar_stalled", role=self._role, pid=process.popen.pid)
                    process.popen.kill()

    def _take(self, report: dict[str, Any], process: SidecarProcess) -> None:
        if "up" in report:
            self._on_up(report["up"])
            process.came_up()
            self.status = Status(process.popen.pid, self.status.restarts)
            if not self._first.done():
                self._first.set_result(report["up"])
        elif "failed" in report:
            raise _ERRORS.get(report["failed"], TransportError)(report["reason"])
        elif "died" in report:
            process.last_words = report["died"]
        elif (hear := self._tenant) is not None:
            hear(report)

    def _wait(self, timeout_s: float, reports: int = -1) -> bool:
        """Until there is a report, the time is up, or a stop is asked for: True."""
        watched = select.poll()
        watched.register(self._wake, select.POLLIN)
        if reports >= 0:
            watched.register(reports, select.POLLIN | select.POLLHUP)
        watched.poll(timeout_s * 1000)
        return self._is_stopping
