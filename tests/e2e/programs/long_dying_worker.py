"""A worker in the middle of its death: its descriptors are closed, its process is still there.

`python -m tests.e2e.programs.long_dying_worker` says `{"ring": …, "port": …, "server": pid}` and waits to be killed.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys

from tests.e2e.programs.request_lines import answer
from ucxx_transport import RingConfig, ServerConfig, SharedRingBuffer
from ucxx_transport.server.port import to_order
from ucxx_transport.sidecar import boot


def main() -> None:
    """Start a sidecar as `ucxx_transport.sidecar.launch` does, and close its standard input without a close frame."""
    ring = SharedRingBuffer.create(RingConfig(slots=2, slot_bytes=4096))
    reports, theirs = os.pipe()
    errors = os.dup(2)
    sidecar = subprocess.Popen(
        [sys.executable, "-P", boot.__file__, str(theirs), str(errors), "ucxx port 0"],
        stdin=subprocess.PIPE,
        pass_fds=(theirs, errors),
    )
    os.close(theirs)
    assert sidecar.stdin is not None
    settings = to_order(ServerConfig(host="127.0.0.1", ports=1))
    serve = {
        "ring_name": ring.name,
        "ring_folder": str(ring.folder),
        "index": 0,
        "candidates": [0],
        "settings": settings,
    }
    order = {"sys_path": sys.path, "worker_pid": os.getpid(), "log_level": logging.INFO, "serve": serve}
    sidecar.stdin.write(json.dumps(order).encode() + b"\n")
    sidecar.stdin.flush()
    with open(reports, "rb") as lines:
        port = json.loads(lines.readline())["up"]
    sidecar.stdin.close()
    answer({"ring": ring.name, "port": port, "server": sidecar.pid})
    signal.pause()


if __name__ == "__main__":
    main()
