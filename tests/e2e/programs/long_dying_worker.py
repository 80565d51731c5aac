"""A worker in the middle of its death: its descriptors are closed, its process is still there.

`python -m tests.e2e.programs.long_dying_worker` says `{"ring": …, "port": …, "server": pid}` and waits to be killed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from tests.e2e.programs.request_lines import answer
from ucxx_transport import RingConfig, ServerConfig, SharedRingBuffer
from ucxx_transport.server.port_settings import PortSettings
from ucxx_transport.server.process_protocol import ServerOrder, ServerReport


def main() -> None:
    """Start a server process as the supervisor does, and close its standard input without a word."""
    ring = SharedRingBuffer.create(RingConfig(slots=2, slot_bytes=4096))
    ready, theirs = os.pipe()
    child = subprocess.Popen(
        [sys.executable, "-m", "ucxx_transport.server.child", str(theirs)], stdin=subprocess.PIPE, pass_fds=(theirs,)
    )
    os.close(theirs)
    assert child.stdin is not None
    settings = PortSettings.of(ServerConfig(host="127.0.0.1", ports=1))
    child.stdin.write(
        ServerOrder(
            ring_name=ring.name, ring_folder=str(ring.folder), worker_pid=os.getpid(), settings=settings
        ).to_line()
    )
    child.stdin.flush()
    with open(ready, "rb") as report:
        ports = ServerReport.from_line(report.readline()).ports
    child.stdin.close()
    answer({"ring": ring.name, "port": ports[0], "server": child.pid})
    signal.pause()


if __name__ == "__main__":
    main()
