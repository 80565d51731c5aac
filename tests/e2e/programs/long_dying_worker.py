"""A worker in the middle of its death: its descriptors are closed, its process is still there.

`python -m tests.e2e.programs.long_dying_worker` says `{"ring": …, "port": …, "server": pid}` and waits to be killed.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys

from tests.e2e.programs.request_lines import answer
from ucxx_transport import RingConfig, ServerConfig, SharedRingBuffer
from ucxx_transport.sidecar import boot
from ucxx_transport.sidecar.launch import packed


def main() -> None:
    """Start a sidecar as `ucxx_transport.sidecar.launch` does, and close the socket to it without a close frame."""
    ring = SharedRingBuffer.create(RingConfig(slots=2, slot_bytes=4096))
    ours, theirs = socket.socketpair(type=socket.SOCK_SEQPACKET)
    errors = os.dup(2)
    sidecar = subprocess.Popen(
        [sys.executable, "-P", boot.__file__, str(theirs.fileno()), str(errors), "ucxx port 0"],
        stdin=subprocess.PIPE,
        pass_fds=(theirs.fileno(), errors),
    )
    theirs.close()
    serve = {
        "ring_name": ring.name,
        "ring_folder": ring.folder,
        "descriptor": None,
        "index": 0,
        "port": 0,
        "settings": ServerConfig(host="127.0.0.1", ports=1),
    }
    assert sidecar.stdin is not None
    sidecar.stdin.write(json.dumps(sys.path).encode())
    sidecar.stdin.close()
    ours.send(packed({"worker_pid": os.getpid(), "log_level": logging.INFO, "serve": serve}))
    port = json.loads(ours.recv(4096))["up"]
    ours.close()
    answer({"ring": ring.name, "port": port, "server": sidecar.pid})
    signal.pause()


if __name__ == "__main__":
    main()
