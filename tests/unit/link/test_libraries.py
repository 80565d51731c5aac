"""Two UCX libraries in one process, and one that is too old: refused before any of them is initialised."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.support.rows import row

OPEN_A_LINK = (
    "import ctypes, os, sys\n"
    "from ucxx_transport import ConfigError\n"
    "from ucxx_transport.link.ucx_api import load_binding\n"
    "kept = [ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL) for path in sys.argv[1:]]\n"
    "try:\n"
    "    load_binding()\n"
    "except ConfigError as error:\n"
    "    print(error.message)\n"
    "else:\n"
    "    print('loaded')\n"
)
WHEEL = Path(find_spec("libucx").origin or "").parent / "lib"  # type: ignore[union-attr]  # the extra brings it


def opened(*first: Path, before: str = "", **environment: str) -> str:
    """What a fresh interpreter says that runs this program, and loads these, before ucxx."""
    return subprocess.run(
        [sys.executable, "-c", before + OPEN_A_LINK, *map(str, first)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **environment},
    ).stdout.strip()


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """Libraries with UCX's names, of which one says that it is 1.13.1."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    source = tmp_path / "old.c"
    source.write_text("void ucp_get_version(unsigned *a, unsigned *b, unsigned *c) { *a = 1; *b = 13; *c = 1; }\n")
    for name in ("libucs.so", "libucs_signal.so", "libuct.so", "libucp.so"):
        subprocess.run(
            [compiler, "-shared", "-fPIC", f"-Wl,-soname,{name}.0", str(source), "-o", str(tmp_path / name)], check=True
        )
    return tmp_path


def test_another_ucx_that_was_loaded_first_is_named_with_the_one_that_ucxx_needs(old: Path) -> None:
    said = opened(old / "libucp.so")
    assert said.startswith("two UCX libraries in one process")
    assert str(old / "libucp.so") in said
    assert str(WHEEL) in said


def test_ucx_of_the_wheel_may_be_loaded_before() -> None:
    assert opened(WHEEL / "libucs.so", WHEEL / "libuct.so", WHEEL / "libucp.so") == "loaded"


def test_system_s_ucx_that_is_too_old_is_named_with_its_version(old: Path) -> None:
    rows: list[tuple[Path, ...]] = [(), (old / "libucp.so",)]
    for first in rows:
        with row(first=first):
            said = opened(*first, LD_LIBRARY_PATH=str(old), RAPIDS_LIBUCX_PREFER_SYSTEM_LIBRARY="true")
            assert said.startswith(f"{old / 'libucp.so'} is UCX 1.13.1, and ucxx needs 1.19.0 or later")


def test_system_s_ucx_that_cannot_be_loaded_is_a_configuration_error(old: Path) -> None:
    for name in ("libucs.so", "libucp.so", "libuct.so"):
        (old / name).write_bytes((old / name).read_bytes()[:200])
    said = opened(LD_LIBRARY_PATH=str(old), RAPIDS_LIBUCX_PREFER_SYSTEM_LIBRARY="true")
    assert said == "loaded" or "cannot be imported" in said  # the wheel's serve where the loader refuses the system's


def test_a_program_s_stand_in_for_the_wheel_is_no_error_of_its_own() -> None:
    stand_in = "import sys, types\nsys.modules['libucx'] = one = types.ModuleType('libucx')\n"
    rows = {"with what ucxx calls": "one.load_library = lambda: None\n", "with nothing": ""}
    for what, rest in rows.items():
        with row(what=what):
            said = opened(before=stand_in + rest)
            assert said == "loaded" or "cannot be imported" in said
