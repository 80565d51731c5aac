"""Segments on this host: which there are, whose creators are dead, and the removal of those."""

from __future__ import annotations

import fcntl
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Final

from ucxx_transport.errors import ProtocolError
from ucxx_transport.machine import check_file_name
from ucxx_transport.ring.layout import COMPLETE_WORD, IDENTITY_BYTES, WORD_BYTES, Identity
from ucxx_transport.ring.owner import boot_id, owner_alive, pid_namespace, segment_folder

NAME_PREFIX: Final = "ucxx_transport-"

_LOCK_WAIT_S: Final = 0.1
"""The kernel releases a killed process's flock 0.2 to 2 ms after the kill (measured), so it is waited for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentInfo:
    """A segment as found in the folder.

    `SharedRingBuffer.attach` takes its `name`. `identity` is what it says of itself, None when it is half-made or
    damaged; `problem` says what is wrong with it, "" when nothing is.
    """

    name: str
    path: Path
    nbytes: int
    identity: Identity | None
    problem: str
    creator_alive: bool


def list_segments(folder: Path | None = None) -> list[SegmentInfo]:
    """All segments in a folder (None: `segment_folder()`) that this user may open, by name."""
    found = []
    for path in _segment_paths(folder):
        with suppress(OSError), _opened(path) as file:
            found.append(_inspect(file.fileno(), path))
    return found


def sweep_orphans(folder: Path | None = None) -> list[str]:
    """Remove the segments of dead creators in a folder (None: `segment_folder()`); returns their names.

    Processes that have one mapped keep it.
    """
    return [path.name.removeprefix(NAME_PREFIX) for path in _segment_paths(folder) if remove_orphan(path)]


def remove_orphan(path: Path) -> bool:
    """Remove a segment if its creator is dead; whether the name is free now. False: the creator lives, or may."""
    try:
        with _opened(path) as file:
            fd = file.fileno()
            info = _inspect(fd, path)
            # Two sweeps at once: the lock decides. One that stays taken is a forked child's copy: its creator is dead.
            if info.creator_alive or not (_lock(fd, _LOCK_WAIT_S) or info.identity is not None):
                return False
            if os.stat(path, follow_symlinks=False).st_ino != os.fstat(fd).st_ino:
                return False
            os.unlink(path)
    except OSError:
        return not os.path.lexists(path)
    return True


def _segment_paths(folder: Path | None) -> list[Path]:
    folder = folder or segment_folder()
    check_file_name(str(folder))  # else an error of Python's, since 3.13
    return sorted(folder.glob(NAME_PREFIX + "*"))


def _opened(path: Path) -> FileIO:
    """A file to read; an OSError when it is gone, a link, or not this user's to open."""
    return open(
        path, "rb", buffering=0, opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK)
    )


def _inspect(fd: int, path: Path) -> SegmentInfo:
    head, nbytes = os.pread(fd, IDENTITY_BYTES, 0), os.fstat(fd).st_size
    identity, problem = None, "half-made"
    if len(head) == IDENTITY_BYTES and any(head[COMPLETE_WORD * WORD_BYTES :][:WORD_BYTES]):
        try:
            identity, problem = Identity.from_bytes(head, nbytes), ""
        except ProtocolError as exc:
            problem = exc.message
    alive = True
    if identity is not None and identity.boot_id == boot_id() and identity.pid_namespace == pid_namespace():
        alive = owner_alive(identity.creator_pid, identity.creator_start)
    if alive and _lock(fd, 0.0):
        # a pid of elsewhere says nothing, and a process may have become another program: who made it has the lock
        fcntl.flock(fd, fcntl.LOCK_UN)
        alive = False
    name = path.name.removeprefix(NAME_PREFIX)
    return SegmentInfo(name=name, path=path, nbytes=nbytes, identity=identity, problem=problem, creator_alive=alive)


def _lock(fd: int, wait_s: float) -> bool:
    deadline = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.001)
        else:
            return True
