"""`ring.c`: generated from its specification, built by what is there, and whole wherever it is cut off."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from tests.support.rows import row
from ucxx_transport import native
from ucxx_transport.errors import ConfigError
from ucxx_transport.native import build

ROOT = Path(__file__).resolve().parents[3]
STEPS = 20_000


def module_of(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(program: str, *words: str, environment: dict[str, str] | None = None) -> dict[str, int]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.e2e.programs.ring_native", program, *words],
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said: dict[str, int] = json.loads(done.stdout)
    return said


def test_the_header_is_generated_from_the_layout_and_the_table_of_states() -> None:
    made = module_of(ROOT / "scripts" / "generate_ring_header.py")
    assert made.HEADER.read_text() == made.header()


def test_the_source_compiles_without_a_warning(tmp_path: Path) -> None:
    build.compile_library(tmp_path / "libnative.so", ["-Werror"])


@pytest.fixture(scope="module")
def cut_library(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A build that ends its process at the n-th point of a transition, and counts how often a slot is looked for."""
    library = tmp_path_factory.mktemp("cut") / "libnative_cut.so"
    build.compile_library(library, ["-DRING_CUT"])
    return str(library)


def test_a_transition_cut_off_anywhere_has_happened_or_has_not(cut_library: str) -> None:
    stores = run("cut", cut_library)
    assert len(stores) == 25
    assert all(count >= 3 for count in stores.values()), stores


def test_a_write_looks_for_as_many_slots_in_a_large_ring_as_in_a_small_one(cut_library: str) -> None:
    visits = run("visits", cut_library)
    assert len(visits) == 4
    assert max(visits.values()) <= 1.5 * min(visits.values()), visits


@pytest.mark.parametrize("every", [307, pytest.param(1, marks=pytest.mark.exhaustive)])
def test_a_repair_cut_off_at_any_store_is_completed_by_the_next(cut_library: str, every: int) -> None:
    cuts = run("repair", cut_library, str(every))
    assert all(count >= 3 for count in cuts.values()), cuts


@pytest.mark.exhaustive
def test_random_transitions_are_clean_under_the_sanitizers(tmp_path: Path) -> None:
    gcc = shutil.which("gcc")
    if gcc is None:
        pytest.skip("gcc, whose sanitizers' runtime is loaded first, is not installed")
    runtime = subprocess.run([gcc, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    library = tmp_path / "libnative_sanitized.so"
    build.compile_library(library, ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1"])
    preload = {"LD_PRELOAD": runtime.stdout.strip(), "ASAN_OPTIONS": "detect_leaks=0"}
    assert run("random", str(library), str(STEPS), environment=preload) == {"steps": STEPS}


def test_random_transitions_keep_lists_and_counts_true() -> None:
    assert run("random", str(build.LIBRARY), str(STEPS)) == {"steps": STEPS}


BROKEN = "echo no headers of a C library >&2; exit 1"


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes these shell scripts all that there is on PATH, and no compiler of ziglang; "works" is one that compiles."""
    works = f'PATH={os.environ["PATH"]} exec {shlex.join(build.compilers()[0].command)} "$@"'
    monkeypatch.setitem(sys.modules, "ziglang", None)
    monkeypatch.delenv("CC", raising=False)

    def make(**scripts: str) -> None:
        folder = tmp_path / f"bin-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        for name, script in scripts.items():
            (folder / name).write_text(f"#!/bin/sh\n{works if script == 'works' else script}\n")
            (folder / name).chmod(0o755)
        monkeypatch.setenv("PATH", str(folder))

    return make


def required(folder: Path) -> list[str]:
    """What the build hook asks the registry for."""
    interface = pytest.importorskip("hatchling.builders.hooks.plugin.interface").BuildHookInterface
    hook = module_of(ROOT / "hatch_build.py").NativeBuildHook
    assert issubclass(hook, interface)
    asked: list[str] = hook(str(ROOT), {}, None, None, str(folder), "wheel").dependencies()
    return asked


def test_the_first_compiler_that_works_is_taken_and_ziglang_asked_for_where_none_does(
    programs: Callable[..., None], tmp_path: Path
) -> None:
    rows: list[tuple[dict[str, str], str, str]] = [
        # what is on PATH, the compiler that is taken, what is said where none is
        ({"cc": "works"}, "cc", ""),
        ({"cc": BROKEN, "gcc": "works"}, "gcc", ""),
        ({"cc": "exit 0", "gcc": BROKEN, "clang": "works"}, "clang", ""),
        ({}, "", "nothing: there is no $CC, cc, gcc, clang or ziglang. Install gcc, or `pip install ziglang`"),
        ({"cc": BROKEN}, "", "cc: exit 1: no headers of a C library. Install gcc, or `pip install ziglang`"),
        ({"cc": BROKEN, "gcc": "exit 0"}, "", "cc: exit 1: no headers of a C library; gcc: No such file or directory:"),
        ({"clang": "kill -9 $$"}, "", "clang: exit -9: . Install gcc"),
    ]
    for scripts, taken, said in rows:
        with row(scripts=scripts):
            programs(**scripts)
            if taken:
                assert required(tmp_path) == []
                assert build.compile_library(tmp_path / "libnative.so").name == taken
            else:
                assert required(tmp_path) == ["ziglang>=0.13,<0.18"]
                with pytest.raises(build.CompilationError, match=re.escape(f"Tried: {said}")):
                    build.compile_library(tmp_path / "libnative.so")
    assert list(tmp_path.glob("*.tmp")) == []


def test_a_compiler_that_is_named_is_taken_and_no_other_in_its_place(
    programs: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs(cc="works", mine="works", broken=BROKEN)
    monkeypatch.setenv("CC", "mine -O1")
    assert required(tmp_path) == []
    assert build.compile_library(tmp_path / "libnative.so").name == "$CC (mine -O1)"
    for chosen, said in (
        ("broken", "exit 1: no headers of a C library"),
        ("missing -m64", "No such file or directory"),
    ):
        with row(chosen=chosen):
            monkeypatch.setenv("CC", chosen)
            words = rf"Tried: \$CC \({chosen}\): {said}.*\. Unset CC, or name one that works, and install"
            for asked in (lambda: required(tmp_path), lambda: build.compile_library(tmp_path / "libnative.so")):
                with pytest.raises(RuntimeError, match=words):
                    asked()


def test_a_library_that_cannot_be_loaded_is_a_configuration_error_that_says_how_to_build_it(tmp_path: Path) -> None:
    broken = tmp_path / "libnative.so"
    broken.write_bytes(b"no shared library")
    for path in (broken, tmp_path / "missing.so", Path("libm.so.6")):  # the last: without the functions
        with row(path=path), pytest.raises(ConfigError, match="install the package again with pip"):
            native.load(path)


def test_a_library_of_another_source_is_refused_and_built_again_by_the_command_that_the_error_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = tmp_path / "libnative.so"
    build.compile_library(library)
    changed = tmp_path / "ring.c"
    changed.write_text(build.SOURCES[0].read_text() + "/* changed */\n")
    shutil.copy(build.HEADER, tmp_path)
    monkeypatch.setattr(build, "SOURCES", (changed, *build.SOURCES[1:]))
    with pytest.raises(ConfigError, match=r"another source.*Build it with `python \S+/native/build\.py`"):
        native.load(library)
    build.compile_library(tmp_path / "again.so")
    native.load(tmp_path / "again.so")
