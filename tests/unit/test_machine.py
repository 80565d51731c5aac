"""What Python or the machine lacks costs what needs it, and nothing else; each row is a process that lacks one part."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.rows import row
from ucxx_transport import ConfigError, SharedRingBuffer
from ucxx_transport.machine import Wakeup
from ucxx_transport.membership.store_url import open_store

READ = """
from ucxx_transport import ClientConfig, RingConfig, ServerConfig, SharedRingBuffer, SyncUCXXClient, UCXXServer
with SharedRingBuffer.create(RingConfig(slots=2, slot_bytes=1000)) as ring:
    with UCXXServer(ring, ServerConfig(ports=1, host="127.0.0.1")):
        with SyncUCXXClient(ClientConfig(local="off", deadline_s=30)) as client:
            with client.read(ring.write_raw(b"x")) as payload:
                assert bytes(payload.buffer) == b"x"
report("read")
"""
STORE = """
from ucxx_transport import ConfigError, open_store
try:
    open_store("local:///tmp/never-made.store").close()
except ConfigError as error:
    report(error.message)
open_store("etcd://127.0.0.1:2379").close()
"""
REPORT = "import os\nreport = lambda text: os.write(9, text.encode())\n"
"""Descriptor 9 is the test's: standard streams are what is missing."""


def outcome(program: str, *, closed: tuple[int, ...] = (), environment: dict[str, str] | None = None) -> str:
    """What a program reported; it must end well, and say nothing of an exception."""
    reader, writer = os.pipe()
    shell = " ".join(["exec 9>&$0", *(f"{number}>&-" for number in closed), '"$@"'])
    command = ["bash", "-c", shell, str(writer), sys.executable, "-c", REPORT + program]
    with os.fdopen(reader) as reports:
        try:
            done = subprocess.run(
                command, pass_fds=(writer,), capture_output=True, text=True, check=False, env=environment
            )
        finally:
            os.close(writer)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr, done.stderr
        assert "Exception ignored" not in done.stderr, done.stderr
        return reports.read()


def test_each_part_that_python_was_built_without_costs_what_needs_it_alone() -> None:
    without_sqlite = "import sys\nsys.modules['sqlite3'] = None\n"
    without_calls = "import os\nfor name in ('memfd_create', 'pidfd_open'):\n    os.__dict__.pop(name, 0)\n"
    table = [(without_sqlite, STORE, "this Python has no sqlite3"), (without_sqlite + without_calls, READ, "read")]
    for missing, program, expected in table:
        with row(missing=missing):
            assert expected in outcome(missing + program)


def test_a_program_whose_standard_streams_are_closed_serves_and_reads() -> None:
    for closed in ((2,), (0, 1, 2)):
        with row(closed=closed):
            assert outcome(READ, closed=closed) == "read"


def test_a_ring_never_has_the_number_of_a_standard_stream() -> None:
    program = """
    import os
    from ucxx_transport import RingConfig, SharedRingBuffer
    with SharedRingBuffer.create(RingConfig(slots=2, slot_bytes=1000)) as ring:
        os.write(2, b"a library's words")
        report(" ".join(os.readlink(f"/proc/self/fd/{number}") for number in range(3)))
    """
    lines = "\n".join(line.removeprefix("    ") for line in program.splitlines())
    assert outcome(lines, closed=(0, 1, 2)) == "/dev/null /dev/null /dev/null"


def test_a_hung_teardown_is_survived_where_standard_error_is_closed() -> None:
    assert (
        outcome("from ucxx_transport.teardown import dump_stacks\ndump_stacks()\nreport('on')\n", closed=(2,)) == "on"
    )


def test_one_that_was_notified_again_and_again_is_quiet_after_one_drain() -> None:
    wakeup = Wakeup()
    for notices in (0, 1, 100_000):
        with row(notices=notices):
            for _ in range(notices):
                wakeup.notify()
            assert bool(select.select([wakeup], [], [], 0)[0]) == bool(notices)
            wakeup.drain()
            assert select.select([wakeup], [], [], 0)[0] == []


def test_where_no_thread_can_be_had_any_more_the_reason_is_said() -> None:
    """In exit handlers since Python 3.12; in its last moments any Python would wait for ever for the thread to run."""
    program = """
import sys
from ucxx_transport.errors import ConfigError
from ucxx_transport.machine import start_thread
class Last:
    def __del__(self):
        try:
            start_thread(print, name="never")
        except ConfigError as error:
            report(str(error))
sys.modules["last"] = Last()  # freed as modules are
"""
    said = "the interpreter is exiting, and starts no thread any more: start this before the program ends"
    assert outcome(program) == said


