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
| sidecar | `{"up": {"port": 5001}}`                     | it is up                                                    |
| sidecar | `{"failed": class, "reason": …}`             | it could not start, and ends                                |
| sidecar | `{"lease_id": 7, "renewed_s": …}`            | renewed, by a call made then (CLOCK_MONOTONIC)              |
| sidecar | `{"lease_id": 7, "lost": reason}`            | the store answered twice that there is no such lease        |
"""

from __future__ import annotations

import os
import random
import select
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, Protocol

from ucxx_transport.backoff import pause_s
from ucxx_transport.errors import ConfigError, DeadlineExceededError, TransportError
from ucxx_transport.logs import get_logger
from ucxx_transport.sidecar.process import SidecarProcess

_log = get_logger(__name__)

Order = Mapping[str, object]
"""What a sidecar is to do, as plain JSON values. A `descriptor` in it is handed over: inherited, and closed here."""

LOOK_S: Final = 1.0
"""How often a sidecar that is up is looked at."""

_REAP_S: Final = 5.0
_ERRORS: Final = {cls.__name__: cls for cls in (ConfigError, DeadlineExceededError)}


@dataclass(slots=True)
class Restarts:
    """When a sidecar that has died is started again: at once, or ever later while it dies young.

    Attributes:
        longest_s: the longest pause.
        healthy_after_s: one that was up for so long has died of something else than its start.
        first_s: the first pause.
    """

    longest_s: float
    healthy_after_s: float
    first_s: float = 0.05
    _young: int = field(default=0, init=False)

    def pause_after(self, up_s: float, *, jitter: float) -> float:
        """Seconds until the next start.

        Args:
            up_s: how long the one that died was up, 0 if it did not come up.
            jitter: a number of [0, 1).
        """
        self._young = 0 if up_s >= self.healthy_after_s else self._young + 1
        if self._young <= 1:
            return 0.0
        return pause_s(self._young - 1, first_s=self.first_s, longest_s=self.longest_s, jitter=jitter)


class Status(NamedTuple):
    """The pid of the process that is up, None while there is none; and how often one that was up has died unasked."""

    pid: int | None
    restarts: int


class Tenant(Protocol):
    """Work that a sidecar does beside what it serves: a lease to renew (`ucxx_transport.membership.renewal`)."""

    @property
    def order(self) -> Order:
        """What is to be done now: the first line of it that a process gets."""

    def hear(self, report: dict[str, Any]) -> None:
        """A report of its work has arrived."""

    def hear_death(self) -> None:
        """The process has died, or could not be started: its reports count no more."""


class Sidecar:
    """Keeps one sidecar beside this process, from a thread: starts it, reads its reports, starts it again when it dies.

    It may be started again after a stop. A forked child must leave it alone.

    Args:
        role: in front of its log lines, such as "ucxx port 0".
        serve: makes the order of what it serves, at every start; None: it only renews.
        restarts: when it is started again.
        start_timeout_s: one that is not up by then is killed and started again.
        on_up: called in the thread with the facts of each that is up.
        on_death: called in the thread when one has died unasked, before it is started again.
        is_stalled: asked in the thread every `LOOK_S` or so while one is up; True: it is killed, and so started again.

    Attributes:
        status: now.
    """

    def __init__(
        self,
        role: str,
        *,
        restarts: Restarts,
        serve: Callable[[], Order] | None = None,
        start_timeout_s: float = 30.0,
        on_up: Callable[[dict[str, Any]], None] = lambda _: None,
        on_death: Callable[[], None] = lambda: None,
        is_stalled: Callable[[], bool] = lambda: False,
    ) -> None:
        self._role = role
        self._serve = serve
        self._restarts = restarts
        self._start_timeout_s = start_timeout_s
        self._on_up, self._on_death, self._is_stalled = on_up, on_death, is_stalled
        self._lock = threading.RLock()  # a signal handler may stop what is just being stopped
        self._thread: threading.Thread | None = None
        self._process: SidecarProcess | None = None
        self._tenant: Tenant | None = None
        self._first: Future[dict[str, Any]] = Future()
        self._stopping = threading.Event()
        self._stop_by_s = 0.0
        self._wake = -1
        self.status = Status(None, 0)

    @property
    def is_running(self) -> bool:
        """Whether it was started and not stopped."""
        return self._thread is not None

    def start(self) -> None:
        """Start it from the thread, and return at once; one that runs goes on."""
        with self._lock:
            if self._thread is not None:
                return
            self._stopping, self._first = threading.Event(), Future()
            self._wake = os.eventfd(0)
            self._thread = threading.Thread(target=self._run, name="ucxx-sidecar", daemon=True)
            self._thread.start()

    def wait_up(self, until_s: float) -> dict[str, Any]:
        """Wait until the first one is up; returns its facts. After an error `stop` it.

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
            if self._thread is not None and not self._stopping.is_set():
                self._stop_by_s = until_s
                self._stopping.set()
                os.eventfd_write(self._wake, 1)

    def stop(self, until_s: float) -> None:
        """End it: by the close frame, and by SIGKILL once `until_s` (monotonic) has passed. Idempotent.

        Raises:
            DeadlineExceededError: it has not ended, although it was killed: the kernel holds it.
        """
        self.begin_stop(until_s)
        with self._lock:
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

    def adopt(self, tenant: Tenant) -> bool:
        """Do this work too, in every process, until `release`; False: there is another tenant."""
        with self._lock:
            if self._tenant is not None:
                return False
            self._tenant = tenant
            self.update(tenant)
            return True

    def release(self, tenant: Tenant) -> None:
        """Do the tenant's work no longer. Idempotent."""
        with self._lock:
            if self._tenant is tenant:
                self._tenant = None

    def update(self, tenant: Tenant) -> None:
        """Send it the order of its tenant as it is now, if it runs; one that is started later gets it then."""
        with self._lock:
            if self._process is not None and self._tenant is tenant:
                self._process.write(tenant.order)

    # the thread

    def _run(self) -> None:
        while not self._stopping.is_set():
            up_s, reason = 0.0, ""
            try:
                up_s, reason = self._attend()
            except TransportError as error:
                reason = str(error)
                self._fail(error)
            except Exception as error:  # noqa: BLE001 - the edge of a thread: no memory, no descriptors; it goes on
                reason = f"{type(error).__name__}: {error}"
                self._fail(TransportError("the sidecar could not be started", role=self._role, reason=reason), error)
            if self._stopping.is_set() or (self._serve is not None and self._first.done() and self._first.exception()):
                return  # a server that never came up is its caller's to start again
            if (tenant := self._tenant) is not None:
                tenant.hear_death()
            pause = self._restarts.pause_after(up_s, jitter=random.random())  # noqa: S311 - it protects nothing
            _log.warning(
                "sidecar_died", role=self._role, reason=reason, restarts=self.status.restarts, pause_s=round(pause, 3)
            )
            self._wait((), pause)

    def _attend(self) -> tuple[float, str]:
        """One process from its start to its end; returns how long it was up, and how it ended."""
        serve = None if self._serve is None else self._serve()
        process = SidecarProcess(self._role, serve)
        with self._lock:
            self._process = process
            if self._tenant is not None:
                process.write(self._tenant.order)
        came_up_s: float | None = None
        try:
            came_up_s = self._follow(process)
        finally:
            was_asked = self._stopping.is_set()
            with self._lock:
                self._process = None
                self.status = Status(None, self.status.restarts + (came_up_s is not None and not was_asked))
            if was_asked:
                process.end(self._stop_by_s)
            elif came_up_s is None:
                process.popen.kill()
            how = process.reap()
        up_s = 0.0 if came_up_s is None else time.monotonic() - came_up_s
        if came_up_s is not None and not was_asked:
            self._on_death()
        return up_s, how

    def _follow(self, process: SidecarProcess) -> float | None:
        """Read its reports until it ends or a stop is asked for; returns when it came up."""
        came_up_s: float | None = None
        looked_s = judged_s = time.monotonic()
        start_by_s = looked_s + self._start_timeout_s
        watched = {process.reports, process.pidfd} - {-1}
        while not self._stopping.is_set():
            self._wait(watched, LOOK_S if came_up_s is not None else min(LOOK_S, start_by_s - looked_s))
            looked_s = time.monotonic()
            if came_up_s is None and looked_s >= start_by_s:
                self._fail(DeadlineExceededError("the sidecar did not come up in time", role=self._role))
                return None
            had_ended = process.has_ended  # looked at first: all that it reported is there to be read
            reports = process.read()
            if reports is None:  # its end; another thread's fork may hold the other end open, so that this may not come
                watched.discard(process.reports)
            for report in reports or ():
                if "up" in report:
                    came_up_s = looked_s
                    self._come_up(process, report["up"])
                else:
                    self._hear(report)
            if had_ended and not reports:
                if came_up_s is None:
                    last = process.pass_errors_on() or "nothing on its standard error"
                    self._fail(TransportError(f"the sidecar died at its start: {last}", role=self._role))
                return came_up_s
            since_s = looked_s - judged_s
            if since_s < LOOK_S:
                continue
            judged_s = looked_s
            # a worker that was itself stopped meanwhile does not judge
            if came_up_s is not None and since_s < 2 * LOOK_S and self._is_stalled():
                _log.warning("sidecar_stalled", role=self._role, pid=process.popen.pid)
                process.popen.kill()
        return came_up_s

    def _come_up(self, process: SidecarProcess, facts: dict[str, Any]) -> None:
        process.pass_errors_on()
        self._on_up(facts)
        self.status = Status(process.popen.pid, self.status.restarts)
        if not self._first.done():
            self._first.set_result(facts)

    def _hear(self, report: dict[str, Any]) -> None:
        if "failed" in report:
            self._fail(_ERRORS.get(report["failed"], TransportError)(report["reason"]))
        elif (tenant := self._tenant) is not None:
            tenant.hear(report)

    def _fail(self, error: TransportError, cause: Exception | None = None) -> None:
        error.__cause__ = cause or error.__cause__
        if not self._first.done():
            self._first.set_exception(error)

    def _wait(self, descriptors: set[int] | tuple[()], timeout_s: float) -> None:
        """Until one of these is readable, the time is up, or a stop is asked for."""
        watched = select.poll()
        for descriptor in descriptors:
            watched.register(descriptor, select.POLLIN | select.POLLHUP)
        watched.register(self._wake, select.POLLIN)
        watched.poll(max(0.0, timeout_s) * 1000)
