"""The machine and the software that a measurement was taken on, and how fast Python runs there at the moment.

Virtual machines are slowed by their neighbours without any sign of it in `/proc/stat`; an empty call then takes three
times as long, while large copies take no longer than before.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from ucxx_transport.ring.segment import segment_folder

__all__ = ["call_ns", "host_facts", "pool_bytes"]

LEAST_POOL_BYTES: Final = 128 << 20
MOST_ENDS: Final = 12
"""Sources and readers of a question that hold a pool at the same time, rounded up."""
SAMPLES: Final = 5
CALLS: Final = 2000
DISTRIBUTIONS: Final = (
    *("ucxx-cu12", "ucxx-cu13", "libucx-cu12", "libucx-cu13", "numpy", "ucxx_transport"),
    *("pyzmq", "nixl", "torch", "ray"),
)


def host_facts() -> dict[str, Any]:
    """Processor, cores, memory, load, kernel, Python, versions of what moves the bytes, `UCX_*` in force, commit."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "pool_bytes": pool_bytes(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "shm_free_bytes": shutil.disk_usage(segment_folder()).free,
        "call_ns": call_ns(),
        "load_average_1min": os.getloadavg()[0],
        "kernel": platform.release(),
        "python": platform.python_version(),
        "versions": _versions(),
        "environment": {key: value for key, value in sorted(os.environ.items()) if key.startswith(("UCX_", "UCXPY_"))},
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def pool_bytes() -> int:
    """Payload bytes that a source holds: 4 times the largest cache, and 128 MiB at least, for as far as memory goes.

    All ends of a question together take a quarter of it at most, and a ring, with what is beside its payloads, half of
    what shared memory has.
    """
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    largest = max((int(size[:-1]) << {"K": 10, "M": 20}[size[-1]] for size in sizes), default=0)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    room = min(memory // (4 * MOST_ENDS), shutil.disk_usage(segment_folder()).free // 4)
    return min(max(LEAST_POOL_BYTES, 4 * largest), room)


def _commit() -> str | None:
    """The commit that this file is of, with "-dirty" where tracked files differ from it; None outside git."""
    git = shutil.which("git")
    if git is None:
        return None
    command = [git, "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=10)
    return done.stdout.strip() or None


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _versions() -> dict[str, str]:
    found = {}
    for name in DISTRIBUTIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def call_ns() -> float:
    """What a call of an empty Python function takes now: the least of a few samples, loop included."""
    least_s = float("inf")
    for _ in range(SAMPLES):
        began_s = time.perf_counter()
        for _ in range(CALLS):
            _empty()
        least_s = min(least_s, time.perf_counter() - began_s)
    return least_s / CALLS * 1e9


def _empty() -> None:
    """Nothing."""
