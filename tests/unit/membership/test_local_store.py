"""What only a store in a file has: its place, its clock, and what may become of the file."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any

import pytest

from tests.support.clock import Clock
from tests.support.exhaustive import exhaustive
from tests.support.interrupts import Interrupter, every_point
from tests.support.rows import row
from tests.support.stopping import stop_process
from tests.support.store_processes import elsewhere, processes
from tests.support.waiting import wait_until
from ucxx_transport.config import StoreConfig
from ucxx_transport.errors import (
    CompactedError,
    ConfigError,
    LeaseLostError,
    StoreResetError,
    StoreUnavailableError,
    TransportError,
)
from ucxx_transport.membership import local_file, open_store
from ucxx_transport.membership.local_file import FORMAT
from ucxx_transport.membership.local_store import KEPT_REVISIONS, LocalStore
from ucxx_transport.ring.segment import segment_folder


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def opened(path: Path) -> Iterator[Callable[..., LocalStore]]:
    """Opens stores in the file; they are closed at the end."""
    with ExitStack() as stack:

        def of(**arguments: Any) -> LocalStore:
            return stack.enter_context(LocalStore(arguments.pop("path", path), StoreConfig(timeout_s=5), **arguments))

        yield of


# leases by the clock


def test_a_lease_ends_at_its_deadline_for_every_user_of_the_store(opened: Callable[..., LocalStore]) -> None:
    clock = Clock()
    store, other = opened(clock=clock), opened(clock=clock)
    lease = store.grant(5)
    store.put("a", b"", lease_id=lease.lease_id)
    clock.now_s += 4.9
    assert store.keep_alive(lease.lease_id) == 5
    clock.now_s += 4.9
    assert other.get("a") is not None
    clock.now_s += 0.1
    assert other.get("a") is None
    with pytest.raises(LeaseLostError):
        store.keep_alive(lease.lease_id)


def test_a_lost_lease_is_lost_also_when_no_call_came_since(opened: Callable[..., LocalStore]) -> None:
    clock = Clock()
    store = opened(clock=clock)
    lease = store.grant(5)
    store.put("a", b"", lease_id=lease.lease_id)
    clock.now_s += 5
    with pytest.raises(LeaseLostError):
        store.keep_alive(lease.lease_id)
    with pytest.raises(LeaseLostError):
        store.put("b", b"", lease_id=lease.lease_id)
    assert store.put("a", b"", expected=0) > 0


def test_leases_that_end_together_end_in_a_revision_each(opened: Callable[..., LocalStore]) -> None:
    clock = Clock()
    store = opened(clock=clock)
    leases = [store.grant(ttl_s) for ttl_s in (3, 2, 1)]
    for number, lease in enumerate(leases):
        store.put(f"{number}/a", b"", lease_id=lease.lease_id)
        store.put(f"{number}/b", b"", lease_id=lease.lease_id)
    with store.watch(after=store.snapshot().revision) as watch:
        clock.now_s += 10
        batches = [watch.next(5) for _ in leases]
    found = [[event.key for event in batch.events] for batch in batches if batch]
    assert found == [["2/a", "2/b"], ["1/a", "1/b"], ["0/a", "0/b"]]


def test_an_idle_watcher_ends_leases(opened: Callable[..., LocalStore]) -> None:
    store = opened()
    lease = store.grant(0.3)
    revision = store.put("a", b"", lease_id=lease.lease_id)
    with store.watch(after=revision) as watch:
        batch = watch.next(10)
    assert batch is not None
    assert [(event.kind, event.key) for event in batch.events] == [("delete", "a")]


def test_after_a_reboot_all_leases_are_over_and_everything_else_is_there(opened: Callable[..., LocalStore]) -> None:
    clock = Clock()
    before = opened(clock=clock, boot_id="one boot")
    lease = before.grant(1e6)
    before.put("alive", b"", lease_id=lease.lease_id)
    before.put("kept", b"")
    revision, identity = before.snapshot().revision, before.snapshot().identity
    before.close()
    clock.now_s = 1.0
    after = opened(clock=clock, boot_id="another boot")
    assert [entry.key for entry in after.snapshot()] == ["kept"]
    assert after.snapshot().revision == revision + 1
    assert after.snapshot().identity == identity
    with pytest.raises(LeaseLostError):
        after.keep_alive(lease.lease_id)


# the log


def test_the_newest_revisions_are_kept_and_older_ones_compacted(opened: Callable[..., LocalStore]) -> None:
    store = opened()
    first = store.put("a", b"")
    *_, last = (store.put("a", b"last") for _ in range(KEPT_REVISIONS + 1))
    store = opened()
    assert store.snapshot().revision == last
    with store.watch(after=last - KEPT_REVISIONS) as watch:
        assert watch.next(5) is not None
    for after in (first, last - KEPT_REVISIONS - 1):
        with store.watch(after=after) as watch, pytest.raises(CompactedError):
            watch.next(5)


# the place


def test_the_file_is_this_users_alone(opened: Callable[..., LocalStore], path: Path) -> None:
    opened().put("a", b"")
    files = [found for found in path.parent.iterdir() if not found.is_symlink()]
    assert {stat.S_IMODE(found.stat().st_mode) for found in files} == {0o600}
    assert len(files) == 3


def test_nothing_but_the_file_is_left(opened: Callable[..., LocalStore], path: Path) -> None:
    store = opened()
    store.put("a", b"")
    store.close()
    assert [found.name for found in path.parent.iterdir()] == [path.name]


def test_the_default_store_is_in_a_folder_of_this_users_own() -> None:
    with open_store("local://", StoreConfig(namespace=f"test-{os.getpid()}")) as store:
        store.put("a", b"")
        store.delete("a")
        folder = Path(store.url.removeprefix("local://")).parent
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert folder.stat().st_uid == os.geteuid()
        assert not folder.name.startswith("ucxx_transport")  # what is, is taken for a ring and swept
        with open_store("local://") as other:
            assert other.url == store.url
            assert other.snapshot().identity == store.snapshot().identity


def test_the_url_of_a_store_opens_it(opened: Callable[..., LocalStore], tmp_path: Path) -> None:
    store = opened(path=tmp_path / "a b%20ü")
    store.put("a", b"")
    with open_store(store.url) as other:
        assert other.snapshot().identity == store.snapshot().identity
        assert other.url == store.url
        assert [entry.key for entry in other.snapshot()] == ["a"]


def test_a_place_that_can_hold_no_store_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("missing/store", "file/store", "folder", "pipe"):
        with pytest.raises(ConfigError) as caught:
            LocalStore(tmp_path / name)
        assert caught.value.facts["path"] == str(tmp_path / name)


def test_a_file_that_is_no_store_is_left_as_it_is(opened: Callable[..., LocalStore], path: Path) -> None:
    for content in (b"not a database, but rather long" * 100, b"x"):
        path.write_bytes(content)
        store = opened()
        for call in (partial(store.get, "a"), partial(store.put, "a", b"")):
            with pytest.raises(ConfigError, match="no store") as caught:
                call()
            assert caught.value.facts["path"] == str(path)
        assert path.read_bytes() == content


def test_another_programs_database_is_no_store(opened: Callable[..., LocalStore], path: Path) -> None:
    with sqlite3.connect(path) as raw:
        raw.execute("CREATE TABLE notes (text)")
    raw.close()
    with pytest.raises(ConfigError, match="no store"):
        opened().get("a")


def test_another_versions_store_is_left_alone(opened: Callable[..., LocalStore], path: Path) -> None:
    store = opened()
    store.put("a", b"")
    store.close()
    with sqlite3.connect(path) as raw:
        raw.execute(f"PRAGMA user_version = {FORMAT + 1}")
    raw.close()
    with pytest.raises(ConfigError, match="another version"):
        opened().put("a", b"")


def test_the_error_for_a_damaged_file_has_the_remedy(opened: Callable[..., LocalStore], path: Path) -> None:
    store = opened()
    store.put("a", b"x" * 100_000)
    store.close()
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(os.urandom(path.stat().st_size - 4096))
    with pytest.raises(StoreUnavailableError, match="remove it") as caught:
        opened().snapshot()
    assert caught.value.facts["path"] == str(path)
    path.unlink()
    assert opened().snapshot().entries == ()


# what may become of the file


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def deleted(path: Path) -> None:
    path.unlink()


def deleted_with_all_beside_it(path: Path) -> None:
    for found in path.parent.iterdir():
        found.unlink()


@pytest.mark.parametrize("wipe", [emptied, deleted, deleted_with_all_beside_it])
def test_a_wiped_file_is_noticed_by_watches_and_made_again_for_calls(
    opened: Callable[..., LocalStore], path: Path, wipe: Callable[[Path], None]
) -> None:
    store, other = opened(), opened()
    identity = store.snapshot().identity
    store.put("old", b"x")
    revision = store.snapshot().revision
    with store.watch(after=revision, identity=identity) as watch, other.watch(after=0) as second:
        assert watch.next(0) is None
        assert second.next(0) is not None
        wipe(path)
        for each in (watch, second, watch):
            with pytest.raises(StoreResetError):
                each.next(5)
    assert other.snapshot().entries == ()
    store.put("new", b"")
    assert [entry.key for entry in other.snapshot()] == ["new"]
    assert identity != store.snapshot().identity == other.snapshot().identity
    with other.watch(after=other.snapshot().revision) as watch:
        store.put("newer", b"")
        batch = watch.next(5)
        assert batch is not None
        assert batch.events[0].key == "newer"


def test_another_programs_log_is_left_alone(opened: Callable[..., LocalStore], path: Path) -> None:
    raw = sqlite3.connect(path, isolation_level=None)
    raw.execute("PRAGMA journal_mode = WAL")
    raw.execute("CREATE TABLE notes (text)")
    names = sorted(found.name for found in path.parent.iterdir())
    assert len(names) == 3
    with pytest.raises(ConfigError, match="no store"):
        opened().get("a")
    assert sorted(found.name for found in path.parent.iterdir()) == names
    raw.close()


def test_processes_that_make_the_same_file_at_once_share_it(path: Path) -> None:
    with ExitStack() as stack:
        pipes = [stack.enter_context(elsewhere(_make_one, f"local://{path}", {}))[1] for _ in range(3)]
        for pipe in pipes:
            assert pipe.recv() == "ready"
        for pipe in pipes:
            pipe.send("go")
        assert len({pipe.recv() for pipe in pipes}) == 1
    with LocalStore(path) as store:
        assert len(store.snapshot().entries) == 3


def _make_one(url: str, settings: dict[str, Any], pipe: Connection) -> None:
    with open_store(url, StoreConfig(**settings)) as store:
        pipe.send("ready")
        pipe.recv()
        store.put(f"by-{os.getpid()}", b"")
        pipe.send(store.snapshot().identity)


def test_what_a_killed_maker_left_is_swept(opened: Callable[..., LocalStore], path: Path) -> None:
    path.with_name(f".{path.name}.fresh").write_bytes(b"half")
    opened().put("a", b"")
    assert not [found for found in path.parent.iterdir() if found.name.startswith(".")]


def test_a_folder_that_is_gone_is_an_outage(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    with LocalStore(folder / "store", StoreConfig(timeout_s=1)) as store:
        store.put("a", b"")
        for found in folder.iterdir():
            found.unlink()
        folder.rmdir()
        with pytest.raises(StoreUnavailableError):
            store.get("a")
        folder.mkdir()
        assert store.get("a") is None


def test_a_stopped_writer_makes_the_store_unavailable_and_a_killed_one_does_not(path: Path) -> None:
    with LocalStore(path, StoreConfig(timeout_s=0.3)) as store:
        store.put("a", b"")
        with elsewhere(_hold_the_lock, f"local://{path}", {}) as (process, pipe):
            assert pipe.recv() == "locked"
            assert process.pid is not None
            stop_process(process.pid)
            with store.watch(after=0) as watch:
                assert watch.next(0) is not None  # a reader waits for no writer
                with pytest.raises(StoreUnavailableError, match="locked") as caught:
                    store.put("a", b"")
                assert caught.value.facts["path"] == str(path)
            os.kill(process.pid, signal.SIGKILL)
            wait_until(lambda: _put(store), 10)


def _put(store: LocalStore) -> bool:
    try:
        return store.put("b", b"") > 0
    except StoreUnavailableError:
        return False


def _hold_the_lock(url: str, _settings: dict[str, Any], pipe: Connection) -> None:
    raw = sqlite3.connect(url.removeprefix("local://"), isolation_level=None)
    raw.execute("BEGIN IMMEDIATE")
    raw.execute("UPDATE state SET revision = revision + 1000")
    pipe.send("locked")
    signal.pause()


def test_a_watch_fails_when_a_lease_cannot_be_ended_for_long(path: Path) -> None:
    clock = Clock()
    with LocalStore(path, StoreConfig(timeout_s=0.2), clock=clock) as store:
        lease = store.grant(5)
        revision = store.put("a", b"", lease_id=lease.lease_id)
        raw = sqlite3.connect(path, isolation_level=None)
        raw.execute("BEGIN IMMEDIATE")
        with store.watch(after=revision) as watch:
            clock.now_s += 5
            with pytest.raises(StoreUnavailableError, match="locked"):
                watch.next(10)
            raw.close()
            batch = watch.next(10)
            assert batch is not None
            assert batch.events[0].kind == "delete"


def test_a_call_in_which_a_process_forks_is_made_by_the_parent_alone_and_the_child_goes_on(path: Path) -> None:
    with elsewhere(_fork_in_a_call, f"local://{path}", {}) as (_process, pipe):
        assert pipe.recv() == (["StoreUnavailableError", "done", "done"], ["done"], ["a", "b", "c", "d"])


def _fork_in_a_call(url: str, _settings: dict[str, Any], pipe: Connection) -> None:
    near, far = os.pipe()
    path = Path(url.removeprefix("local://"))
    children: list[int] = []

    def fork() -> float:  # in the transaction of a put, and once
        if not children:
            children.append(os.fork())
        return 0.0

    def error_of(call: Callable[[], object]) -> str:
        try:
            call()
        except StoreUnavailableError as error:
            return type(error).__name__
        return "done"

    store = LocalStore(path)
    store.put("a", b"")
    forking = LocalStore(path, clock=fork)
    errors = [error_of(partial(forking.put, "b", b"", expected=0))]
    if children == [0]:
        errors += [error_of(partial(forking.put, "c", b"")), error_of(partial(LocalStore(path).put, "d", b""))]
        os.write(far, " ".join(errors).encode())
        os._exit(0)
    os.waitpid(children[0], 0)
    pipe.send((os.read(near, 100).decode().split(), errors, [entry.key for entry in store.snapshot()]))
    for each in (store, forking):
        each.close()


def test_an_interrupt_at_any_point_of_a_call_keeps_no_other_thread_s_call_waiting(
    opened: Callable[..., LocalStore],
) -> None:
    store, other = opened(), opened()
    other.put("first", b"")
    store.put("interrupted", b"")
    points = 0
    with ThreadPoolExecutor(1) as pool:
        for where in every_point(lambda: store.put("interrupted", b""), ("membership/local_",)):
            with row(where=where):
                pool.submit(other.put, "another", b"").result()
                store.put("next", b"")
                points += 1
    assert points > 20


class Forker(Interrupter):
    """Forks where an `Interrupter` interrupts."""

    child = -1

    def _point(self, frame: FrameType) -> None:
        try:
            super()._point(frame)
        except KeyboardInterrupt:
            self.child = os.fork()


@pytest.mark.parametrize("step", [4, exhaustive(1)])
def test_a_fork_at_any_point_of_a_call_damages_nothing_and_loses_no_write(path: Path, step: int) -> None:
    with elsewhere(_fork_at_points, f"local://{path}", {"step": step}) as (_process, pipe):
        points, refused, missing, damage = pipe.recv()
    assert points > 50
    assert refused < points / step / 2
    assert (missing, damage) == (set(), "ok")


def _fork_at_points(url: str, settings: dict[str, Any], pipe: Connection) -> None:
    """Send how many points there are, how many children could not write, and what is lost or damaged."""
    pytest.MonkeyPatch().setattr(local_file, "_FORK_WAIT_S", 0.05)
    path = Path(url.removeprefix("local://"))
    written, refused, at = {"first"}, 0, 0
    with LocalStore(path) as first:
        first.put("first", b"")
        while True:
            store, forker = LocalStore(path), Forker(at, ("membership/local_",))
            try:
                with forker:
                    store.put(f"parent/{at}", b"")
            except StoreUnavailableError:
                if forker.child != 0:
                    raise
            if forker.child == 0:
                try:
                    store.put(f"child/{at}", b"")
                    LocalStore(path).put(f"child/{at}", b"again")
                except StoreUnavailableError:
                    os._exit(7)
                os._exit(0)
            written.add(f"parent/{at}")
            if forker.where is None:
                break
            code = os.waitstatus_to_exitcode(os.waitpid(forker.child, 0)[1])
            assert code in {0, 7}
            refused += code == 7
            if code == 0:
                written.add(f"child/{at}")
            store.close()
            at += settings["step"]
        missing = written - {entry.key for entry in first.snapshot()}
    with closing(sqlite3.connect(path)) as raw:
        pipe.send((at, refused, missing, raw.execute("PRAGMA integrity_check").fetchone()[0]))


def test_a_fork_waits_for_the_calls_of_other_threads(opened: Callable[..., LocalStore]) -> None:
    store = opened()
    ended = threading.Event()

    def write() -> None:
        while not ended.is_set():
            store.put("thread", b"")

    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write)
        try:
            for number in range(20):
                if (child := os.fork()) == 0:
                    try:
                        store.put(f"child/{number}", b"")
                        os._exit(0)
                    finally:
                        os._exit(1)
                assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        finally:
            ended.set()
        writing.result()
    assert len(store.snapshot("child/").entries) == 20


# rights and space, which root is not bound by: in a process of another user's


Task = Callable[[Path], None]
Outcome = tuple[str | None, dict[str, str]]


def _as_nobody(tasks: list[tuple[Task, Path]], pipe: Connection) -> None:
    """Run the tasks as a user without rights; send the class and the facts of the error of each."""
    with TemporaryDirectory() as folder:
        _write(Path(folder) / "store")  # imports all that is needed: the interpreter may be closed to that user
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
    outcomes: list[Outcome] = []
    for task, path in tasks:
        try:
            task(path)
            outcomes.append((None, {}))
        except TransportError as error:
            outcomes.append((type(error).__name__, {name: str(value) for name, value in error.facts.items()}))
    pipe.send(outcomes)


def outcomes_as_nobody(*tasks: tuple[Task, Path]) -> list[Outcome]:
    near, far = processes.Pipe()
    process = processes.Process(target=_as_nobody, args=(list(tasks), far))
    process.start()
    far.close()
    try:
        found: list[Outcome] = near.recv()
        return found
    finally:
        process.join()
        process.close()
        near.close()


def _get(path: Path) -> None:
    with LocalStore(path) as store:
        store.get("a")


def _write(path: Path) -> None:
    with LocalStore(path) as store:
        store.put("a", b"")


@pytest.fixture
def public_folder() -> Iterator[Path]:
    """A folder that another user can reach: pytest's own are closed to it."""
    folder = Path(f"/tmp/ucxx-test-{os.getpid()}-{time.monotonic_ns()}")
    folder.mkdir()
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def test_a_file_or_folder_that_is_not_this_users_to_use_is_a_matter_of_rights(public_folder: Path) -> None:
    closed, read_only, shut = (public_folder / name for name in ("closed", "read-only", "shut"))
    for path, mode in ((closed, 0o000), (read_only, 0o444)):
        with LocalStore(path) as store:
            store.put("a", b"")
        path.chmod(mode)
    shut.mkdir(mode=0o700)
    paths = [closed, read_only, shut / "store", public_folder / "new"]
    outcomes = outcomes_as_nobody(*((task, path) for path in paths for task in (_get, _write)))
    assert [(error, facts.get("path")) for error, facts in outcomes] == [
        ("StorePermissionError", str(path)) for path in paths for _task in (_get, _write)
    ]
    assert not list(shut.iterdir())
    assert not (public_folder / "new").exists()


