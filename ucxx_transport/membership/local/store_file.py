"""The store's file: where it lies, which file is there, and how a fresh one is made.

A fresh file is made under another name and then renamed: it is whole when it is first seen. A file is known by its
device and inode, so one that was deleted, and made again by the next call, is another store.

SQLite knows the log beside a file (`-wal`, `-shm`) by its name alone. What a deleted file has left there is removed
before a fresh one is made; what a replaced one has left, by the first process that had it open and finds its successor.
A process that opens the successor earlier reads the log of another file: to wipe a store, delete it; move none there.

The default is a folder of this user's own beside the rings (`ring.folder`): processes that see the same rings see the
same store, nothing of it outlives the machine's boot, and it is never on a network. Its name does not begin as the
rings' do, which are swept by name.
"""

from __future__ import annotations

import fcntl
import os
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from ucxx_transport.errors import ConfigError, StorePermissionError, StoreUnavailableError
from ucxx_transport.ring.owner import segment_folder

FileIdentity = tuple[int, int]
"""Device and inode."""

_BESIDE: Final = ("-wal", "-shm", "-journal")
_LOCK_POLL_S: Final = 0.002
_NETWORK_FILE_SYSTEMS: Final = frozenset(
    {
        *("9p", "afs", "beegfs", "ceph", "cifs", "glusterfs", "gpfs", "lustre", "ncpfs", "nfs", "nfs4", "pvfs2"),
        *("smb3", "smbfs", "wekafs", "fuse.ceph", "fuse.gcsfuse", "fuse.glusterfs", "fuse.s3fs", "fuse.sshfs"),
    }
)
"""SQLite's wal-index is memory that all its users map: machines do not share it over these."""


def default_path() -> Path:
    """The file of this user on this machine; its folder is made where it is missing, refused where not private."""
    memory = segment_folder()
    memory_is_there = memory.is_dir() and os.access(memory, os.W_OK | os.X_OK)
    parent = memory if memory_is_there else Path(tempfile.gettempdir())
    folder = parent / f"ucxx-stores-{os.geteuid()}"
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise StorePermissionError(
            "the folder of the default store is not this user's alone: remove it, or name a file by local:///path",
            path=str(folder),
            uid=found.st_uid,
            mode=oct(found.st_mode),
        )
    return folder / "default.sqlite"


def checked_path(path: Path) -> Path:
    """The file itself, without symbolic links, where a store can lie.

    Raises:
        ConfigError: the folder is missing or on a network, or something other than a file is there.
        StorePermissionError: this user may not read the folder.
    """
    real = Path(os.path.realpath(path))
    try:
        parent = real.parent.stat()
        mode = real.stat().st_mode if real.exists() else stat.S_IFREG
    except FileNotFoundError:
        raise ConfigError("the store's folder does not exist: make it, or name another", path=str(real)) from None
    except NotADirectoryError:
        raise ConfigError("the store's folder is none: name another", path=str(real)) from None
    except PermissionError as error:
        raise _translated(error, real) from error
    if not stat.S_ISREG(mode) or not stat.S_ISDIR(parent.st_mode):
        raise ConfigError("a store is a file, and something else is there: name another", path=str(real))
    kind = _file_system(parent.st_dev)
    if kind in _NETWORK_FILE_SYSTEMS:
        raise ConfigError(
            f"the store would lie on a network file system ({kind}), where it would be damaged: name a local file, "
            "or use etcd:// for several machines",
            path=str(real),
        )
    return real


def file_identity(path: Path) -> FileIdentity | None:
    """Which file is there; None: none, or an empty one, which no store is.

    Raises:
        StorePermissionError: this user may not read the folder.
        StoreUnavailableError: the disk does not answer.
    """
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise _translated(error, path) from error
    return (found.st_dev, found.st_ino) if found.st_size else None


def log_identity(path: Path) -> FileIdentity | None:
    """Which log is beside the file; None: none."""
    with suppress(OSError):
        found = os.stat(f"{path}-wal")
        return found.st_dev, found.st_ino
    return None


def make_file(path: Path, fill: Callable[[Path], None], *, until: float, stale_log: FileIdentity | None = None) -> None:
    """Put a fresh store at `path` unless one is there by now.

    Args:
        path: the file.
        fill: makes a store of the empty file that it is given.
        until: on the monotonic clock, how long other processes that do the same are waited for.
        stale_log: a log that is removed if it is still beside the file: that of an earlier file, which is still open
            here, so that no other log can have its inode.

    Raises:
        StorePermissionError: this user may not write there.
        StoreUnavailableError: the folder is gone, the disk is full, or others took too long.
    """
    fresh = path.with_name(f".{path.name}.fresh")
    try:
        with _sole_maker(path.parent, until):
            missing = file_identity(path) is None
            if missing or (stale_log is not None and log_identity(path) == stale_log):
                _remove(path, *_BESIDE)
            if not missing:
                return
            try:
                _remove(fresh, "", *_BESIDE)  # of a maker that was killed
                os.close(os.open(fresh, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
                fill(fresh)
                os.rename(fresh, path)
            finally:
                _remove(fresh, "", *_BESIDE)
    except OSError as error:
        raise _translated(error, path) from error


def _remove(path: Path, *suffixes: str) -> None:
    for suffix in suffixes:
        Path(f"{path}{suffix}").unlink(missing_ok=True)


@contextmanager
def _sole_maker(folder: Path, until: float) -> Iterator[None]:
    """One maker of files in a folder at a time. The lock is the folder's, which stays where files come and go."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= until:
                    raise StoreUnavailableError(
                        "another process keeps the store's folder locked: end it, or wait for it", path=str(folder)
                    ) from None
                time.sleep(_LOCK_POLL_S)
        yield
    finally:
        os.close(fd)


def _file_system(device: int) -> str:
    """The kind of file system that a device number of `stat` names; "" when the mount table has none (btrfs)."""
    wanted = f"{os.major(device)}:{os.minor(device)}"
    with suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text(errors="replace").splitlines():
            mount, _, source = line.partition(" - ")
            if mount.split()[2] == wanted:
                return source.split()[0]
    return ""


def _translated(error: OSError, path: Path) -> StorePermissionError | StoreUnavailableError:
    if isinstance(error, PermissionError):
        return StorePermissionError(
            "this user may not use the store's file: give it the right to the file and its folder, or name another",
            path=str(path),
            reason=error.strerror,
        )
    return StoreUnavailableError(
        "the store's file cannot be used: see to the folder and the space on its disk",
        path=str(path),
        reason=error.strerror,
    )
