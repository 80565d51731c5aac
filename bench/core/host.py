"""The machine and the software that a measurement was taken on, and how fast Python runs there at the moment.

Virtual machines are slowed by their neighbours without any sign of it in `/proc/stat`; the same loop then takes three
times as long, while large copies take no longer than before.
"""

from __future__ import annotations

import os
import platform
import shutil
import statistics
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from ucxx_transport.ring.owner import segment_folder

__all__ = ["commit_of", "host_facts", "interpreter_speed"]

SAMPLES: Final = 200
LOOPS: Final = 1000
DISTRIBUTIONS: Final = ("ucxx-cu12", "ucxx-cu13", "libucx-cu12", "libucx-cu13", "numpy", "ucxx_transport")


def host_facts() -> dict[str, Any]:
    """Processor, cores, memory, load, kernel, Python, versions of what moves the bytes, and `UCX_*` in force."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "shm_free_bytes": shutil.disk_usage(segment_folder()).free,
        "interpreter_speed": interpreter_speed(),
        "load_average_1min": os.getloadavg()[0],
        "kernel": platform.release(),
        "python": platform.python_version(),
        "versions": _versions(),
        "environment": {key: value for key, value in sorted(os.environ.items()) if key.startswith(("UCX_", "UCXPY_"))},
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def commit_of(folder: Path) -> str | None:
    """The commit checked out at `folder`, with `+changes` where tracked files differ from it; None outside git."""
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}+changes" if changed else commit


def _git(folder: Path, *arguments: str) -> str:
    git = shutil.which("git")
    if git is None:
        raise FileNotFoundError("git")
    done = subprocess.run([git, "-C", str(folder), *arguments], check=True, capture_output=True, text=True, timeout=10)
    return done.stdout.strip()


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


def interpreter_speed() -> dict[str, Any]:
    """CPU time of a trivial loop, sampled for some hundredths of a second: its best and its usual."""
    samples_us = []
    for _ in range(SAMPLES):
        began_ns = time.thread_time_ns()
        _loop()
        samples_us.append((time.thread_time_ns() - began_ns) / 1e3)
    return {
        "what": f"CPU time of {LOOPS} turns of a Python loop with one call in it",
        "best_us": min(samples_us),
        "median_us": statistics.median(samples_us),
    }


def _loop() -> int:
    total = 0
    for _ in range(LOOPS):
        total += len("abc")
    return total