def test_without_space_nothing_is_written_and_the_call_fails(path: Path) -> None:
    with LocalStore(path) as store:
        store.put("a", b"kept")
    with elsewhere(_fill, f"local://{path}", {}) as (_process, pipe):
        error, facts = pipe.recv()
    assert error == "StoreUnavailableError"
    assert facts["path"] == str(path)
    with LocalStore(path) as store:
        assert [(entry.key, entry.value) for entry in store.snapshot()] == [("a", b"kept")]


def _fill(url: str, settings: dict[str, Any], pipe: Connection) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with open_store(url, StoreConfig(**settings)) as store:
        store.get("a")
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            store.put("b", bytes(1 << 20))
        except TransportError as error:
            pipe.send((type(error).__name__, {name: str(value) for name, value in error.facts.items()}))


def test_another_users_folder_in_the_defaults_place_is_refused() -> None:
    ((error, _facts),) = outcomes_as_nobody((_default_in_a_strangers_folder, segment_folder()))
    assert error == "StorePermissionError"


def _default_in_a_strangers_folder(parent: Path) -> None:
    folder = parent / f"ucxx-stores-{os.geteuid()}"
    assert not os.path.lexists(folder), "this user has a default store"
    folder.symlink_to("/tmp")
    try:
        LocalStore()
    finally:
        folder.unlink()


def test_the_connection_to_a_deleted_file_leaves_its_successors_log(
    opened: Callable[..., LocalStore], path: Path
) -> None:
    """The connection to a deleted file, when closed, must not take the new file's log with it."""
    old, new = opened(), opened()
    old.put("old", b"")
    path.unlink()
    new.put("new", b"1")  # into the log beside the new file
    old.close()  # the last one that had the old file open
    third = opened()
    assert [entry.key for entry in third.snapshot()] == ["new"]
    third.put("newer", b"")
    assert [entry.key for entry in new.snapshot()] == ["new", "newer"]


def test_without_sqlite3_a_local_store_is_refused_by_its_name(path: Path) -> None:
    code = """if True:
        import sys
        sys.modules["sqlite3"] = None  # an import of it fails, as in an interpreter that was built without it
        from ucxx_transport import open_store
        from ucxx_transport.errors import ConfigError
        open_store("etcd://localhost").close()
        try:
            open_store(sys.argv[1])
        except ConfigError as error:
            print(error)
    """
    run = subprocess.run([sys.executable, "-c", code, f"local://{path}"], capture_output=True, text=True, check=True)
    assert "this Python has no sqlite3" in run.stdout
