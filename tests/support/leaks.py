"""What a test may not leave behind: segments, processes, threads and file descriptors.

Segments are those in this test process's own folder (`ring.folder`); processes its own descendants.

A snapshot is taken around every test. What is new afterwards gets a bounded time to go away (a worker that is just
exiting, a loop that is just closing) and garbage is collected; what is still there then fails the test.

UCX needs no exception: a context, its worker and its endpoints close every pipe, epoll, socket and `/dev/shm/ucx_shm_*`
descriptor of theirs when the last reference goes (seen with ucxx 0.52, UCX 1.21).
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from tests.support.segment_folder import segments

__all__ = ["KINDS", "Resources", "leaks_since", "mark_own_processes", "snapshot"]

KINDS = ("segments", "processes", "threads", "descriptors")
SETTLE_S = 30.0

# Started on purpose by `multiprocessing` once for a whole process, and ended by its exit.
_HELPERS_OF_MULTIPROCESSING = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")

_MARKER = "TESTS_LEAK_GUARD"


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """What exists at one moment; each item is worded so that it tells what leaked."""

    segments: frozenset[str]
    processes: frozenset[str]
    threads: frozenset[str]
    descriptors: frozenset[str]


def mark_own_processes() -> None:
    """Mark the environment, so that a descendant is known for one of ours even when its parent is gone."""
    os.environ[_MARKER] = uuid.uuid4().hex


def snapshot() -> Resources:
    """What this process and its descendants hold now."""
    return Resources(
        segments=frozenset(path.name for path in segments()),
        processes=frozenset(dict(_own_processes()).values()),
        threads=frozenset(_own_threads()),
        descriptors=frozenset(_own_descriptors()),
    )


def leaks_since(before: Resources, *, allowed: Collection[str] = ()) -> dict[str, list[str]]:
    """What is there now and was not before, by kind; empty when all of it went away in time.

    Args:
        before: the snapshot to compare with.
        allowed: kinds that are not looked at.
    """
    return _settled(lambda: _difference(before, allowed))


def _difference(before: Resources, allowed: Collection[str]) -> dict[str, list[str]]:
    after = snapshot()
    new = {kind: sorted(getattr(after, kind) - getattr(before, kind)) for kind in KINDS if kind not in allowed}
    return {kind: items for kind, items in new.items() if items}


def _settled(leaks: Callable[[], dict[str, list[str]]]) -> dict[str, list[str]]:
    found = leaks()
    end = time.monotonic() + SETTLE_S
    while found and time.monotonic() < end:
        gc.collect()
        multiprocessing.active_children()  # reaps what has ended
        time.sleep(0.01)
        found = leaks()
    return found


def _own_processes() -> Iterator[tuple[int, str]]:
    starts: dict[int, str] = {}
    children: dict[int, list[int]] = {}
    for pid in map(int, filter(str.isdecimal, os.listdir("/proc"))):
        if _is_stranger(pid) or not (stat := _read(f"/proc/{pid}/stat")):
            continue
        words = stat.rpartition(b")")[2].split()
        starts[pid] = words[19].decode()
        children.setdefault(int(words[1]), []).append(pid)
    descendants = set(_descendants(children))
    for pid in (*descendants, *_marked(starts.keys() - descendants - {os.getpid()})):
        command = _read(f"/proc/{pid}/cmdline").replace(b"\0", b" ").decode(errors="replace").strip()
        if not any(helper in command for helper in _HELPERS_OF_MULTIPROCESSING):
            yield pid, f"pid {pid} (start {starts[pid]}): {command or 'ended, not reaped'}"


def _descendants(children: dict[int, list[int]]) -> Iterator[int]:
    parents = [os.getpid()]
    while parents:
        found = children.get(parents.pop(), [])
        yield from found
        parents += found


def _marked(pids: Collection[int]) -> Iterator[int]:
    """Processes with our mark in their environment: descendants whose parents are gone."""
    mark = f"{_MARKER}={os.environ.get(_MARKER, '')}".encode()
    for pid in pids:
        seen_ns = _seen_ns(pid)
        if mark in _read(f"/proc/{pid}/environ"):
            yield pid
        else:
            _strangers[pid] = seen_ns


_strangers: dict[int, int] = {}
"""Processes that do not have our mark, and so never will: there are many, and looking takes time at every test."""


def _is_stranger(pid: int) -> bool:
    return pid in _strangers and _strangers[pid] == _seen_ns(pid)


def _seen_ns(pid: int) -> int:
    """When the kernel first showed this process: of a later one with its number it is another time."""
    try:
        return os.stat(f"/proc/{pid}").st_ctime_ns
    except OSError:
        return 0


def _read(path: str) -> bytes:
    """The file's bytes; none where the process is gone by now or is not ours to look at."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:
        return b""


def _own_threads() -> Iterator[str]:
    for thread in threading.enumerate():
        yield f"{thread.name} ({thread.ident})"


def _own_descriptors() -> Iterator[str]:
    for name in os.listdir("/proc/self/fd"):
        try:
            yield f"{name} -> {os.readlink(f'/proc/self/fd/{name}')}"
        except OSError:
            continue  # the listing's own descriptor
