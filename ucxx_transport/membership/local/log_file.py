"""The store's file: where it lies, and how its log is read and written.

| bytes                          | are                                                                        |
|--------------------------------|----------------------------------------------------------------------------|
| 16                             | `ucxx store` and the format, in ASCII                                      |
| 16                             | the store's identity, random                                               |
| 4 + 4 + n, little-endian       | a frame: n, CRC-32 of what follows, msgpack: first all of the content      |
| 4 + 4 + n, again and again     | further frames: the steps of a change each (see `content`)                 |

A writer holds an exclusive flock on the file from reading its end to writing behind it. A reader holds nothing: the
kernel shows a file's new length after the bytes, so that a frame which is there is whole. What ends before its frame
does was left by a writer that was killed, and the next one writes over it.

The first call of any process makes the file. When the log has grown, a writer puts a fresh file of the same identity
in its place. One with another identity is another store: the file was deleted, emptied or replaced.

The default is a folder of this user's own beside the rings (`ring.folder`): processes that see the same rings see the
same store, nothing of it outlives the machine's boot, and it is never on a network. Its name does not begin as the
rings' do, which are swept by name.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import stat
import struct
import tempfile
import threading
import time
import weakref
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Final, TypeVar

import msgpack

from ucxx_transport.backoff import random_pause_s
from ucxx_transport.errors import ConfigError, StorePermissionError, StoreUnavailableError
from ucxx_transport.logs import get_logger
from ucxx_transport.membership.local.content import Content, Step
from ucxx_transport.ring.owner import segment_folder

_log = get_logger(__name__)

ResultT = TypeVar("ResultT")

KIND: Final = b"ucxx store"
MAGIC: Final = KIND + b"     1"
"""Another number at its end is another version's."""
_PREAMBLE_BYTES: Final = 32
_FRAME: Final = struct.Struct("<II")
_GROWTH_BYTES: Final = 1 << 20
_FIRST_PAUSE_S: Final = 0.0005
_LONGEST_PAUSE_S: Final = 0.01
_OPEN: Final = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
_NETWORK_FILE_SYSTEMS: Final = frozenset(
    {
        *("9p", "afs", "beegfs", "ceph", "cifs", "glusterfs", "gpfs", "lustre", "ncpfs", "nfs", "nfs4", "pvfs2"),
        *("smb3", "smbfs", "wekafs", "fuse.ceph", "fuse.gcsfuse", "fuse.glusterfs", "fuse.s3fs", "fuse.sshfs"),
    }
)
"""Machines do not see each other's locks, nor at once what another has written, over these."""


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
    return folder / "default.store"


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


