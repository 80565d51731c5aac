"""The memory limit of this process's control groups (cgroups, v1 and v2), and what they leave for a ring.

The pages of a ring in a tmpfs are charged to the cgroup of the process that makes it, and cannot be dropped: one that
does not fit is no error of any call, but SIGKILL for some process of the group.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from ucxx_transport.ring.owner import file_system

__all__ = ["MemoryLimit", "is_charged", "memory_limit"]

_UNLIMITED_BYTES: Final = 1 << 60
"""v1 says "no limit" by a number near 2**63."""


class _Files(NamedTuple):
    """How a version names its files."""

    limit: str
    used: str
    cached: tuple[str, str]


_V2: Final = _Files("memory.max", "memory.current", ("inactive_file", "active_file"))
_V1: Final = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))


class MemoryLimit(NamedTuple):
    """A cgroup with a limit, and what is charged to it now.

    Attributes:
        folder: of the group.
        limit_bytes: its limit.
        used_bytes: charged to it now.
        cached_bytes: of these, contents of files that the kernel drops for something better; a tmpfs's are not.
    """

    folder: Path
    limit_bytes: int
    used_bytes: int
    cached_bytes: int

    @property
    def room_bytes(self) -> int:
        """What can still be charged to it. Swap is not counted: a ring there would be slower than no ring."""
        return max(0, self.limit_bytes - self.used_bytes + self.cached_bytes)


def memory_limit(
    membership: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")
) -> MemoryLimit | None:
    """The group, of this process's own and all above it (cgroups(7)), that leaves the least; None without a limit."""
    found = [limit for folder, files in _groups(membership, mount) if (limit := _read(folder, files)) is not None]
    return min(found, key=lambda limit: limit.room_bytes, default=None)


def is_charged(fd: int) -> bool:
    """Whether the pages of an open file stay charged to their cgroup: it lies in memory, not on a disk."""
    return file_system(os.fstat(fd).st_dev) in {"tmpfs", "ramfs"}


def _groups(membership: Path, mount: Path) -> Iterator[tuple[Path, _Files]]:
    """The folders of this process's group and of all above it. A container may see its own as the root."""
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            root, files = mount / "memory", _V1
        elif number == "0":
            root, files = mount, _V2
        else:
            continue
        group = Path(path)
        for folder in (group, *group.parents):
            yield root / folder.relative_to("/"), files


def _read(folder: Path, files: _Files) -> MemoryLimit | None:
    try:
        limit = (folder / files.limit).read_text(encoding="ascii").strip()
        used = int((folder / files.used).read_text(encoding="ascii"))
        stat = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
    except (OSError, ValueError):
        return None  # there is no such group here, or it has no controller of memory
    if limit == "max" or int(limit) >= _UNLIMITED_BYTES:
        return None
    return MemoryLimit(folder, int(limit), used, sum(int(stat.get(name, 0)) for name in files.cached))