def test_a_name_that_the_encoding_of_files_has_not_is_refused_by_name() -> None:
    program = """
from ucxx_transport import ConfigError, RingConfig, SharedRingBuffer, open_store
for make in (
    lambda: SharedRingBuffer.create(RingConfig(slots=2, slot_bytes=1000, folder="/dev/shm/r\\xfcngs")),
    lambda: open_store("local:///tmp/r%C3%BCng.store"),
):
    try:
        make()
    except ConfigError as error:
        report(error.message.rpartition(": ")[2] + ";")
"""
    assert outcome(program, environment=plain_environment()) == "PYTHONUTF8=1;PYTHONUTF8=1;"
    with pytest.raises(ConfigError, match="PYTHONUTF8=1"):
        SharedRingBuffer.attach("\ud800")
    with pytest.raises(ConfigError, match="PYTHONUTF8=1"):
        open_store("local:///tmp/\ud800")


def test_a_machine_without_proc_is_said_and_no_live_ring_is_taken_for_dead() -> None:
    program = """
from ucxx_transport import ClientConfig, ConfigError, RingConfig, SharedRingBuffer, SyncUCXXClient
from ucxx_transport.machine import owner_alive
from ucxx_transport.cli.doctor import doctor
try:
    SharedRingBuffer.create(RingConfig(slots=2, slot_bytes=1000))
except ConfigError as error:
    report(error.message)
report(f"; {owner_alive(os.getppid(), 1)}")
"""
    hide = "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
    hide += "if libc.unshare(0x20000) or libc.mount(b'none', b'/', None, 0x44000, None) or libc.mount("
    hide += "b'none', b'/proc', b'tmpfs', 0, None):\n    report('not permitted'); os._exit(0)\n"
    found = outcome(hide + program)
    if found == "not permitted":
        pytest.skip("no mount namespaces here")
    assert found.startswith("this machine has no /proc")
    assert found.endswith("; True")


def plain_environment() -> dict[str, str]:
    """Of a container without any locale."""
    return {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def command(*words: str, redirect: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    shell = f'"$@" {redirect}'
    line = ["bash", "-c", shell, "bash", sys.executable, "-m", "ucxx_transport", *words]
    # with more signs than ASCII in what is printed, whatever there is to print
    return subprocess.run(
        line, capture_output=True, encoding="utf-8", errors="replace", check=False, env={**os.environ, **environment}
    )


def test_the_command_line_of_a_bare_container_prints_no_traceback_and_json_alone() -> None:
    bare = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    table: list[tuple[tuple[str, ...], str, dict[str, str], int]] = [
        (("config",), "", bare, 0),
        (("config", "--json"), "", bare, 0),
        (("config", "--json"), "", {"PYTHONIOENCODING": "latin-1"}, 0),
        (("version", "--json"), "2>&-", {}, 0),
        (("version",), ">&-", {}, 0),
        (("version",), ">/dev/full", {}, 1),
        (("version", "--json"), ">/dev/full", {}, 1),
        (("clean", "--dry-run"), "<&- 2>&-", {}, 0),
        (("doctor",), "", bare, 0),
        (("doctor", "--json"), "2>&-", {"UCX_LOG_LEVEL": "debug", "UCX_LOG_FILE": "stdout"}, 0),
    ]
    for words, redirect, environment, code in table:
        with row(words=words, redirect=redirect, environment=environment):
            done = command(*words, redirect=redirect, **environment)
            assert "Traceback" not in done.stderr + done.stdout, done.stderr
            assert "Exception ignored" not in done.stderr, done.stderr
            assert done.returncode == code, done.stderr
            if "--json" in words and code == 0:
                assert isinstance(json.loads(done.stdout), dict)


def test_the_doctor_shows_every_part_and_what_a_missing_one_costs(tmp_path: Path) -> None:
    gone = "import os, sys\ndel os.memfd_create\nsys.modules['sqlite3'] = None\n"
    gone += "def refused(*_): raise PermissionError(1, 'as a sandbox may')\nos.pidfd_open = refused\n"
    (tmp_path / "sitecustomize.py").write_text(gone, encoding="utf-8")
    words = ("doctor", "--no-loopback", "--json")
    done = command(*words, redirect="2>&-", PYTHONPATH=str(tmp_path), PYTHONIOENCODING="ascii")
    findings = [one for one in json.loads(done.stdout)["findings"] if one["topic"] == "machine"]
    found = {one["name"]: (one["value"], one["verdict"]) for one in findings}
    assert found["memfd"] == found["pidfd"] == ("missing", "note")
    assert found["sqlite3"] == ("missing", "warning")
    assert found["/proc"] == ("there", "ok")
    assert found["streams"] == ("closed: standard error", "note")
    assert set(found) == {
        *("/proc", "sqlite3", "cgroup", "memfd", "pidfd", "CUDA driver", "encoding", "streams"),
    }
    assert all(one["remedy"] for one in findings if one["verdict"] != "ok")
