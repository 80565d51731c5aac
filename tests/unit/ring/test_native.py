"""`ring.c`: generated from its specification, built by what is there, and whole wherever it is cut off."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.support.rows import row
from ucxx_transport import native
from ucxx_transport.errors import ConfigError
from ucxx_transport.native import build

ROOT = Path(__file__).resolve().parents[3]
STEPS = 20_000


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_ring_header", ROOT / "scripts" / "generate_ring_header.py")
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
    made = generator()
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


def test_without_any_compiler_the_error_names_what_was_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CC", "no-such-compiler -m64")
    if importlib.util.find_spec("ziglang") is not None:
        pytest.skip("ziglang is installed, so there is a compiler")
    with pytest.raises(build.CompilationError, match=r"no-such-compiler.*Install gcc, or `pip install ziglang`"):
        build.compile_library(tmp_path / "libnative.so")


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
