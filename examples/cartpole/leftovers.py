"""What a run left behind: looked up in the folder of segments and /proc themselves, not in anybody's books."""

from __future__ import annotations

import os
import time
from pathlib import Path

from cartpole.processes import RUN_VARIABLE
from ucxx_transport.ring.owner import segment_folder

__all__ = ["run_processes", "run_segments", "wait_until_gone"]

_POLL_S = 0.05


def run_segments(ring_prefix: str) -> list[str]:
    """Names of the segments that belong to the run whose rings begin with `ring_prefix`."""
    return sorted(path.name for path in segment_folder().iterdir() if ring_prefix in path.name)


def run_processes(run_id: str) -> list[int]:
    """Pids of live processes that carry the run's variable, this process left out; zombies have no environment left."""
    mark = f"{RUN_VARIABLE}={run_id}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal() or int(entry.name) == os.getpid():
            continue
        try:
            environment = (entry / "environ").read_bytes()
        except OSError:  # gone meanwhile, or another user's
            continue
        if mark in environment.split(b"\0"):
            found.append(int(entry.name))
    return sorted(found)


def wait_until_gone(run_id: str, *, limit_s: float) -> list[int]:
    """Wait until no process of the run is left; returns those that still are after `limit_s`."""
    deadline_s = time.monotonic() + limit_s
    while (left := run_processes(run_id)) and time.monotonic() < deadline_s:
        time.sleep(_POLL_S)
    return left