class LogFile:
    """A store's file, and its content as read last. Thread-safe; a forked child may go on using it.

    Args:
        path: the file; it is made by the first call.
        boot_id: of the content of a file that is made.
        due: the steps that are to be done before anything else is read or written, such as to end leases.

    Attributes:
        path: the file.
        store_id: the identity of the store that was read last; "" before.
    """

    def __init__(self, path: Path, boot_id: str, due: Callable[[Content], list[Step]]) -> None:
        self.path = path
        self.store_id = ""
        self._boot_id = boot_id
        self._due = due
        self._closed = False
        self.forget()
        _files.add(self)

    def forget(self) -> None:
        """Read all of it again with the next call: a forked child has the lock and the content as they just were."""
        self._lock = threading.Lock()
        self._content: Content | None = None
        self._stamp: tuple[int, ...] = ()
        self._end = self._rewrite_at = 0

    def read(self, body: Callable[[Content], ResultT], *, until: float) -> ResultT:
        """What `body` returns, by a time on the monotonic clock.

        Raises:
            ConfigError: the file is no store, or this is closed.
            StorePermissionError: this user may not use the file.
            StoreUnavailableError: the file is locked, damaged or gone, or the disk is full.
        """
        with self._call(until):
            content = self._seen()
            if content is not None and not self._due(content):
                return body(content)
        return self.write(lambda found: ([], body(found)), until=until)

    def write(self, decide: Callable[[Content], tuple[list[Step], ResultT]], *, until: float) -> ResultT:
        """Write the steps that `decide` gives for the content as it is, and return what it gives beside; as `read`."""
        for attempt in count(1):
            with self._call(until), self._opened() as fd:
                if _is_taken(fd, self.path):
                    return self._change(fd, decide)
            wait_s = random_pause_s(attempt, first_s=_FIRST_PAUSE_S, longest_s=_LONGEST_PAUSE_S)
            if time.monotonic() + wait_s > until:
                break
            time.sleep(wait_s)
        text = "the store was locked until the deadline: see who is stopped"
        raise StoreUnavailableError(text, path=str(self.path))

    def check_open(self) -> None:
        """Raise a ConfigError once this is closed."""
        if self._closed:
            raise ConfigError("the store is closed: open another", path=str(self.path))

    def close(self) -> None:
        """Refuse from now on. Idempotent."""
        self._closed = True

    @contextmanager
    def _call(self, until: float) -> Iterator[None]:
        """One call at a time, whose errors are the store's."""
        self.check_open()
        lock = self._lock
        if not lock.acquire(timeout=max(0.0, until - time.monotonic())):
            raise StoreUnavailableError("other threads' calls took until the deadline", path=str(self.path))
        try:
            yield
        except OSError as error:
            raise _translated(error, self.path) from error
        finally:
            lock.release()

    def _seen(self) -> Content | None:
        """The content without any lock; None: it takes a lock to see what there is."""
        # A damaged frame may be one that is just written over what a killed writer has left.
        with suppress(FileNotFoundError, NotADirectoryError, StoreUnavailableError):
            if self._content is not None and _stamp_of(os.stat(self.path)) == self._stamp:
                return self._content
            fd = os.open(self.path, _OPEN & ~os.O_CREAT)
            try:
                return self._load(fd)
            finally:
                os.close(fd)
        return None

    @contextmanager
    def _opened(self) -> Iterator[int]:
        """The descriptor of the file, which is made if there is none; unlocked and closed at the end."""
        pid, fd = os.getpid(), os.open(self.path, _OPEN, 0o600)
        try:
            yield fd
        finally:
            if os.getpid() == pid:  # a child that was forked in between shares the lock, which is its parent's
                fcntl.flock(fd, fcntl.LOCK_UN)
            os.close(fd)

    def _change(self, fd: int, decide: Callable[[Content], tuple[list[Step], ResultT]]) -> ResultT:
        """Do what is due and what is decided, with the file locked."""
        content = self._load(fd) or self._begin(fd)
        self._append(fd, content, self._due(content))
        steps, result = decide(content)
        self._append(fd, content, steps)
        if self._end > self._rewrite_at:
            self._rewrite(fd, content)
        return result

    def _load(self, fd: int) -> Content | None:
        """The content, once what is new in the file is read; None: the file is empty, or its beginning not whole."""
        stamp = _stamp_of(os.fstat(fd))
        preamble = os.pread(fd, _PREAMBLE_BYTES, 0)
        if preamble[: len(MAGIC)] != MAGIC[: len(preamble)]:
            raise ConfigError(
                "the file is no store, or one of another version of this package: name another, or remove it",
                path=str(self.path),
            )
        store_id, size = preamble[len(MAGIC) :].hex(), stamp[2]
        content, self._content = self._content, None  # an exception leaves none that is changed by half
        if content is None or store_id != self.store_id or stamp[:2] != self._stamp[:2] or size < self._end:
            content, self._end = None, _PREAMBLE_BYTES  # another file, or another store in it
        data = memoryview(os.pread(fd, max(0, size - self._end), self._end))
        while len(data) >= _FRAME.size:
            length, checksum = _FRAME.unpack_from(data)
            frame = data[_FRAME.size : _FRAME.size + length]
            if len(frame) < length:
                break  # it is being written, or its writer was killed
            if zlib.crc32(frame) != checksum:
                text = "the store's file is damaged: remove it; its users publish again"
                raise StoreUnavailableError(text, path=str(self.path))
            form = msgpack.unpackb(frame)
            if content is None:
                content = Content(form)
                self._rewrite_at = 2 * length + _GROWTH_BYTES
                if self.store_id not in {"", store_id}:
                    _log.warning("store_replaced", path=str(self.path), store_id=store_id)
                self.store_id = store_id
            else:
                content.apply(form)
            self._end += _FRAME.size + length
            data = data[_FRAME.size + length :]
        self._content, self._stamp = content, stamp
        return content

    def _begin(self, fd: int) -> Content:
        """Make an empty file a store."""
        form = {"boot_id": self._boot_id}
        _write_at(fd, MAGIC + secrets.token_bytes(_PREAMBLE_BYTES - len(MAGIC)) + _frame(form), 0)
        content = self._load(fd)
        assert content is not None  # it was just written
        return content

    def _append(self, fd: int, content: Content, steps: list[Step]) -> None:
        if not steps:
            return
        if self._content is not content:
            raise StoreUnavailableError("the fork came in the middle of a call: call again", path=str(self.path))
        frame = _frame(steps)
        _write_at(fd, frame, self._end)
        self._content = None  # until all of the steps are done
        content.apply(steps)
        self._end += len(frame)
        self._content, self._stamp = content, _stamp_of(os.fstat(fd))

    def _rewrite(self, fd: int, content: Content) -> None:
        """Put a file that begins with all of the content in this one's place; where that fails, this one stays."""
        self._rewrite_at = 2 * self._end
        fresh = self.path.with_name(f".{self.path.name}.fresh")
        try:
            fresh.unlink(missing_ok=True)  # of a writer that was killed
            new = os.open(fresh, _OPEN | os.O_EXCL, 0o600)
            try:
                os.fchmod(new, stat.S_IMODE(os.fstat(fd).st_mode))
                _write_at(new, os.pread(fd, _PREAMBLE_BYTES, 0) + _frame(content.to_form()), 0)
                os.rename(fresh, self.path)
            finally:
                os.close(new)
        except OSError as error:
            _log.warning("store_not_rewritten", path=str(self.path), reason=error.strerror)
            with suppress(OSError):
                fresh.unlink()


