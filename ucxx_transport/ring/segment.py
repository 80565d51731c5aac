"""The memory of a ring: one file, mapped, in the folder of segments. Made, filled, attached to and removed here.

A file of our own instead of `multiprocessing.shared_memory`: up to Python 3.12 the resource tracker of that module
unlinks a segment when any process that attached to it exits. The creator holds `flock` on the file for life, through a
descriptor of its own (not the mapping's, which forked children inherit), so that any process can distinguish
a half-made file from an abandoned one.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import multiprocessing.util
import os
import stat
import weakref
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from ucxx_transport.errors import ConfigError, NotReadyError, ProtocolError
from ucxx_transport.ring.layout import PAGE_BYTES
from ucxx_transport.ring.memory_limit import MemoryLimit, is_charged, memory_limit
from ucxx_transport.ring.orphans import NAME_PREFIX, remove_orphan
from ucxx_transport.ring.owner import segment_folder

_CHUNK_BYTES: Final = 256 << 20
"""Allocated and touched at a time, so that signals are seen in between (the kernel restarts an interrupted call)."""

_CREATE_ATTEMPTS: Final = 16
_MADV_POPULATE_READ: Final = 22
_MADV_POPULATE_WRITE: Final = 23
"""<linux/mman.h>, since Linux 5.14; `mmap` has no names for them."""


class Segment:
    """A mapped file. The memory stays mapped as long as this object or any view of it is referenced.

    Attributes:
        name: the file's name without the prefix that all segments share.
        path: the file.
        nbytes: its size.
        memory: its bytes, shape (nbytes,), uint8, writable.
        words: its bytes as unsigned 64-bit words, for single aligned loads and stores.
        address: where it is mapped.
        is_creator: whether this object made the file, in this process.
    """

    __slots__ = ("__weakref__", "_map", "_remove", "address", "memory", "name", "nbytes", "path", "words")

    def __init__(self, path: Path, mapping: mmap.mmap, remove: _Removal | None) -> None:
        """Wrap a mapping; use `create_segment` or `open_segment`."""
        self._map = mapping
        self._remove = remove
        self.name = path.name.removeprefix(NAME_PREFIX)
        self.path = path
        self.nbytes = len(mapping)
        self.memory: npt.NDArray[np.uint8] = np.frombuffer(mapping, np.uint8)
        self.words = memoryview(mapping).cast("Q")
        self.address: int = self.memory.__array_interface__["data"][0]
        if remove is not None:
            remove.watch(self)

    @property
    def is_creator(self) -> bool:
        """Whether this object made the file, in this process, and has not removed it."""
        return self._remove is not None and self._remove.pending

    def populate(self, *, write: bool) -> None:
        """Touch all pages now, to write (creator) or as they are (attacher): the first use then runs at memory speed.

        Raises:
            ConfigError: the kernel has no memory for them.
        """
        advice = _MADV_POPULATE_WRITE if write else _MADV_POPULATE_READ
        for start in range(0, self.nbytes, _CHUNK_BYTES):
            length = min(_CHUNK_BYTES, self.nbytes - start)
            try:
                self._map.madvise(advice, start, length)
            except OSError as exc:
                if exc.errno != errno.EINVAL:
                    raise ConfigError(
                        f"the pages of the ring cannot be touched: {exc.strerror}", needed_bytes=self.nbytes
                    ) from exc
                pages = self.memory[start : start + length : PAGE_BYTES]
                if write:
                    pages[...] = pages
                else:
                    pages.max()

    @property
    def lost_its_name(self) -> bool:
        """Whether somebody else removed the file's name, which this object made, in this process."""
        return self._remove is not None and self._remove.pending and self._remove.nothing_left

    def duplicate(self) -> int | None:
        """A descriptor of the file, without its lock, for a process that is to map it whatever its name; to be closed.

        None where this object did not make the file, in this process.
        """
        return None if self._remove is None or not self._remove.pending else self._remove.duplicate()

    def unlink(self) -> bool:
        """Remove the file's name if this object made it in this process (whether it did); mappings stay valid."""
        return self._remove is not None and self._remove()


