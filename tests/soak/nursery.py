"""Starts the harness's programs without the second that their imports take: a process that has done them, and forks.

The harness sends `{"module": …}` with three descriptors, and gets `{"pid": …}`; and `{"pid": …, "status": …}` for each
child that has ended. The nursery never uses UCX, only loads it, so its children may.
"""

from __future__ import annotations

import array
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

__all__ = ["Child", "Nursery"]

ROOT = Path(__file__).resolve().parents[2]
MESSAGE_BYTES = 4096
PRELOADED = (
    "tests.e2e.programs.reader",
    "tests.e2e.programs.writer",
    "ucxx_transport.client.client",
    "ucxx_transport.link.ucx",
    "ucxx_transport.ring",
    "ucxx_transport.server",
    "ucxx._lib.libucxx",
)


class Nursery:
    """The harness's end."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = [sys.executable, "-m", __name__, str(theirs.fileno())]
            self._process = subprocess.Popen(command, cwd=ROOT, pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL)
        self._socket = ours
        self._statuses: dict[int, int] = {}

    def start(self, module: str, log: BinaryIO) -> Child:
        """Run a module's `main()` in a process of its own, its standard error in `log`."""
        child_reads, stdin = os.pipe()
        stdout, child_writes = os.pipe()
        descriptors = array.array("i", [child_reads, child_writes, log.fileno()])
        self._socket.sendmsg(
            [json.dumps({"module": module}).encode()], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)]
        )
        os.close(child_reads)
        os.close(child_writes)
        while "status" in (message := self._hear()):
            pass
        return Child(self, message["pid"], stdin, stdout)

    def status(self, pid: int, wait_s: float = 0.0) -> int | None:
        """Exit status of a child, as `Popen.returncode` says it; None while it runs."""
        end = time.monotonic() + wait_s
        while pid not in self._statuses and select.select([self._socket], [], [], max(0.0, end - time.monotonic()))[0]:
            self._hear()
        return self._statuses.get(pid)

    def close(self) -> None:
        """End the nursery; its children end by themselves."""
        self._socket.close()
        self._process.wait()

    def _hear(self) -> dict[str, int]:
        raw = self._socket.recv(MESSAGE_BYTES)
        assert raw, "the nursery has died"
        message: dict[str, int] = json.loads(raw)
        if "status" in message:
            self._statuses[message["pid"]] = message["status"]
        return message


class Child:
    """A program in its own process.

    Attributes:
        pid: of it. stdin, stdout: our ends of its pipes.
    """

    def __init__(self, nursery: Nursery, pid: int, stdin: int, stdout: int) -> None:
        self._nursery = nursery
        self.pid = pid
        self.stdin = stdin
        self.stdout = stdout

    def poll(self) -> int | None:
        """Exit status, None while it runs."""
        return self._nursery.status(self.pid)

    def wait(self, wait_s: float) -> int | None:
        """Exit status, None if it still runs after `wait_s`."""
        return self._nursery.status(self.pid, wait_s)

    def kill(self, wait_s: float) -> None:
        """SIGKILL, unless it has ended; returns once it has."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
            assert self.wait(wait_s) is not None, f"{self.pid} survives SIGKILL"

    def end_input(self) -> None:
        """Close its standard input."""
        if self.stdin >= 0:
            os.close(self.stdin)
            self.stdin = -1

    def close(self) -> None:
        """Close its pipes."""
        self.end_input()
        os.close(self.stdout)


def serve(harness: socket.socket) -> int:
    """Fork on request. Returns in the nursery when the harness has gone, and in each child when its program is over."""
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    while True:
        readable, _, _ = select.select([harness.fileno(), wake_read], [], [])
        if wake_read in readable:
            os.read(wake_read, MESSAGE_BYTES)
            report_ended(harness)
        if harness.fileno() in readable:
            raw, descriptors, _, _ = socket.recv_fds(harness, MESSAGE_BYTES, 3)
            if not raw:
                return 0
            pid = os.fork()
            if not pid:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                os.close(wake_read)
                os.close(wake_write)
                harness.close()
                return run(json.loads(raw)["module"], descriptors)
            for descriptor in descriptors:
                os.close(descriptor)
            harness.send(json.dumps({"pid": pid}).encode())


def report_ended(harness: socket.socket) -> None:
    """Reap what has ended, and say so."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            return
        harness.send(json.dumps({"pid": pid, "status": os.waitstatus_to_exitcode(status)}).encode())


def run(module: str, descriptors: Sequence[int]) -> int:
    """In the child: the program, as if it had been started by itself."""
    for target, descriptor in enumerate(descriptors):
        os.dup2(descriptor, target)
        os.close(descriptor)
    try:
        importlib.import_module(module).main()
    except BaseException:  # noqa: BLE001 - the edge of a process: whatever ended it is its last word
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    for name in PRELOADED:
        importlib.import_module(name)
    sys.exit(serve(socket.socket(fileno=int(sys.argv[1]))))
