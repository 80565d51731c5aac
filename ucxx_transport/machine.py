"""What Python and the machine may lack, which `ucxx-transport doctor` shows, and what they say of a process.

| part             | where it is missing                                                                       |
|------------------|-------------------------------------------------------------------------------------------|
| /proc            | no ring and no UCX: a ConfigError                                                          |
| sqlite3          | no `local://` store: a ConfigError; `etcd://` works                                        |
| cgroup           | a ring is not checked against the memory limit of its container                            |
| memfd            | a temporary file takes its place, for the first words of a sidecar                         |
| pidfd            | a worker's death shows within 2 s, not at once, where processes that it has forked live on |
| CUDA             | no arrays on a GPU                                                                         |
| UTF-8            | the command line writes `?` for a sign that the terminal has not; its JSON is ASCII        |
| standard streams | a closed one is /dev/null from the first ring, sidecar or link on, else theirs would be it |
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Final, Literal, NamedTuple, TypeVar

from ucxx_transport.errors import BusyError, ConfigError, TransportError

T = TypeVar("T")

NO_PROC: Final = "this machine has no /proc, by which a ring knows its processes: mount it (mount -t proc proc /proc)"
NO_SQLITE: Final = "this Python has no sqlite3, which a local store needs: use one that has, or etcd:// as the store"
_UNLIMITED_BYTES: Final = 1 << 60  # v1 says "no limit" by a number near 2**63
_V2_FILES: Final = ("memory.max", "memory.current")
_V1_FILES: Final = ("memory.limit_in_bytes", "memory.usage_in_bytes")
_STREAMS: Final = ("standard input", "standard output", "standard error")


Verdict = Literal["ok", "note", "warning", "failure"]  # good to know; something will hurt; the transport cannot work


class Finding(NamedTuple):
    """One thing that was looked at, what was found, and what it costs or what to do about it."""

    name: str
    value: str
    verdict: Verdict = "ok"
    remedy: str = ""

    @classmethod
    def judged(cls, name: str, value: str, verdict: Verdict, remedy: str) -> Finding:
        """One of that verdict where there is a remedy, of `ok` where there is none."""
        return cls(name, value, verdict if remedy else "ok", remedy)


def parts() -> list[Finding]:
    """Look at each; nothing of them is used or kept."""
    has_sqlite = find_spec("sqlite3") is not None and find_spec("_sqlite3") is not None
    unchecked = "a ring is not checked against a memory limit: see that its container has room for it"
    encoding = str(getattr(sys.stdout, "encoding", None) or "none")
    is_utf8 = encoding.lower().replace("-", "") == "utf8"
    replaced = "what it has no sign for is printed as ?: PYTHONUTF8=1, or LC_ALL=C.UTF-8"
    closed = ", ".join(name for number, name in enumerate(_STREAMS) if number in _were_closed)
    unheard = "/dev/null takes its place: redirect it if its lines are wanted"
    has_memory_files, has_pidfd = _opens(lambda: os.memfd_create("")), _opens(lambda: os.pidfd_open(os.getpid()))
    return [
        _part("/proc", has_proc(), NO_PROC, "failure"),
        _part("sqlite3", has_sqlite, NO_SQLITE, "warning"),
        _part("cgroup", os.path.exists("/proc/self/cgroup"), unchecked, "warning"),
        _part("memfd", has_memory_files, "a temporary file takes its place: TMPDIR must be writable"),
        _part("pidfd", has_pidfd, "a death shows within 2 s where what a worker has forked lives"),
        _part("CUDA driver", os.path.exists("/dev/nvidiactl"), "no arrays on a GPU; all else works"),
        Finding.judged("encoding", encoding, "note", "" if is_utf8 else replaced),
        Finding.judged("streams", f"closed: {closed}" if closed else "open", "note", unheard if closed else ""),
    ]


def _part(name: str, is_there: bool, cost: str, verdict: Verdict = "note") -> Finding:  # noqa: FBT001 - a row
    return Finding(name, "there") if is_there else Finding(name, "missing", verdict, cost)


def _opens(call: Callable[[], int]) -> bool:
    """Whether this Python has the call, and kernel and sandbox allow it."""
    try:
        os.close(call())
    except (AttributeError, OSError):
        return False
    return True


def has_proc() -> bool:
    """Whether /proc is mounted and shows this process."""
    return os.path.exists("/proc/self/stat")


def check_proc() -> None:
    """Refuse to go on without /proc, with a ConfigError."""
    if not has_proc():
        raise ConfigError(NO_PROC, field="/proc")


def check_file_name(name: str) -> None:
    """Refuse a name that the file system's encoding of this process cannot write, with a ConfigError."""
    try:
        os.fsencode(name)
    except UnicodeError:
        words = f"{name!r} has signs that no file name has in the encoding {sys.getfilesystemencoding()}: PYTHONUTF8=1"
        raise ConfigError(words, field="name", value=name) from None


_were_closed: set[int] = set()


