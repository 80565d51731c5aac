"""CPU time of whole process trees to the nanosecond, how often they wake, and CPU time of everything else there is.

The kernel lets any process read another's CPU clock (`clock_getcpuclockid(3)`): the id is `~pid << 3 | CPUCLOCK_SCHED`.
`/proc/<pid>/stat` counts in ticks of 10 ms: too coarse for a batch of small reads.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

__all__ = ["ForeignLoad", "process_tree", "tree_cpu_s", "tree_sleeps", "tree_switches"]

CPUCLOCK_SCHED: Final = 2
_TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")
_COUNTED: Final = (0, 1, 2, 7)
"""user, nice, system and steal of /proc/stat; interrupts are left out, for loopback traffic is ours."""


def process_tree(pid: int) -> tuple[int, ...]:
    """`pid` and all its living descendants."""
    found = [pid]
    for parent in found:
        with suppress(FileNotFoundError, ProcessLookupError):
            for task in Path(f"/proc/{parent}/task").iterdir():
                found.extend(int(child) for child in (task / "children").read_text().split())
    return tuple(found)


def tree_cpu_s(pids: tuple[int, ...]) -> float:
    """User and system seconds that the processes, all threads together, have used since they started.

    Raises:
        RuntimeError: one of them has ended, and its time with it.
    """
    total_s = 0.0
    for pid in pids:
        try:
            total_s += time.clock_gettime((~pid << 3) | CPUCLOCK_SCHED)
        except OSError as error:
            raise RuntimeError(f"process {pid} ended while it was being measured") from error
    return total_s


def tree_sleeps(pids: tuple[int, ...]) -> dict[str, int]:
    """How often each living thread of the processes has gone to sleep since it started."""
    paths = [path for pid in pids for path in Path(f"/proc/{pid}/task").glob("*/status")]
    return {str(path): int(path.read_text().split("\nvoluntary_ctxt_switches:")[1].split()[0]) for path in paths}


def tree_switches(pids: tuple[int, ...]) -> tuple[int, int]:
    """How often their living threads went to sleep, and how often one was preempted, since they started."""
    counts = [0, 0]
    for pid in pids:
        for path in Path(f"/proc/{pid}/task").glob("*/status"):
            for which, name in enumerate(("\nvoluntary_ctxt_switches:", "\nnonvoluntary_ctxt_switches:")):
                counts[which] += int(path.read_text().split(name)[1].split()[0])
    return counts[0], counts[1]


class ForeignLoad:
    """How many cores others used (or the hypervisor withheld) since this object was made.

    Figures of a disturbed turn compare nothing, least of all those of subjects that poll.
    """

    def __init__(self) -> None:
        self._own = process_tree(os.getpid())
        self._began_s = time.perf_counter()
        self._own_s = tree_cpu_s(self._own)
        self._machine_s = _machine_cpu_s()

    def cores(self) -> float:
        """Cores used by processes not under this one."""
        wall_s = time.perf_counter() - self._began_s
        foreign_s = (_machine_cpu_s() - self._machine_s) - (tree_cpu_s(self._own) - self._own_s)
        return max(0.0, foreign_s / wall_s)


def _machine_cpu_s() -> float:
    ticks = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    return sum(int(ticks[column]) for column in _COUNTED) / _TICKS_PER_S
