"""The sidecar process, once `boot` has started it for `launch`.

It serves a port of a ring, renews leases, or both, for as long as its worker lives, whatever else it is sent:
signals that ask a whole job to end are the worker's affair, which may still have payloads to hand out.

| what it sees                                      | the port   | the leases                     | then              |
|---------------------------------------------------|------------|--------------------------------|-------------------|
| the worker runs, however busy                     | is served  | are renewed                    | –                 |
| the worker is stopped (SIGSTOP, a debugger)       | is served  | are not renewed                | –                 |
| the close frame                                   | is closed  | are left as they are           | it ends           |
| end of file without it: the worker is dying       | is served  | are not renewed                | it waits for that |
| the worker is dead                                | is closed  | are revoked                    | it sweeps, ends   |
| the thread of its port has died                   | is closed  | are left as they are           | it ends           |
| SIGTERM, SIGINT, SIGHUP                           | is served  | are renewed                    | –                 |
| a store that does not answer                      | is served  | are tried again                | –                 |
"""

from __future__ import annotations

import faulthandler
import gc
import json
import math
import os
import select
import signal
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, NoReturn

from ucxx_transport.config import ServerConfig, StoreConfig
from ucxx_transport.errors import TransportError
from ucxx_transport.logs import get_logger, log_to_stderr
from ucxx_transport.machine import Owner, is_stopped, owner_alive, process_start

if TYPE_CHECKING:
    from ucxx_transport.membership.renewal import LeaseRenewer
    from ucxx_transport.ring import SharedRingBuffer
    from ucxx_transport.server.port import PortThread

_log = get_logger(__name__)

MESSAGE_BYTES: Final = 1 << 17  # of the longest message
REASON_CHARS: Final = 4096  # of the reason of a failed start: a report is read whole
# How often the worker and the port are looked at. The worker's end shows at once by its pidfd, where the kernel has
# that, and by the end of file, unless a process that it has forked keeps the pipe open.
LOOK_S: Final = 2.0
_POLL_S: Final = 0.01  # how often the worker is looked at while its end is waited for
DYING_S: Final = 60.0  # from the end of its descriptors to its own: the kernel frees some 10 GiB of memory a second
REVOKE_S: Final = 10.0  # how long a store that does not answer is waited for at the end
_KILL_MARGIN_S: Final = 2.0  # after a bounded stop the process is ended with its stacks: one inside UCX may not answer


def worker_of(pid: int) -> Owner:
    """The process that started this one; where it is gone, and its pid maybe another's, one that no longer runs."""
    if os.getppid() == pid:
        with suppress(OSError):
            return Owner(pid, process_start(pid))
    return Owner(pid, 0)


