"""A rollout worker for the steady soak: `python -m tests.soak.steady_worker WORKER_ID`.

| asked         | does and answers                                                                     |
|---------------|--------------------------------------------------------------------------------------|
| `{"play": n}` | writes n episodes; `{"records": [record …], "server": pid of its server process}`    |
"""

from __future__ import annotations

import random
import sys
from typing import Any

import numpy as np

from tests.e2e.programs.request_lines import answer, log_to_stderr, requests
from ucxx_transport import ServerConfig, UCXXRolloutMixin

MAX_STEPS = 200
SLOTS = 256


def play(sequence: int) -> dict[str, Any]:
    """An episode whose every value follows from its number."""
    steps = random.Random(sequence).randrange(1, MAX_STEPS + 1)
    return {
        "obs": {"image": np.full((steps, 8, 8), sequence % 251, np.uint8), "speed": np.full(steps, sequence, np.int64)},
        "reward": np.ones(steps, np.float32),
    }


class Worker(UCXXRolloutMixin):
    """Plays what it is asked for."""

    def run(self, worker_id: str) -> None:
        """Answer until the end of the input."""
        self.setup_ucxx(
            worker_id,
            varlen=dict.fromkeys(("obs/image", "obs/speed", "reward"), MAX_STEPS),
            ring={"slots": SLOTS, "block_timeout_s": 60.0},
            server=ServerConfig(host="127.0.0.1", ports=2),
            reward="reward",
        )
        sequence = 0
        for request in requests():
            records = []
            for _ in range(request["play"]):
                records.append(self.write_to_buffer(play(sequence), policy_version=sequence))
                sequence += 1
            assert self.ucxx_writer is not None
            assert self.ucxx_writer.server is not None
            answer({"records": records, "server": self.ucxx_writer.server.statistics().pids[0]})
        self.cleanup_ucxx()


if __name__ == "__main__":
    log_to_stderr()
    Worker().run(sys.argv[1])
