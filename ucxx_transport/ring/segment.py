"""The memory of a ring: one file, mapped, in the folder of segments. Made, attached to, listed and removed here.

A file of our own instead of `multiprocessing.shared_memory`: up to Python 3.12 the resource tracker of that module
unlinks a segment when any process that attached to it exits. The creator holds `flock` on the file for life, through a
descriptor of its own (not the mapping's, which forked children inherit), so that any process can distinguish
a half-made file from an abandoned one.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import stat
import struct
import time
from contextlib import suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Final, Literal

import xxhash

from ucxx_transport import machine
from ucxx_transport.config import RingConfig
from ucxx_transport.errors import ConfigError, NotReadyError, ProtocolError
from ucxx_transport.ring.layout import COMPLETE_WORD, IDENTITY_BYTES, PAGE_BYTES, WORD_BYTES, Identity
from ucxx_transport.units import format_bytes

NAME_PREFIX: Final = "ucxx_transport-"

_LOCK_WAIT_S: Final = 0.1  # the kernel releases a killed process's flock 0.2 to 2 ms after the kill (measured)
_CHUNK_BYTES: Final = 256 << 20  # at a time, so that signals are seen in between: the kernel restarts its calls
_CREATE_ATTEMPTS: Final = 16
# <linux/mman.h>; `mmap` has no names for these
_MADV_POPULATE_READ: Final = 22  # since Linux 5.14
_MAP_FIXED, _MAP_NORESERVE = 0x10, 0x4000


class Creation:
    """What its creator has of a file: a descriptor that holds its lock, and its removal; never in a forked child.

    To call it removes the file: on request, when its segment is garbage, or at exit.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, path.name.removeprefix(NAME_PREFIX)
        self._fd: int | None = None
        self._process_id = os.getpid()

    def make(self, nbytes: int) -> mmap.mmap:
        """Make a zeroed file, all of it allocated, and map it; any error leaves its removal to the caller."""
        _allocate(self._open(), nbytes, self.path.parent)
        return map_segment(self.path)

    def _open(self) -> int:
        """Make a new empty file, and lock it; returns its descriptor."""
        machine.open_standard_streams()
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        for _ in range(_CREATE_ATTEMPTS):
            try:
                fd = self._fd = os.open(self.path, flags, 0o600)
            except FileExistsError:
                if not remove_orphan(self.path):
                    break
                continue
            except OSError as exc:
                raise ConfigError(f"{self.path} cannot be made: {exc.strerror}", field="name") from exc
            if _lock(fd, 0.0) and os.fstat(fd).st_nlink:
                return fd
            self._close()  # a sweep took the file, still unlocked, for an abandoned one, or is about to
        text = "a ring of that name is in use; choose another ring.name, or leave it out for a random one"
        raise ConfigError(text, field="name", name=self.name, reason="in_use")

    def descriptor(self) -> int | None:
        """Of the file, whose lock it holds; None where this process did not make it, or has removed it."""
        return self._fd if self._process_id == os.getpid() else None

    def __call__(self) -> bool:
        fd = self.descriptor()
        if fd is None:
            return False
        removed = False
        with suppress(FileNotFoundError):
            # held by flock until here, so no other file can have taken its place
            if os.stat(self.path, follow_symlinks=False).st_ino == os.fstat(fd).st_ino:
                os.unlink(self.path)
                removed = True
        self._close()  # not before: what an interrupt cuts off is done by the next call
        return removed

    def _close(self) -> None:
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)


def populate(mapping: mmap.mmap) -> None:
    """Touch all pages now: the first use of each then runs at memory speed."""
    for start in range(0, len(mapping), _CHUNK_BYTES):
        length = min(_CHUNK_BYTES, len(mapping) - start)
        try:
            mapping.madvise(_MADV_POPULATE_READ, start, length)
        except OSError:  # before Linux 5.14
            bytes(memoryview(mapping)[start : start + length : PAGE_BYTES])


def segment_folder() -> Path:
    """The folder of segments where a caller names none: the setting `ring.folder`, a ConfigError if it is wrong."""
    return Path(RingConfig(slot_bytes=1).folder)


def host_id(folder: Path | None = None) -> str:
    """32 hex digits that are equal exactly where the segments of a folder (None: `segment_folder()`) can be attached.

    Made of the boot id, the pid namespace, and the device and inode of the folder: two containers on one machine differ
    unless they share namespace and folder. A ConfigError: the folder is not there.
    """
    folder = folder or segment_folder()
    machine.check_file_name(str(folder))
    try:
        facts = os.stat(folder)
    except OSError as error:
        text = f"the folder of the rings cannot be used: {error.strerror}; make it, or set ring.folder to another"
        raise ConfigError(text, field="folder", value=str(folder)) from error
    numbers = struct.pack("<3Q", machine.pid_namespace(), facts.st_dev, facts.st_ino)
    return xxhash.xxh3_128_hexdigest(machine.boot_id() + numbers)


def segment_path(name: str, folder: Path | str | None = None) -> Path:
    """The file of a segment, named with or without the common prefix; a ConfigError for no plain file name."""
    plain = name.removeprefix(NAME_PREFIX)
    if not plain or len(plain) > 200 or "/" in plain or "\0" in plain:
        raise ConfigError(f"name must be a file name, without a slash, not {name!r}", field="name", value=name)
    path = Path(folder or segment_folder(), NAME_PREFIX + plain)
    machine.check_file_name(str(path))
    return path


