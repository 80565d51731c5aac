"""A sidecar's process: the worker's interpreter, flags and modules, and what is said of one that does not come up."""

from __future__ import annotations

import errno
import multiprocessing
import multiprocessing.spawn
import os
import socket
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import pytest

from tests.support.rows import row
from tests.support.waiting import wait_until
from ucxx_transport.errors import ConfigError, TransportError
from ucxx_transport.machine import parts
from ucxx_transport.sidecar import launch
from ucxx_transport.sidecar.launch import Sidecar, interpreter

MINUTE = 60.0
AT_ONCE = (0.0, 0.0)
REPORTING = """
import json, os, select, sys, zlib
def main(worker, errors, role):
    seen = zlib.crc32(repr(sys.path).encode())
    facts = {"port": None, "sys_path": seen, "flags": sys.flags.no_user_site, "warnings": sys.warnoptions}
    os.read(worker, 9999)
    os.write(worker, json.dumps({"up": facts}).encode())
    os.read(worker, 1)
    return 0
"""
CHATTING = """
    while not select.select([worker], [], [], 0.05)[0]:
        os.write(worker, b'{"chat": 1}')
"""


@contextmanager
def sidecar(**settings: Any) -> Iterator[Sidecar]:
    """One that is started, and stopped at the end of the block."""
    one = Sidecar("test", **{"serve": dict, "pauses_s": AT_ONCE, **settings})
    one.start()
    try:
        yield one
    finally:
        one.stop(time.monotonic() + MINUTE)