class _Removal:
    """Removes a file once: on request, when its segment is garbage, or at exit; never in a forked child."""

    def __init__(self, path: Path, held: list[int]) -> None:
        self._path = path
        self._held = held
        self._inode = os.fstat(held[0]).st_ino
        self._process_id = os.getpid()
        self._done = False
        self._at_exit: multiprocessing.util.Finalize | None = None
        _removals.add(self)
        # multiprocessing's forked children leave by os._exit, without atexit, but all its children run its own hook
        self._at_exit = multiprocessing.util.Finalize(None, self, exitpriority=0)

    @property
    def pending(self) -> bool:
        return not self._done and self._process_id == os.getpid()

    @property
    def nothing_left(self) -> bool:
        return os.fstat(self._held[0]).st_nlink == 0

    def duplicate(self) -> int:
        # opened again, not dup: flock's lock goes with the open file, and would outlive this process in the other
        return os.open(f"/proc/self/fd/{self._held[0]}", os.O_RDWR | os.O_CLOEXEC)

    def watch(self, segment: Segment) -> None:
        weakref.finalize(segment, self)

    def __call__(self) -> bool:
        if not self.pending:
            return False
        removed = False
        with contextlib.suppress(FileNotFoundError):
            # held by flock until here, so no other file can have taken its place
            if os.stat(self._path, follow_symlinks=False).st_ino == self._inode:
                os.unlink(self._path)
                removed = True
        self._done = True  # not before: what an interrupt cuts off is done by the next call
        if self._at_exit is not None:
            self._at_exit.cancel()
        self._close()
        return removed

    def leave_to_parent(self) -> None:
        """In a forked child: release the lock, which would otherwise outlive the creator."""
        if not self._done:
            self._done = True
            self._close()

    def _close(self) -> None:
        while self._held:
            os.close(self._held.pop())


_removals: weakref.WeakSet[_Removal] = weakref.WeakSet()


def _leave_all_to_parent() -> None:
    for removal in list(_removals):
        removal.leave_to_parent()


os.register_at_fork(after_in_child=_leave_all_to_parent)


def segment_path(name: str, folder: Path | None = None) -> Path:
    """The file of a segment, named with or without the common prefix; a ConfigError for no plain file name."""
    plain = name.removeprefix(NAME_PREFIX)
    if not plain or len(plain) > 200 or "/" in plain or "\0" in plain:
        raise ConfigError(f"{name!r} is not a segment's name: a file name, without a slash", field="name", value=name)
    return (folder or segment_folder()) / (NAME_PREFIX + plain)


def create_segment(name: str, nbytes: int, folder: Path | None = None) -> Segment:
    """Make a zeroed file, all of it allocated, and map it. It holds no complete identity yet.

    Raises:
        ConfigError: the name is in use by a live creator, or the memory is not there, or more than this process's
            cgroup may have; says how much is needed and free.
    """
    path = segment_path(name, folder)
    held: list[int] = []
    removal: _Removal | None = None
    try:
        _open_fresh(path, held)
        removal = _Removal(path, held)
        _allocate(held[0], nbytes, path)
        return Segment(path, _map_file(path), removal)
    except BaseException:
        if removal is not None:
            removal()
        while held:
            os.close(held.pop())
        remove_orphan(path)  # an interrupt may have come between the file and what removes it
        raise


def open_segment(name: str, folder: Path | None = None, descriptor: int | None = None) -> Segment:
    """Map an existing file, whatever it holds; by its descriptor, which stays the caller's, whatever its name.

    Raises:
        ConfigError: there is none, or it is not ours to open.
        ProtocolError: it is no regular file of whole pages.
        NotReadyError: it has no size yet: its creator is at work.
    """
    path = segment_path(name, folder)
    return Segment(path, _map_file(path) if descriptor is None else _map_descriptor(descriptor, path), None)