def map_segment(path: Path, descriptor: int | None = None) -> mmap.mmap:
    """The memory of a file, or of its descriptor, which stays the caller's; errors as `RingHandle.attach`."""
    machine.open_standard_streams()
    try:
        if descriptor is not None:
            os.fstat(descriptor)  # of a negative one `open` raises a ValueError
        with _opened(path if descriptor is None else descriptor, "r+b") as file:
            facts = os.fstat(file.fileno())
            if not stat.S_ISREG(facts.st_mode) or facts.st_size % PAGE_BYTES:
                raise ProtocolError("not a ring: no regular file of whole pages", name=path.name, nbytes=facts.st_size)
            if facts.st_size == 0:
                raise NotReadyError("the ring is still being made; try again", name=path.name)
            return _mapped(file.fileno(), facts.st_size)
    except FileNotFoundError:
        text = "no such ring on this host: its creator is gone, or is on another host or in another container"
        raise ConfigError(text, field="name", name=path.name.removeprefix(NAME_PREFIX), reason="missing") from None
    except OSError as exc:
        raise ConfigError(f"{path} cannot be mapped: {exc.strerror}", field="name", reason="refused") from exc


def _mapped(fd: int, nbytes: int) -> mmap.mmap:
    """The memory of a file, without a descriptor: one of a file `mmap` keeps for as long as the memory is in use."""
    mapping = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)  # owns the addresses
    start = ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(mapping)))
    flags = mmap.MAP_SHARED | _MAP_FIXED
    call = ctypes.CDLL(None, use_errno=True).mmap
    call.restype = ctypes.c_void_p
    there = call(start, ctypes.c_size_t(nbytes), mmap.PROT_READ | mmap.PROT_WRITE, flags, fd, ctypes.c_long(0))
    if there != start.value:
        raise OSError(code := ctypes.get_errno(), os.strerror(code))
    return mapping


def _allocate(fd: int, nbytes: int, folder: Path) -> None:
    """Give the file all its memory now: what is not there is an error here, and never SIGBUS or SIGKILL later."""
    # the pages of a file in memory stay charged to the cgroup: one that does not fit is no error, but SIGKILL
    in_memory = machine.file_system(os.fstat(fd).st_dev) in {"tmpfs", "ramfs"}
    if in_memory and (limit := machine.memory_limit()) is not None and nbytes > limit.room_bytes:
        text = (
            f"a ring of {_both(nbytes)} is more than its cgroup may have (SIGKILL): {limit.folder} has "
            f"{_both(limit.room_bytes)} left of {_both(limit.limit_bytes)}. Lower ring.slots or the size of a slot, or "
            "raise the limit (docker: --memory; Kubernetes: resources.limits.memory; Slurm: --mem; systemd: MemoryMax=)"
        )
        room_bytes, limit_bytes = limit.room_bytes, limit.limit_bytes
        raise ConfigError(text, field="slots", needed_bytes=nbytes, room_bytes=room_bytes, limit_bytes=limit_bytes)
    there = os.fstatvfs(fd)
    free = there.f_bavail * there.f_frsize
    text = (
        f"a ring of {_both(nbytes)} does not fit {folder}, which has {_both(free)} free: lower "
        "ring.slots or the size of a slot, remove what dead workers left with `ucxx-transport clean`, or enlarge it "
        f"(docker: --shm-size; else: mount -o remount,size=… {folder})"
    )
    too_large = ConfigError(text, field="slots", needed_bytes=nbytes, free_bytes=free)
    if there.f_blocks and nbytes > free:
        raise too_large
    for start in range(0, nbytes, _CHUNK_BYTES):
        try:
            os.posix_fallocate(fd, start, min(_CHUNK_BYTES, nbytes - start))
        except OSError as exc:
            if exc.errno in (errno.ENOSPC, errno.ENOMEM, errno.EFBIG):
                raise too_large from exc
            raise ConfigError(f"the memory of the ring cannot be allocated: {exc.strerror}", errno=exc.errno) from exc


def _both(nbytes: int) -> str:
    """Exactly, too: two sizes that differ by little are one in three figures."""
    return f"{nbytes} bytes ({format_bytes(nbytes)})"


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
    """Remove the segments of dead creators in a folder (None: `segment_folder()`); returns their names."""
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
    machine.check_file_name(str(folder))  # else an error of Python's, since 3.13
    return sorted(folder.glob(NAME_PREFIX + "*"))


def _opened(file: Path | int, mode: Literal["rb", "r+b"] = "rb") -> FileIO:
    """A file, or a descriptor, which stays open; an OSError when it is gone, a link, or not this user's to open."""

    def open_no_link(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK)

    return open(file, mode, buffering=0, closefd=isinstance(file, Path), opener=open_no_link)


def _inspect(fd: int, path: Path) -> SegmentInfo:
    head, nbytes = os.pread(fd, IDENTITY_BYTES, 0), os.fstat(fd).st_size
    identity, problem = None, "half-made"
    if len(head) == IDENTITY_BYTES and any(head[COMPLETE_WORD * WORD_BYTES :][:WORD_BYTES]):
        try:
            identity, problem = Identity.from_bytes(head, nbytes), ""
        except ProtocolError as exc:
            problem = exc.message
    alive = True
    if identity and (identity.boot_id, identity.pid_namespace) == (machine.boot_id(), machine.pid_namespace()):
        alive = machine.owner_alive(identity.creator_pid, identity.creator_start)
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
