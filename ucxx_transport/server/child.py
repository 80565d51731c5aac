"""The server process: `python -m ucxx_transport.server.child READY_FD`, started by `Supervisor` and by nothing else.

It lives as long as its worker: the end of its standard input, SIGTERM, or the kernel's parent-death signal stops it.
When the worker died without a word it also sweeps the segment the worker left in /dev/shm.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
import time
from contextlib import suppress
from functools import partial

import structlog

from ucxx_transport.errors import TransportError
from ucxx_transport.link.ucxx import UCXXLink
from ucxx_transport.ring import SharedRingBuffer
from ucxx_transport.ring.orphans import sweep_orphans
from ucxx_transport.server.port_group import PortGroup
from ucxx_transport.server.process_protocol import ServerOrder, ServerReport

_PR_SET_PDEATHSIG = 1
# After a bounded stop the kernel ends what is left: a process inside UCX may not answer.
_KILL_MARGIN_S = 2
# Parent looked at this often besides the two signals of its death: both are lost if it died before they were set.
_PARENT_LOOK_S = 1.0


def _log_to_stderr() -> None:
    os.dup2(2, 1)  # UCX logs to standard output, which may be what the worker talks to somebody by
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))


def _die_with_parent() -> None:
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _signal_pipe() -> int:
    """A descriptor that becomes readable when a signal to stop arrives."""
    readable, writable = os.pipe()
    os.set_blocking(writable, False)
    signal.set_wakeup_fd(writable)
    signal.signal(signal.SIGTERM, lambda *_: None)
    # Ctrl-C reaches the whole foreground group; the worker decides when its server stops.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return readable


def _wait_for_end(worker_pid: int, signals: int, group: PortGroup) -> bool:
    """Wait until asked to stop or orphaned (True), or a port has died (False): the worker then starts another child."""
    watched = select.poll()
    watched.register(0, select.POLLIN | select.POLLHUP)
    watched.register(signals, select.POLLIN)
    while os.getppid() == worker_pid:
        if watched.poll(_PARENT_LOOK_S * 1000):
            return True
        if not group.all_alive:
            return False
    return True


def _report(ready_fd: int, report: ServerReport) -> None:
    with suppress(OSError):  # the worker died meanwhile: what follows notices
        os.write(ready_fd, report.to_line())
    os.close(ready_fd)


def main(ready_fd: int) -> int:
    """Serve until told to stop or orphaned; returns the exit status."""
    _log_to_stderr()
    _die_with_parent()
    signals = _signal_pipe()
    order = ServerOrder.from_line(sys.stdin.buffer.readline())
    config = order.config
    try:
        ring = SharedRingBuffer.attach(order.ring_name)
        factory = partial(UCXXLink.open, shm_lanes=config.shm_lanes, spin_s=config.spin_s, ucx=config.ucx)
        group = PortGroup(ring, config, factory)
        ports = group.start(time.monotonic() + config.start_timeout_s)
    except TransportError as error:
        _report(ready_fd, ServerReport(error_class=type(error).__name__, error=str(error)))
        return 1
    _report(ready_fd, ServerReport(ports=ports))
    asked = _wait_for_end(order.worker_pid, signals, group)
    signal.setitimer(signal.ITIMER_REAL, config.stop_timeout_s + _KILL_MARGIN_S)  # SIGALRM ends a hung stop
    ended = group.stop(time.monotonic() + config.stop_timeout_s)
    if os.getppid() != order.worker_pid:
        sweep_orphans()
    ring.close()
    return 0 if ended and asked else 1


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