_files: weakref.WeakSet[LogFile] = weakref.WeakSet()


def _forget_all() -> None:
    for file in list(_files):
        file.forget()


os.register_at_fork(after_in_child=_forget_all)


def _is_taken(fd: int, path: Path) -> bool:
    """Whether this file is locked now for who opened it, and is still the one at the path."""
    with suppress(BlockingIOError, FileNotFoundError):
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(fd), os.stat(path))
    return False


def _stamp_of(found: os.stat_result) -> tuple[int, ...]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _frame(form: object) -> bytes:
    content: bytes = msgpack.packb(form)
    return _FRAME.pack(len(content), zlib.crc32(content)) + content


def _write_at(fd: int, content: bytes, offset: int) -> None:
    """Write all of it and end the file there, or none of it."""
    os.ftruncate(fd, offset)  # what a killed writer has left
    written = 0
    try:
        while written < len(content):
            written += os.pwrite(fd, memoryview(content)[written:], offset + written)
    except BaseException:
        os.ftruncate(fd, offset)
        raise


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
    facts = {"path": str(path), "reason": error.strerror}
    if isinstance(error, PermissionError):
        text = "this user may not use the store's file: give it the right to the file and its folder, or name another"
        return StorePermissionError(text, **facts)
    return StoreUnavailableError(
        "the store's file cannot be used: see to the folder and the space on its disk", **facts
    )