def _map_file(path: Path) -> mmap.mmap:
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        raise ConfigError(
            "no such ring on this host: its creator is gone, or is on another host or in another container",
            field="name",
            name=path.name.removeprefix(NAME_PREFIX),
            reason="missing",
        ) from None
    except OSError as exc:
        raise ConfigError(f"{path} cannot be opened: {exc.strerror}", field="name", reason="refused") from exc
    try:
        return _map_descriptor(fd, path)
    finally:
        os.close(fd)


def _map_descriptor(fd: int, path: Path) -> mmap.mmap:
    try:
        facts = os.fstat(fd)
        if not stat.S_ISREG(facts.st_mode) or facts.st_size % PAGE_BYTES:
            raise ProtocolError("not a ring: no regular file of whole pages", name=path.name, nbytes=facts.st_size)
        if facts.st_size == 0:
            raise NotReadyError("the ring is still being made; try again", name=path.name)
        return mmap.mmap(fd, facts.st_size)
    except OSError as exc:
        raise ConfigError(f"{path} cannot be mapped: {exc.strerror}", field="name", reason="refused") from exc


def _open_fresh(path: Path, held: list[int]) -> None:
    """Make a new empty file; `held` is given a descriptor of it, which holds its lock."""
    for _ in range(_CREATE_ATTEMPTS):
        try:
            held.append(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
        except FileExistsError:
            if not remove_orphan(path):
                break
            continue
        except OSError as exc:
            raise ConfigError(f"{path} cannot be made: {exc.strerror}", field="name", errno=exc.errno) from exc
        try:
            fcntl.flock(held[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(held[0]).st_nlink:  # else a sweep took the file, still unlocked, for an abandoned one
                return
        except BlockingIOError:
            pass  # a sweep is about to take it
        os.close(held.pop())
    raise ConfigError(
        "a ring of that name is in use; choose another ring.name, or leave it out for a random one",
        field="name",
        name=path.name.removeprefix(NAME_PREFIX),
        reason="in_use",
    )


def _allocate(fd: int, nbytes: int, path: Path) -> None:
    """Give the file all its memory now: what is not there is an error here, and never SIGBUS or SIGKILL later."""
    folder = os.fstatvfs(fd)
    free = folder.f_bavail * folder.f_frsize
    if folder.f_blocks and nbytes > free:
        raise _too_large(nbytes, free, path)
    if is_charged(fd) and (limit := memory_limit()) is not None and nbytes > limit.room_bytes:
        raise _over_limit(nbytes, limit)
    for start in range(0, nbytes, _CHUNK_BYTES):
        try:
            os.posix_fallocate(fd, start, min(_CHUNK_BYTES, nbytes - start))
        except OSError as exc:
            if exc.errno in (errno.ENOSPC, errno.ENOMEM, errno.EFBIG):
                raise _too_large(nbytes, free, path) from exc
            raise ConfigError(f"the memory of the ring cannot be allocated: {exc.strerror}", errno=exc.errno) from exc


def _too_large(nbytes: int, free: int, path: Path) -> ConfigError:
    return ConfigError(
        f"a ring of {nbytes} bytes ({nbytes / 2**20:.1f} MiB) does not fit {path.parent}, which has {free} bytes "
        f"({free / 2**20:.1f} MiB) free: lower ring.slots or the size of a slot, remove what dead workers left with "
        f"`ucxx-transport clean`, or enlarge it (docker: --shm-size; else: mount -o remount,size=… {path.parent})",
        field="slots",
        needed_bytes=nbytes,
        free_bytes=free,
    )


def _over_limit(nbytes: int, limit: MemoryLimit) -> ConfigError:
    room, most = limit.room_bytes, limit.limit_bytes
    return ConfigError(
        f"a ring of {nbytes} bytes ({nbytes / 2**20:.1f} MiB) is more than its cgroup may have (SIGKILL): "
        f"{limit.folder} has {room} bytes ({room / 2**20:.1f} MiB) left of {most} ({most / 2**20:.1f} MiB). "
        "Lower ring.slots or the size of a slot, or raise the limit (docker: --memory; Kubernetes: "
        "resources.limits.memory; Slurm: --mem; systemd: MemoryMax=)",
        field="slots",
        needed_bytes=nbytes,
        room_bytes=room,
        limit_bytes=most,
    )
