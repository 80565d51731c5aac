"""Owners: a process as (pid, start time), whether it still lives, its host, and the folder of its segments."""

from __future__ import annotations

import os
import struct
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

import xxhash

from ucxx_transport.config import RingConfig
from ucxx_transport.errors import ConfigError
from ucxx_transport.machine import check_file_name, check_proc, has_proc


class Owner(NamedTuple):
    """A process, for ever: a pid alone is given to another process some day.

    `pid` counts in the namespace that all users of a segment share; `start` is in clock ticks since boot: field 22 of
    `/proc/<pid>/stat` (proc(5)).
    """

    pid: int
    start: int


@cache
def current_owner() -> Owner:
    """This process. Right in a forked child too. A ConfigError where there is no /proc."""
    check_proc()
    return Owner(os.getpid(), process_start(os.getpid()))


os.register_at_fork(after_in_child=current_owner.cache_clear)


def owner_alive(pid: int, start: int) -> bool:
    """Whether the process (pid, start) still runs.

    A zombie is dead: it runs nothing more, though its parent has not reaped it. A zombie with threads left is alive:
    its main thread ended and others go on. A process that is stopped, or that this one may not look at, is alive.
    """
    try:
        state, started, threads = _read_stat(pid)
    except (FileNotFoundError, ProcessLookupError):
        return _exists_unseen(pid)
    except (OSError, ValueError):
        return True
    return started == start and not (state in "ZX" and threads <= 1)


def is_stopped(pid: int) -> bool:
    """Whether a process is stopped, by SIGSTOP or a debugger, and so answers no request."""
    try:
        return _read_stat(pid)[0] in "Tt"
    except OSError:
        return False


def process_start(pid: int) -> int:
    """Start time of a process in clock ticks since boot; an OSError where there is none."""
    return _read_stat(pid)[1]


@cache
def boot_id() -> bytes:
    """16 bytes that are new at each boot of the machine; a ConfigError where there is no /proc."""
    check_proc()
    text = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
    return bytes.fromhex(text.strip().replace("-", ""))


def pid_namespace() -> int:
    """Inode of this process's pid namespace: pids mean the same in two processes exactly when this is equal."""
    return os.stat("/proc/self/ns/pid").st_ino


def file_system(device: int) -> str:
    """The kind of file system that a device number of `stat` names; "" when the mount table has none (btrfs)."""
    wanted = f"{os.major(device)}:{os.minor(device)}"
    with suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            fields, _, source = line.partition(" - ")
            if fields.split()[2] == wanted:
                return source.split()[0]
    return ""


def segment_folder() -> Path:
    """The folder of segments where a caller names none: the setting `ring.folder`, a ConfigError if it is wrong."""
    return Path(RingConfig(slot_bytes=1).folder)


def host_id(folder: Path | None = None) -> str:
    """32 hex digits that are equal exactly where the segments of a folder (None: `segment_folder()`) can be attached.

    Made of the boot id, the pid namespace, and the device and inode of the folder: two containers on one machine differ
    unless they share namespace and folder. A ConfigError: the folder is not there.
    """
    folder = folder or segment_folder()
    check_file_name(str(folder))
    try:
        facts = os.stat(folder)
    except OSError as error:
        raise ConfigError(
            f"the folder of the rings cannot be used: {error.strerror}; make it, or set ring.folder to another",
            field="folder",
            value=str(folder),
        ) from error
    return xxhash.xxh3_128_hexdigest(boot_id() + struct.pack("<3Q", pid_namespace(), facts.st_dev, facts.st_ino))


def _read_stat(pid: int) -> tuple[str, int, int]:
    """State, start time in ticks, and number of threads of a process (proc(5), fields 3, 22 and 20)."""
    with open(f"/proc/{pid}/stat", "rb") as stat:
        # the name in parentheses may hold anything, even ") Z 1 "
        fields = stat.read().rpartition(b")")[2].split()
    return fields[0].decode(), int(fields[19]), int(fields[17])


def _exists_unseen(pid: int) -> bool:
    """Whether a process that /proc does not show exists nevertheless (mounted with hidepid, or not at all)."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    return not has_proc() or Path(f"/proc/{pid}").exists()
