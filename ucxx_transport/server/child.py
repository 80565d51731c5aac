"""The server process: `python -m ucxx_transport.server.child READY_FD`, started by `Supervisor` and by nothing else.

It lives as long as its worker, whatever else it is told: signals that ask a whole job to end are the worker's affair,
who may still have payloads to hand out. When the worker died without a word it also sweeps the segment the worker left
in /dev/shm; for that it has a process group of its own, so that what kills the worker's does not kill it.

| what it sees                                        | what it does                                             |
|-----------------------------------------------------|----------------------------------------------------------|
| `GOODBYE` on its standard input                     | stops serving, ends                                      |
| end of file there without it: the worker is dying   | stops serving, waits for the worker's end, sweeps, ends  |
| the worker's end, on its pidfd                      | stops serving, sweeps, ends                              |
| SIGTERM, SIGINT, SIGHUP                             | nothing                                                  |
| the thread of a port has died                       | stops serving, ends: the worker starts another child     |
"""

from __future__ import annotations

import enum
import os
import select
import signal
import sys
import time
from contextlib import suppress

from ucxx_transport.companion import DYING_S, LOOK_S, WorkerEnd
from ucxx_transport.errors import TransportError
from ucxx_transport.logs import log_to_stderr
from ucxx_transport.ring import SharedRingBuffer
from ucxx_transport.ring.orphans import sweep_orphans
from ucxx_transport.server.port_group import PortGroup, ucxx_links
from ucxx_transport.server.process_protocol import GOODBYE, ServerOrder, ServerReport

# After a bounded stop the kernel ends what is left: a process inside UCX may not answer.
_KILL_MARGIN_S = 2


class _End(enum.Enum):
    ASKED = "asked to stop"
    ABANDONED = "the worker is dead or dying"
    BROKEN = "a port has died"


def _log_to_stderr() -> None:
    os.dup2(2, 1)  # UCX logs to standard output, which may be what the worker talks to somebody by
    log_to_stderr("ucxx server")


def _ignore_requests_to_end() -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def _read_order() -> ServerOrder:
    # unbuffered: a goodbye that follows at once must stay in the pipe
    with os.fdopen(0, "rb", buffering=0, closefd=False) as pipe:
        return ServerOrder.from_line(pipe.readline())


def _wait_for_end(worker: WorkerEnd, group: PortGroup) -> _End:
    watched = select.poll()
    watched.register(0, select.POLLIN | select.POLLHUP)
    if worker.pidfd >= 0:
        watched.register(worker.pidfd, select.POLLIN)
    while not worker.is_gone:
        seen = {descriptor for descriptor, _ in watched.poll(LOOK_S * 1000)}
        if 0 in seen:
            return _End.ASKED if os.read(0, len(GOODBYE)) else _End.ABANDONED
        if not seen and not group.all_alive:
            return _End.BROKEN
    return _End.ABANDONED


def _report(ready_fd: int, report: ServerReport) -> None:
    with suppress(OSError):  # the worker died meanwhile: what follows notices
        os.write(ready_fd, report.to_line())
    os.close(ready_fd)


def main(ready_fd: int) -> int:
    """Serve until told to stop or orphaned; returns the exit status."""
    _ignore_requests_to_end()
    _log_to_stderr()
    order = _read_order()
    worker = WorkerEnd(order.worker_pid)
    settings = order.settings
    try:
        ring = SharedRingBuffer.attach(order.ring_name, folder=order.ring_folder)
        group = PortGroup(ring, settings, ucxx_links(settings))
        ports = group.start(time.monotonic() + settings.start_timeout_s)
    except TransportError as error:
        _report(ready_fd, ServerReport(error_class=type(error).__name__, error=str(error)))
        return 1
    _report(ready_fd, ServerReport(ports=ports))
    end = _wait_for_end(worker, group)
    signal.setitimer(signal.ITIMER_REAL, settings.stop_timeout_s + _KILL_MARGIN_S)  # SIGALRM ends a hung stop
    ended = group.stop(time.monotonic() + settings.stop_timeout_s)
    ring.close()
    signal.setitimer(signal.ITIMER_REAL, 0)
    if end is _End.ABANDONED and worker.wait_until_gone(DYING_S):
        sweep_orphans(ring.folder)
    return 0 if ended and end is not _End.BROKEN else 1


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
