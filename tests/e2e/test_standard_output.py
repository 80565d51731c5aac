"""Standard output is the application's: a worker and a trainer in one program write nothing of their own there."""

from __future__ import annotations

import os
import subprocess
import sys

PROGRAM = """
import logging, sys
logging.basicConfig(level="DEBUG")  # to standard error
from ucxx_transport import ClientConfig, RingConfig, ServerConfig, SharedRingBuffer, SyncUCXXClient, UCXXServer
with SharedRingBuffer.create(RingConfig(slots=4, slot_bytes=4096)) as ring:
    with UCXXServer(ring, ServerConfig(host="127.0.0.1", ports=1)):
        never_read = ring.write_raw(b"payload")
        for local in ("view", "off"):
            with SyncUCXXClient(ClientConfig(local=local, deadline_s="60s")) as client:
                with client.read(ring.write_raw(b"payload")) as payload:
                    assert bytes(payload.buffer) == b"payload"
    with SyncUCXXClient(ClientConfig(local="off", read_attempts=1, deadline_s="60s")) as client:
        try:
            client.read(never_read)
        except Exception as error:
            print("failed:", type(error).__name__)
"""


def test_a_write_its_reads_and_a_failure_leave_standard_output_alone() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "UCX_LOG_LEVEL": "info"},  # what UCX logs, by default to standard output
    )
    assert "UCX  INFO" in done.stderr
    assert done.returncode == 0, done.stderr
    assert done.stdout == "failed: PeerLostError\n"