@pytest.fixture
def in_place_of_main(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a package `ucxx_transport` of the worker's own path has its `sidecar/main.py`."""
    folder = tmp_path / "ucxx_transport" / "sidecar"
    folder.mkdir(parents=True)
    for package in (folder, folder.parent):
        (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    return folder / "main.py"


def test_a_sidecar_sees_the_modules_that_its_worker_sees_and_has_its_flags(
    in_place_of_main: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A back-port in site-packages is harmless to the worker, whose standard library comes first: to a sidecar too."""
    in_place_of_main.write_text(REPORTING)
    (tmp_path / "back-ports").mkdir()
    (tmp_path / "back-ports" / "enum.py").write_text("raise ImportError('a back-port took the place of a module')")
    many = [f"/nowhere/{number:0200}" for number in range(2000)]  # as a build system writes that gives each its folder
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "back-ports"), *many])
    seen = list(sys.path)
    sys.path.append(tmp_path / "none, since it is no string")  # type: ignore[arg-type]  # as it says
    monkeypatch.setattr(sys, "warnoptions", ["error::UserWarning"])
    with sidecar() as one:
        facts = one.up.result(MINUTE)
    assert facts["sys_path"] == zlib.crc32(repr(seen).encode())
    assert "error::UserWarning" in facts["warnings"]


def test_what_kept_a_sidecar_from_coming_up_is_in_the_error(
    in_place_of_main: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    in_place_of_main.write_text("raise RuntimeError('no such library')")
    with sidecar() as one, pytest.raises(TransportError, match=r"died at its start: RuntimeError: no such library"):
        one.up.result(MINUTE)
    assert "Traceback" in capfd.readouterr().err, "all of it is on the worker's standard error"


def test_what_a_sidecar_reports_is_read_though_it_died_with_an_order_unread() -> None:
    process = object.__new__(launch._Process)  # noqa: SLF001 - which end is first to come is no test's to choose
    process._socket, theirs = socket.socketpair(type=socket.SOCK_SEQPACKET)
    with process._socket as ours:
        ours.setblocking(False)  # noqa: FBT003
        with theirs:
            ours.send(b"{}")
            theirs.send(b'{"died": "of old age"}')
        assert process.receive() == {"died": "of old age"}
        assert process.receive() is None


def test_one_that_cannot_be_started_keeps_no_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(*_: object, **__: object) -> NoReturn:
        raise OSError(errno.EMFILE, "Too many open files")

    before = len(os.listdir("/proc/self/fd"))
    for where, name in ((os, "memfd_create"), (socket, "socketpair"), (subprocess, "Popen")):
        with row(name=name), monkeypatch.context() as patched:
            patched.setattr(where, name, none_left)
            with (
                sidecar(serve=lambda: {"descriptor": os.dup(2)}) as one,
                pytest.raises(TransportError, match="Too many open files"),
            ):
                one.up.result(MINUTE)
            assert len(os.listdir("/proc/self/fd")) == before


def test_the_last_line_of_one_that_does_not_die_in_python_is_in_the_error(
    in_place_of_main: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    said, last = r"one line\nlibucp.so: undefined symbol: ucp_init\n", "libucp.so: undefined symbol: ucp_init"
    for end, how in (("os._exit(127)", "exit status 127"), ("os.abort()", "SIGABRT")):
        with row(end=end):
            in_place_of_main.write_text(f"import os\nos.write(2, b'{said}')\n{end}\n")
            with sidecar() as one, pytest.raises(TransportError, match=f"died at its start: {how}: {last}"):
                one.up.result(MINUTE)
            assert "one line\n" in capfd.readouterr().err


def test_one_comes_up_where_no_folder_for_temporary_files_can_be_written_to(
    in_place_of_main: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container with a read-only file system."""
    in_place_of_main.write_text(REPORTING)
    monkeypatch.setattr(tempfile, "tempdir", str(in_place_of_main / "nowhere"))
    with sidecar() as one:
        one.up.result(MINUTE)


def test_one_comes_up_where_no_file_in_memory_is_to_be_had(
    in_place_of_main: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where Python was built for an old C library, and in containers that filter calls or forbid such files."""

    def refused(why: int, *_: object) -> NoReturn:
        raise OSError(why, os.strerror(why))

    in_place_of_main.write_text(REPORTING)
    for why in (None, errno.ENOSYS, errno.EPERM, errno.EACCES):
        with row(why=why), monkeypatch.context() as patched:
            if why is None:
                patched.delattr(os, "memfd_create")
            else:
                patched.setattr(os, "memfd_create", partial(refused, why))
            with sidecar() as one:
                one.up.result(MINUTE)
            assert one_part("memfd") == ("missing", "note")


def one_part(name: str) -> tuple[str, str]:
    return next((part.value, part.verdict) for part in parts() if part.name == name)


def test_what_one_writes_while_it_comes_up_is_on_the_worker_s_standard_error(
    in_place_of_main: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    in_place_of_main.write_text(REPORTING.replace("    facts =", "    os.write(1, b'a warning of UCX')\n    facts ="))
    with sidecar() as one:
        one.up.result(MINUTE)
        assert capfd.readouterr().err == "a warning of UCX"


def test_the_interpreter_is_the_one_that_multiprocessing_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiprocessing.spawn, "_python_exe", None)
    for embedding in ("", None, "/opt/simulator/kit", "/usr/sbin/uwsgi"):
        with row(executable=embedding):
            monkeypatch.setattr(sys, "executable", embedding)
            multiprocessing.set_executable(embedding or "")
            with pytest.raises(ConfigError, match=r"multiprocessing\.set_executable.*mode='thread'"):
                interpreter()
            multiprocessing.set_executable("/opt/simulator/python.sh")
            assert interpreter() == "/opt/simulator/python.sh"


def test_a_worker_that_is_no_interpreter_gets_a_config_error_from_its_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiprocessing.spawn, "_python_exe", None)
    monkeypatch.setattr(sys, "executable", "")
    with sidecar() as one, pytest.raises(ConfigError, match="no Python interpreter"):
        one.up.result(MINUTE)


def test_one_that_stalls_is_replaced_however_often_it_reports(in_place_of_main: Path) -> None:
    in_place_of_main.write_text(REPORTING.replace("    os.read(worker, 1)", CHATTING))
    stalled = [True]
    with sidecar(is_stalled=lambda: bool(stalled and stalled.pop())) as one:
        one.up.result(MINUTE)
        wait_until(lambda: one.restarts and one.pid, MINUTE, what="another one is up")
    assert one.restarts == 1


def test_one_that_dies_young_is_started_again_at_once_and_the_next_ones_ever_later(
    in_place_of_main: Path, log_events: list[MutableMapping[str, Any]]
) -> None:
    in_place_of_main.write_text(REPORTING.replace("    os.read(worker, 1)", "    raise RuntimeError('of old age')"))
    with sidecar(pauses_s=(0.01, 0.03)):
        wait_until(lambda: len(log_events) >= 4, MINUTE, what="it has died so often")
    deaths = log_events[:4]
    assert {event["event"] for event in deaths} == {"sidecar_died"}
    assert {event["reason"] for event in deaths} == {"RuntimeError: of old age"}
    assert deaths[0]["pause_s"] == 0.0
    for event, longest_s in zip(deaths[1:], (0.01, 0.02, 0.03), strict=True):
        assert longest_s / 2 <= event["pause_s"] <= longest_s, "the jitter shortens it"


def test_one_that_was_up_for_long_is_started_again_at_once(
    in_place_of_main: Path, log_events: list[MutableMapping[str, Any]]
) -> None:
    in_place_of_main.write_text(REPORTING.replace("    os.read(worker, 1)", "    select.select([], [], [], 0.1)"))
    with sidecar(pauses_s=(0.005, 60.0)) as one:
        wait_until(lambda: one.restarts >= 3, MINUTE, what="it has died so often")
    assert {event["pause_s"] for event in log_events if event["event"] == "sidecar_died"} == {0.0}