class _Main:
    """What a sidecar has been ordered to do."""

    def __init__(self, worker: int, worker_pid: int) -> None:
        os.set_blocking(worker, False)
        self._socket = worker
        self._worker = worker_of(worker_pid)
        self._ring: SharedRingBuffer | None = None
        self._port: PortThread | None = None
        self._stop_timeout_s = 0.0
        self._renewers: dict[int, LeaseRenewer] = {}

    def report(self, **report: object) -> None:
        """Send the worker a report; one that does not fit is dropped: the worker has been blocked for a long time."""
        with suppress(OSError):  # or it has died: what follows notices
            os.write(self._socket, json.dumps(report).encode())

    def run(self, serve: Mapping[str, Any] | None, errors: int) -> int:
        """Serve and renew until the close frame, or the worker's end; returns the exit status."""
        try:
            port = None if serve is None else self._start_port(serve)
        except TransportError as error:
            self.report(failed=type(error).__name__, reason=str(error)[:REASON_CHARS])
            return 1
        for number in (1, 2):  # until here that was kept, for the error of a start that fails
            os.dup2(errors, number)
        os.close(errors)
        self.report(up=port)
        end = self._obey()
        self._renew_no_more()
        if end == "dead":
            self._leave()
        if self._port is not None and self._ring is not None:  # both are, or neither
            faulthandler.dump_traceback_later(self._stop_timeout_s + _KILL_MARGIN_S, exit=True)
            self._port.stop(time.monotonic() + self._stop_timeout_s)
            self._ring.close()
            faulthandler.cancel_dump_traceback_later()
        return int(end == "broken")

    def _start_port(self, order: Mapping[str, Any]) -> int:
        """Serve one port of a ring, as `ucxx_transport.server.server` orders it; returns the port."""
        from ucxx_transport.ring import SharedRingBuffer
        from ucxx_transport.server.port import PortThread

        sys.modules["pynvml"] = None  # type: ignore[assignment]  # ucxx would import it, and ask a driver: nothing is used
        folder, descriptor = Path(order["ring_folder"]), order["descriptor"]
        self._ring = SharedRingBuffer.attach(order["ring_name"], folder=folder, descriptor=descriptor)
        if descriptor is not None:
            os.close(descriptor)
        gc.freeze()  # what is loaded is no garbage: to look through all of it would halt the port for some 10 ms
        settings = ServerConfig(**order["settings"])  # all of them: this process's environment and files have no say
        self._stop_timeout_s = settings.stop_timeout_s
        self._port = PortThread(self._ring, settings, order["index"], order["port"])
        self._port.start()
        return self._port.up.result()  # the worker knows when that takes too long

    def _leave(self) -> NoReturn:
        """The worker is dead: peers see their connections reset, and UCX has no chance to crash."""
        if self._ring is not None:
            from ucxx_transport.ring.segment import sweep_orphans

            sweep_orphans(self._ring.folder)
        for lease_id, renewer in self._renewers.items():
            try:
                renewer.store().revoke(lease_id, timeout_s=REVOKE_S)
            except TransportError as error:
                _log.warning("lease_not_revoked", lease=lease_id, reason=str(error))
        os._exit(0)

    def _obey(self) -> Literal["closed", "dead", "broken"]:
        """Until the end, and which it is."""
        watched = select.poll()
        watched.register(self._socket, select.POLLIN | select.POLLHUP)
        with suppress(AttributeError, OSError):  # before Linux 5.3, in some sandboxes
            watched.register(os.pidfd_open(self._worker.pid), select.POLLIN)
        look_s, dead_by_s = LOOK_S, math.inf
        while time.monotonic() < dead_by_s:
            if self._socket in dict(watched.poll(look_s * 1000)):
                order = receive(self._socket)
                if order is None:
                    self._renew_no_more()
                    watched.unregister(self._socket)
                    look_s, dead_by_s = _POLL_S, time.monotonic() + DYING_S
                elif order:
                    self._keep({int(lease_id): store for lease_id, store in order["leases"].items()})
                else:
                    return "closed"
            elif not owner_alive(*self._worker):  # and all that it had sent was read
                return "dead"
            elif self._port is not None and not self._port.alive:
                return "broken"
        return "broken"

    def _renew_no_more(self) -> None:
        for renewer in self._renewers.values():
            renewer.stop(0.0)

    def _keep(self, leases: Mapping[int, Mapping[str, Any]]) -> None:
        from ucxx_transport.membership.renewal import LeaseRenewer
        from ucxx_transport.membership.store_url import open_store

        for lease_id in self._renewers.keys() - leases.keys():
            self._renewers.pop(lease_id).stop(0.0)
        for lease_id in leases.keys() - self._renewers.keys():
            store = leases[lease_id]
            self._renewers[lease_id] = renewer = LeaseRenewer(
                cache(partial(open_store, store["url"], StoreConfig(**store["config"]))),
                lease_id,
                store["interval_s"],
                on_renewed=partial(self.report, kept=lease_id),
                is_held=partial(is_stopped, self._worker.pid),
            )
            renewer.start()


def receive(worker: int) -> Mapping[str, Any] | None:
    """The worker's next order; None at the end of file."""
    try:
        order = os.read(worker, MESSAGE_BYTES)
    except ConnectionError:  # it has not read all that it was sent
        return None
    return json.loads(order) if order else None


def main(worker: int, errors: int, role: str) -> int:
    """The process; returns its exit status. `errors` becomes the standard output and error when it is up."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    order = receive(worker)
    if order is None:
        return 1  # the worker has died meanwhile
    log_to_stderr(role, order["log_level"])
    return _Main(worker, order["worker_pid"]).run(order["serve"], errors)
