"""A rollout worker with the mixin: `python -m tests.e2e.programs.rollout_worker WORKER_ID [RING_SETTINGS_AS_JSON]`.

| asked                       | does and answers                                                    |
|-----------------------------|---------------------------------------------------------------------|
| `{"steps": n, "version": v}`| plays an episode of n steps; `{"record": …}`, as the mixin gave it  |
| `{"server": true}`          | `{"server": pid}` of the server process                             |
| `{"ring": true}`            | `{"ring": …}`, the ring's statistics                                |
| `{"cleanup": true}`         | `cleanup_ucxx()`; `{"statistics": …}` of before it                  |
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Any

import numpy as np

from tests.e2e.programs.request_lines import answer, log_to_stderr, requests
from tests.support.waiting import wait_until
from ucxx_transport import ServerConfig, UCXXRolloutMixin

MAX_STEPS = 1000


def play(steps: int) -> dict[str, Any]:
    """An episode whose every value follows from its number of steps."""
    return {
        "obs": {"image": np.full((steps, 8, 8), steps % 251, np.uint8), "speed": np.arange(steps, dtype=np.float32)},
        "reward": np.ones(steps, np.float32),
    }


class Worker(UCXXRolloutMixin):
    """Plays what it is asked for."""

    def server_pid(self) -> int | None:
        """The server process, once there is one and it is up."""
        assert self.ucxx_writer is not None
        server = self.ucxx_writer.server
        assert server is not None
        return wait_until(lambda: server.statistics().pids[0], 60, what="a server process")

    def ring_statistics(self) -> dict[str, int]:
        """Counts of the ring, which the first episode has made."""
        assert self.ucxx_writer is not None
        ring = self.ucxx_writer.ring
        assert ring is not None
        return asdict(ring.statistics())

    def run(self, worker_id: str, ring_settings: dict[str, Any]) -> None:
        """Answer until told to clean up, or until the end of the input."""
        self.setup_ucxx(
            worker_id,
            varlen=dict.fromkeys(("obs/image", "obs/speed", "reward"), MAX_STEPS),
            ring={"slots": 4, "on_full": "raise", "checksum": True, **ring_settings},
            server=ServerConfig(host="127.0.0.1", ports=1),  # the tests that stop "the server" mean all of it
            on_error="drop",
            reward="reward",
        )
        for request in requests():
            if "cleanup" in request:
                assert self.ucxx_writer is not None
                answer({"statistics": asdict(self.ucxx_writer.statistics())})
                self.cleanup_ucxx()
                return
            if "server" in request:
                answer({"server": self.server_pid()})
                continue
            if "ring" in request:
                answer({"ring": self.ring_statistics()})
                continue
            answer({"record": self.write_to_buffer(play(request["steps"]), policy_version=request["version"])})


if __name__ == "__main__":
    log_to_stderr()
    Worker().run(sys.argv[1], json.loads(sys.argv[2]) if len(sys.argv) > 2 else {})
