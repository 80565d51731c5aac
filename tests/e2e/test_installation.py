"""The package as pip installs it: a wheel of the sdist, read by each Python of this machine in place and over UCX."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.exhaustive

ROOT = Path(__file__).parents[2]
MACHINE = platform.machine()
OLDEST = (3, 11)
NOT_TO_BE_HAD = re.compile(r"No matching distribution found for .*ucx\S*|ResolutionImpossible")

PROGRAM = """
import json, sys
from contextlib import nullcontext
import ucxx_transport
from ucxx_transport import ClientConfig, RingConfig, ServerConfig, SharedRingBuffer, SyncUCXXClient, UCXXServer

if __name__ == "__main__":
    local = sys.argv[1]
    server = ServerConfig(host="127.0.0.1", ports=1, start_timeout_s=120.0)
    config = ClientConfig(local=local, deadline_s=60.0, connect_timeout_s=30.0)
    with SharedRingBuffer.create(RingConfig(slots=2, slot_bytes=4096)) as ring:
        with UCXXServer(ring, server) if local == "off" else nullcontext(), SyncUCXXClient(config) as client:
            with client.read(ring.write_raw(b"payload")) as payload:
                said = {"payload": bytes(payload.buffer).decode(), "transport": payload.transport}
    print(json.dumps({**said, "version": list(sys.version_info[:2]), "file": ucxx_transport.__file__}))
"""


def pythons() -> dict[str, Path]:
    """Every Python of this machine that is new enough, by name: of pyenv, the system, and this process."""
    found = {f"this-{platform.python_version()}": Path(sys.base_prefix, "bin", f"python3.{sys.version_info.minor}")}
    versions = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    found |= {f"pyenv-{path.name}": path / "bin/python" for path in sorted(versions.glob("3.*"))}
    for folder in ("/usr/bin", "/usr/local/bin"):
        found |= {str(path)[1:].replace("/", "-"): path for path in sorted(Path(folder).glob("python3.*"))}
    of_name = {name: re.search(r"3\.(\d+)[.\d]*$", name) for name in found}
    chosen = {name: found[name] for name, version in of_name.items() if version and (3, int(version[1])) >= OLDEST}
    names: dict[Path, str] = {}
    for name, path in chosen.items():
        names.setdefault(path.resolve(), name)
    return {name: chosen[name] for name in names.values()}


PYTHONS = pythons()


def clean_environment(**more: str) -> dict[str, str]:
    """Without what would let this checkout, or its compiler, through."""
    hidden = ("PYTHONPATH", "CC", "VIRTUAL_ENV")
    return {**{name: value for name, value in os.environ.items() if name not in hidden}, **more}


def pip(*words: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", *words]
    env = clean_environment() if environment is None else environment
    return subprocess.run(command, cwd="/", env=env, capture_output=True, text=True, check=False, timeout=1200)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "sdist", "--directory", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=clean_environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    [made] = folder.iterdir()
    return made


def wheel_of(sdist: Path, folder: Path, environment: dict[str, str]) -> Path:
    """Built in an environment of its own, which has what the build hook asks for and nothing else."""
    done = pip("wheel", "--no-deps", "--wheel-dir", str(folder), str(sdist), environment=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    [made] = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wheel_of(sdist, tmp_path_factory.mktemp("wheel"), clean_environment())


@pytest.fixture
def installed(tmp_path: Path) -> Iterator[Callable[[Path, Path, str], Path]]:
    """The interpreter of an environment that has a wheel, with an extra."""
    folder = tmp_path / "environment"

    def install(python: Path, package: Path, extra: str) -> Path:
        subprocess.run([str(python), "-m", "venv", "--without-pip", str(folder)], check=True, cwd="/")
        interpreter = folder / "bin/python"
        done = pip("--python", str(interpreter), "install", "--quiet", f"{package}{extra}")
        if done.returncode and extra and (reason := NOT_TO_BE_HAD.search(done.stderr)):
            pytest.skip(f"no registry in use has UCX for {python}: {reason[0]}")
        assert done.returncode == 0, done.stdout + done.stderr
        return interpreter

    yield install
    shutil.rmtree(folder, ignore_errors=True)  # half a gigabyte


def assert_reads(interpreter: Path, local: str, transport: str) -> None:
    command = [str(interpreter), "-c", PROGRAM, local]
    done = subprocess.run(
        command, cwd="/", env=clean_environment(), capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    version = subprocess.check_output([str(interpreter), "-c", "import sys; print(*sys.version_info[:2])"], text=True)
    assert said["version"] == [int(word) for word in version.split()]
    assert (said["payload"], said["transport"]) == ("payload", transport)
    assert interpreter.parents[1] in Path(said["file"]).parents


def assert_tagged(wheel: Path, platform_tag: str) -> None:
    """It is for one platform and every Python 3, and holds the library; no source has been left out of the sdist."""
    assert wheel.name.endswith(f"-py3-none-{platform_tag}.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        [facts] = [archive.read(name).decode() for name in names if name.endswith(".dist-info/WHEEL")]
    assert f"Tag: py3-none-{platform_tag}\n" in facts
    assert "Root-Is-Purelib: false" in facts
    assert "ucxx_transport/native/libnative.so" in names


def test_the_sdist_has_the_sources_and_nothing_that_was_built(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"hatch_build.py", "ucxx_transport/native/ring.c", "ucxx_transport/native/ring_layout.h"} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


def test_a_wheel_of_the_sdist_is_of_this_platform_and_of_every_python(wheel: Path) -> None:
    assert_tagged(wheel, f"linux_{MACHINE}")


@pytest.mark.parametrize("name", PYTHONS)
def test_the_wheel_reads_in_place(name: str, wheel: Path, installed: Callable[[Path, Path, str], Path]) -> None:
    assert_reads(installed(PYTHONS[name], wheel, ""), "view", "view")


@pytest.mark.parametrize("name", PYTHONS)
def test_the_wheel_reads_over_ucx(name: str, wheel: Path, installed: Callable[[Path, Path, str], Path]) -> None:
    assert_reads(installed(PYTHONS[name], wheel, "[cpu]"), "off", "ucx")


def test_without_any_compiler_the_wheel_is_built_by_ziglang(
    sdist: Path, installed: Callable[[Path, Path, str], Path], tmp_path: Path
) -> None:
    empty, cache, folder = tmp_path / "bin", tmp_path / "environment/cache", tmp_path / "wheel"
    empty.mkdir()
    zig = {"ZIG_GLOBAL_CACHE_DIR": str(cache), "ZIG_LOCAL_CACHE_DIR": str(cache)}
    made = wheel_of(sdist, folder, clean_environment(PATH=str(empty), **zig))
    assert_tagged(made, f"manylinux_2_28_{MACHINE}")
    assert_reads(installed(next(iter(PYTHONS.values())), made, ""), "view", "view")