def open_standard_streams() -> None:
    """Open /dev/null on each of the descriptors 0 to 2 that is closed.

    Else the next file that is opened, such as a ring, gets that number, and a library that writes to standard error,
    as UCX does, writes into it. SQLite does the same (unix.c, SQLITE_MINIMUM_FILE_DESCRIPTOR).
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            _were_closed.add(number)
            opened = os.open(os.devnull, os.O_RDWR)  # the lowest free number
            if opened > 2:  # another thread was faster
                os.close(opened)


def prepare_output(*, json_alone: bool) -> None:
    """For a command: Python's streams are there, however it was started, and write whatever they are given.

    With `json_alone`, `sys.stdout` is for this program alone: what libraries write goes to standard error.
    """
    open_standard_streams()
    if json_alone:
        sys.stdout = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
    sys.stdout = sys.stdout or os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", encoding="utf-8", closefd=False)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a file of text, as it is where nobody has replaced it
            stream.reconfigure(errors="replace")


class MemoryLimit(NamedTuple):
    """A cgroup with a limit, and what can still be charged to it.

    Contents of files that the kernel drops for something better make room; a tmpfs's are not of these. Swap is not
    counted: a ring there would be slower than no ring.
    """

    folder: Path
    limit_bytes: int
    room_bytes: int


def memory_limit(
    membership: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")
) -> MemoryLimit | None:
    """The group, of this process's own and all above it (cgroups(7)), that leaves the least; None without a limit."""
    found = []
    with contextlib.suppress(OSError):
        for line in membership.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
            number, controllers, path = line.split(":", 2)
            is_v1 = "memory" in controllers.split(",")
            if is_v1 or number == "0":
                root, group = mount / "memory" if is_v1 else mount, Path(path)
                # a container may see its own group as the root
                folders = [root / folder.relative_to("/") for folder in (group, *group.parents)]
                found += [limit for folder in folders if (limit := _limit_of(folder, is_v1=is_v1)) is not None]
    return min(found, key=lambda limit: limit.room_bytes, default=None)


def _limit_of(folder: Path, *, is_v1: bool) -> MemoryLimit | None:
    limit_file, used_file = _V1_FILES if is_v1 else _V2_FILES
    cached = "total_{}_file" if is_v1 else "{}_file"
    try:
        limit = (folder / limit_file).read_text(encoding="ascii").strip()
        used = int((folder / used_file).read_text(encoding="ascii"))
        facts = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
    except (OSError, ValueError):
        return None  # there is no such group here, or it has no controller of memory
    if limit == "max" or int(limit) >= _UNLIMITED_BYTES:
        return None
    cached_bytes = sum(int(facts.get(cached.format(kind), 0)) for kind in ("inactive", "active"))
    return MemoryLimit(folder, int(limit), max(0, int(limit) - used + cached_bytes))


class Wakeup:
    """A descriptor (eventfd(2)) that any thread or signal handler makes readable.

    It is closed with the last reference: a notifier in another thread must never write to a number that is reused.
    """

    def __init__(self) -> None:
        self._descriptor = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        weakref.finalize(self, os.close, self._descriptor).atexit = False

    def fileno(self) -> int:
        return self._descriptor

    def notify(self) -> None:
        os.eventfd_write(self._descriptor, 1)

    def drain(self) -> None:
        try:
            os.eventfd_read(self._descriptor)
        except BlockingIOError:  # it is already
            return


LOOK_S: Final = 1.0
"""A wait for a lock takes no longer at a time: of a signal that comes just before it sleeps, Python hears behind it."""


def wait_for(changed: threading.Condition, is_over: Callable[[], bool], limit_s: float) -> bool:
    """`changed.wait_for`, in waits of `LOOK_S`."""
    until_s = time.monotonic() + limit_s
    while not is_over():
        if (left_s := until_s - time.monotonic()) <= 0:
            return False
        changed.wait(min(left_s, LOOK_S))
    return True


def start_thread(target: Callable[..., object], *args: object, name: str) -> threading.Thread:
    """Start a daemon thread; a ConfigError: the interpreter is exiting; a BusyError: there may be no more of them."""
    thread = threading.Thread(target=target, args=args, name=name, daemon=True)
    if sys.is_finalizing():  # it would be waited for, and never run
        raise _no_thread()
    try:
        thread.start()
    except RuntimeError:  # there may be no more; or, from Python 3.12 on, the interpreter is exiting
        raise _no_thread() from None
    return thread


async def in_thread(call: Callable[[], T]) -> T:
    """Make a call beside the event loop, in a thread; in the loop's own where the interpreter is exiting.

    A cancellation does not wait for it. A BusyError: this process may have no more threads.
    """
    from anyio import to_thread

    try:
        return await to_thread.run_sync(call, abandon_on_cancel=True)
    except RuntimeError:  # the start of a thread: no call of ours raises it
        if not isinstance(error := _no_thread(), ConfigError):
            raise error from None
    return call()


def _no_thread() -> TransportError:
    if sys.is_finalizing() or not threading.main_thread().is_alive():  # exit handlers run, or the last threads
        words = "the interpreter is exiting, and starts no thread any more: start this before the program ends"
        return ConfigError(words)
    words = "this process may have no more threads; end some, or raise its limit (ulimit -u, or its cgroup's pids.max)"
    return BusyError(words)


class Owner(NamedTuple):
    """A process, for ever: a pid alone is given to another process some day.

    `pid` counts in the namespace that all users of a segment share; `start` is in clock ticks since boot: field 22 of
    `/proc/<pid>/stat` (proc(5)).
    """

    pid: int
    start: int


@functools.cache
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


@functools.cache
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
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            fields, _, source = line.partition(" - ")
            if fields.split()[2] == wanted:
                return source.split()[0]
    return ""


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
