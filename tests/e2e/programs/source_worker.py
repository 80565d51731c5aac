"""A worker in a store: `python -m tests.e2e.programs.source_worker STORE WORKER_ID SERVE [PUBLISHER_SETTINGS_AS_JSON]`.

SERVE is a port, 0 for any; or "unserved": then its ring has no server, and is read in place alone.

| asked                   | does and answers                                                                  |
|-------------------------|-----------------------------------------------------------------------------------|
| `{"published": s}`      | waits that long to be published; `{"epoch": n}`, or `{"error": class}`            |
| `{"look": true}`        | `{"state": …, "epoch": …, "error": …, "ports": …, "statistics": …}`               |
| `{"write": text}`       | `{"ref": …}` of a payload with that text                                          |
| `{"hold": s}`           | holds the interpreter for s seconds; `{}`                                         |
| `{"spin": s}`           | spins in Python for s seconds; `{}`                                               |
| `{"server_pid": true}`  | `{"server": pid}` of the server process                                           |
| `{"stop": true}`        | stops the publisher; `{"statistics": …}`                                          |

End of input: everything in order. SIGTERM likewise, by `exit_on_sigterm`.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

from tests.e2e.programs.holding import hold_interpreter
from tests.e2e.programs.request_lines import Message, answer, log_to_stderr, requests
from tests.support.waiting import wait_until
from ucxx_transport import (
    HeartbeatPublisher,
    PublisherConfig,
    RingConfig,
    ServerConfig,
    SharedRingBuffer,
    TransportError,
    UCXXServer,
)
from ucxx_transport.membership import exit_on_sigterm
from ucxx_transport.server import RingSource


class Worker:
    """One ring, one server, one publisher."""

    def __init__(self, ring: SharedRingBuffer, server: UCXXServer | None, publisher: HeartbeatPublisher) -> None:
        self.ring, self.server, self.publisher = ring, server, publisher

    def obey(self, request: Message) -> Message:
        """Carry out one request."""
        name, value = next(iter(request.items()))
        found: Message = getattr(self, name)(value)
        return found

    def published(self, timeout_s: float) -> Message:
        try:
            return {"epoch": self.publisher.wait_published(timeout_s)}
        except TransportError as error:
            return {"error": type(error).__name__}

    def look(self, _: object) -> Message:
        error = self.publisher.error
        return {
            "state": self.publisher.state.value,
            "epoch": self.publisher.epoch,
            "error": None if error is None else type(error).__name__,
            "ports": list(self.server.ports) if self.server is not None else [],
            "statistics": self._statistics(),
        }

    def write(self, text: str) -> Message:
        return {"ref": self.ring.write_raw(text.encode()).to_dict()}

    def hold(self, seconds: float) -> Message:
        hold_interpreter(seconds)
        return {}

    def spin(self, seconds: float) -> Message:
        until_s = time.monotonic() + seconds
        while time.monotonic() < until_s:
            pass
        return {}

    def server_pid(self, _: object) -> Message:
        server = self.server
        assert server is not None
        return {"server": wait_until(lambda: server.statistics().pids[0], 60, what="a server process")}

    def stop(self, _: object) -> Message:
        self.publisher.stop()
        return {"statistics": self._statistics()}

    def _statistics(self) -> dict[str, Any]:
        counts = asdict(self.publisher.statistics())
        return {name: value for name, value in counts.items() if name not in ("state", "epoch")}


def main(store: str, worker_id: str, serve: str, settings: dict[str, Any]) -> None:
    """Answer until the end of the input."""
    exit_on_sigterm()
    with ExitStack() as stack:
        ring = stack.enter_context(SharedRingBuffer.create(RingConfig(slots=8, slot_bytes=4096)))
        server: UCXXServer | None = None
        if serve != "unserved":
            server = stack.enter_context(UCXXServer(ring, ServerConfig(host="127.0.0.1", ports=[int(serve)])))
        source = server or RingSource(ring)
        publisher = stack.enter_context(HeartbeatPublisher(store, worker_id, source, PublisherConfig(**settings)))
        worker = Worker(ring, server, publisher)
        answer({"ready": True})
        for request in requests():
            answer(worker.obey(request))


if __name__ == "__main__":
    log_to_stderr()
    main(sys.argv[1], sys.argv[2], sys.argv[3], json.loads(sys.argv[4]) if len(sys.argv) > 4 else {})
