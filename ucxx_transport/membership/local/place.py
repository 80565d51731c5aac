"""Where the file lies, whose it is, whether it is still the same one, and how it comes to be.

A store's file is whole from the first moment at which it can be seen: it is made under another name and then renamed.
Its identity is its device and inode, so a file that was deleted, replaced or emptied is another store.

What SQLite keeps beside it (`-wal`, `-shm`) is known by its name alone: SQLite would take what an earlier file of the
name has left for the log of its successor. So a symbolic link beside it, `-inode`, says whose it is. A file that it
does not name was put there by somebody: it is adopted, which is to say that the log is removed, and that it gets an
identity of its own.

The default is a folder of this user's own beside the rings (`ring.folder`): processes that see the same rings see the
same store, nothing of it outlives the machine's boot, and it is never on a network. A file of its own must not begin as
the rings do, which are swept by name.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from ucxx_transport.errors import ConfigError, StorePermissionError, StoreUnavailableError
from ucxx_transport.ring.owner import segment_folder

__all__ = ["FileIdentity", "adopt_file", "checked_path", "default_path", "file_identity", "is_known", "make_file"]

FileIdentity = tuple[int, int]
"""Device and inode."""

_FOLDER: Final = "ucxx-stores-{uid}"
_NAME: Final = "default.sqlite"
_BESIDE: Final = ("-wal", "-shm", "-journal")
_MARK: Final = "-inode"
_FRESH: Final = ".fresh"
_APPLICATION_ID: Final = slice(68, 72)
"""Of the file's header (https://www.sqlite.org/fileformat.html, 1.3)."""
_LOCK_POLL_S: Final = 0.002

# SQLite's wal-index is memory that all its users map: machines do not share it over these.
_NETWORK_FILE_SYSTEMS: Final = frozenset(
    {
        *(
            "9p",
            "afs",
            "beegfs",
            "ceph",
            "cifs",
            "fuse.ceph",
            "fuse.gcsfuse",
            "fuse.glusterfs",
            "fuse.s3fs",
            "fuse.sshfs",
        ),
        *("glusterfs", "gpfs", "lustre", "ncpfs", "nfs", "nfs4", "pvfs2", "smb3", "smbfs", "wekafs"),
    }
)


def default_path() -> Path:
    """The file of this user on this machine; its folder is made when it is missing.

    Raises:
        StorePermissionError: somebody else's file or folder, or an open one, stands in its place.
    """
    memory = segment_folder()
    memory_is_there = memory.is_dir() and os.access(memory, os.W_OK | os.X_OK)
    parent = memory if memory_is_there else Path(tempfile.gettempdir())
    folder = parent / _FOLDER.format(uid=os.geteuid())
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
    return folder / _NAME


def checked_path(path: Path) -> Path:
    """The file itself, without symbolic links, where a store can lie.

    Raises:
        ConfigError: the folder is missing or on a network, or something other than a file stands there.
        StorePermissionError: this user may not look.
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
        raise _not_permitted(real, error) from error
    if not stat.S_ISREG(mode) or not stat.S_ISDIR(parent.st_mode):
        raise ConfigError("a store is a file, and something else stands there: name another", path=str(real))
    kind = _file_system(parent.st_dev)
    if kind in _NETWORK_FILE_SYSTEMS:
        raise ConfigError(
            f"the store would lie on a network file system ({kind}), where it would be damaged: name a local file, "
            "or use etcd:// for several machines",
            path=str(real),
        )
    return real


def file_identity(path: Path) -> FileIdentity | None:
    """Which file stands there; None: none, or an empty one, which no store is.

    Raises:
        StorePermissionError: this user may not look.
        StoreUnavailableError: it cannot be looked at.
    """
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except PermissionError as error:
        raise _not_permitted(path, error) from error
    except OSError as error:
        raise _unavailable(path, error) from error
    return (found.st_dev, found.st_ino) if found.st_size else None


def make_file(path: Path, fill: Callable[[Path], None], *, until: float) -> None:
    """Put a fresh store at `path` unless one is there by now.

    Args:
        path: the file.
        fill: makes a store of the empty file that it is given.
        until: on the monotonic clock, how long others that do the same are waited for.

    Raises:
        StorePermissionError: this user may not write there.
        StoreUnavailableError: the folder is gone, the disk is full, or others took too long.
    """
    try:
        with _sole_maker(path.parent, until):
            if file_identity(path) is None:
                _make(path, fill)
    except PermissionError as error:
        raise _not_permitted(path, error) from error
    except OSError as error:
        raise _unavailable(path, error) from error


def is_known(path: Path, identity: FileIdentity) -> bool:
    """Whether what lies beside the file at `path` is its own. Not the device: that may change with a boot."""
    try:
        return os.readlink(f"{path}{_MARK}") == str(identity[1])
    except OSError:
        return False


def adopt_file(
    path: Path, identity: FileIdentity, application_id: int, renew: Callable[[Path], None], *, until: float
) -> bool:
    """Make a store that was put at `path` from elsewhere one of its own.

    Args:
        path: the file.
        identity: of the file that was seen there.
        application_id: that a store has: nothing is done to another file, or beside it.
        renew: gives the store another identity.
        until: on the monotonic clock, how long others that do the same are waited for.

    Returns:
        False: it is no store.

    Raises:
        StorePermissionError, StoreUnavailableError: as `make_file`.
    """
    try:
        with _sole_maker(path.parent, until):
            if file_identity(path) != identity or is_known(path, identity):
                return True  # somebody was faster: look again
            # Closing a file lets go of this process's locks on it: SQLite's too, had it this file open. It has not.
            with path.open("rb") as file:
                if file.read(100)[_APPLICATION_ID] != application_id.to_bytes(4, "big"):
                    return False
            for suffix in _BESIDE:
                Path(f"{path}{suffix}").unlink(missing_ok=True)
            renew(path)
            _mark(path, identity[1])
            return True
    except PermissionError as error:
        raise _not_permitted(path, error) from error
    except OSError as error:
        raise _unavailable(path, error) from error


def _mark(path: Path, inode: int) -> None:
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(8)}{_FRESH}")
    os.symlink(str(inode), fresh)
    os.rename(fresh, f"{path}{_MARK}")


def _make(path: Path, fill: Callable[[Path], None]) -> None:
    for leftover in path.parent.glob(f".{path.name}.*{_FRESH}*"):  # of a maker that was killed: there is no other now
        leftover.unlink(missing_ok=True)
    for suffix in _BESIDE:
        Path(f"{path}{suffix}").unlink(missing_ok=True)
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(8)}{_FRESH}")
    try:
        os.close(os.open(fresh, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
        fill(fresh)
        _mark(path, fresh.stat().st_ino)
        os.rename(fresh, path)
    finally:
        for suffix in ("", *_BESIDE):
            Path(f"{fresh}{suffix}").unlink(missing_ok=True)


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


def _not_permitted(path: Path, error: OSError) -> StorePermissionError:
    return StorePermissionError(
        "this user may not use the store's file: give it the right to the file and its folder, or name another file",
        path=str(path),
        reason=error.strerror,
    )


def _unavailable(path: Path, error: OSError) -> StoreUnavailableError:
    return StoreUnavailableError(
        "the store's file cannot be used: see to the folder and the space on its disk",
        path=str(path),
        reason=error.strerror,
    )
