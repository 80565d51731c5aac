"""A Ray job that ends without `close` of its `ActorRollouts`: `python -m tests.e2e.programs.ray_job END CLUSTER`.

| END       | how it ends                                                                                |
|-----------|--------------------------------------------------------------------------------------------|
| falls-off | after its last line                                                                        |
| shut-down | the same, after `ray.shutdown()`                                                           |
| raises    | by an error of its own                                                                     |
| plays-on  | after its last line, while an actor plays a rollout that does not end                      |

It says which rings it has heard of, as soon as it has.
"""

from __future__ import annotations

import sys
import threading
from typing import Any

import numpy as np
import ray

from tests.e2e.programs.request_lines import answer, log_to_stderr
from ucxx_transport import UCXXRolloutMixin
from ucxx_transport.integrations.ray import ActorRollouts

kept: list[object] = []
"""Held to the very end, as a script's globals are."""


class Rollouts(UCXXRolloutMixin):
    """An actor of one process, which Ray's kill leaves no time for its ring."""

    def __init__(self, name: str) -> None:
        self.setup_ucxx(name, serve=False, ring={"slots": 4, "on_full": "overwrite"})
        self._played = 0

    def play(self, end: str) -> dict[str, object]:
        """One episode; the second does not end, if it is to play on."""
        self._played += 1
        if end == "plays-on" and self._played > 1:
            threading.Event().wait()
        return self.write_to_buffer({"obs": np.zeros(4, np.float32)})


def play(end: str) -> None:
    """Start two actors and play until both have answered."""
    actors: list[Any] = [ray.remote(num_cpus=0.5)(Rollouts).remote(f"worker-{number}") for number in range(2)]
    rollouts = ActorRollouts(actors, lambda actor: actor.play.remote(end), in_flight=1)
    rings: set[str] = set()
    while len(rings) < 2:
        rings.add(next(rollouts)["ref"]["ring_name"])
    kept.append(rollouts)
    answer({"rings": sorted(rings)})


def main(end: str, cluster: str) -> None:
    """Do as the table says."""
    log_to_stderr()
    ray.init(address=cluster, log_to_driver=False)
    play(end)
    if end == "shut-down":
        ray.shutdown()
    if end == "raises":
        raise ZeroDivisionError


if __name__ == "__main__":
    main(*sys.argv[1:])
