"""The scripts where there is nothing yet: what they look for, and what they say when it is not there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = ["scripts/demo", "scripts/test", "scripts/check", "scripts/bench", ".ci/run", ".ci/long"]


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A checkout of the scripts and what is compiled, and beside it a PATH without any Python."""
    checkout = tmp_path / "a checkout"
    shutil.copytree(ROOT / "scripts", checkout / "scripts")
    shutil.copytree(ROOT / ".ci", checkout / ".ci")
    shutil.copytree(ROOT / "ucxx_transport/native", checkout / "ucxx_transport/native")
    shutil.copy(ROOT / "pyproject.toml", checkout)
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("bash", "basename", "cat", "cut", "dirname", "env", "flock", "sha256sum", "tail", "touch", "uname"):
        (tools / tool).symlink_to(str(shutil.which(tool)))
    return checkout


def run(bare: Path, script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = {"PATH": str(bare.parent / "bin"), "HOME": str(bare)}
    return subprocess.run(
        [str(bare / script)], env=path | environment, cwd="/", capture_output=True, text=True, check=False, timeout=60
    )


def fake_python(bare: Path, name: str, answer: str) -> None:
    fake = bare.parent / "bin" / name
    fake.write_text(f"#!{shutil.which('bash')}\n{answer}\n")
    fake.chmod(0o755)


@pytest.mark.parametrize("script", SCRIPTS)
def test_without_any_python_the_remedy_is_said(bare: Path, script: str) -> None:
    if Path("/usr/bin/python3").exists():
        # The last place that is looked at whatever PATH says.
        text = (bare / "scripts/environment").read_text().replace("/usr/bin/python3;", "/nowhere/python3;")
        (bare / "scripts/environment").write_text(text)
    done = run(bare, script)
    assert done.returncode == 1
    assert "No Python >= 3.11" in done.stderr
    assert not (bare / ".venv").exists()


def test_a_python_that_is_too_old_or_incomplete_is_passed_over(bare: Path) -> None:
    text = (bare / "scripts/environment").read_text().replace("/usr/bin/python3;", "/nowhere/python3;")
    (bare / "scripts/environment").write_text(text)
    fake_python(bare, "python3", "exit 1")
    fake_python(bare, "python3.13", '[[ "$2" == *version_info* ]]')
    done = run(bare, "scripts/demo")
    assert "No Python >= 3.11" in done.stderr


def test_the_python_that_is_named_must_fit(bare: Path) -> None:
    done = run(bare, "scripts/demo", PYTHON="/bin/false")
    assert done.returncode == 1
    assert "PYTHON=/bin/false" in done.stderr


@pytest.mark.exhaustive
def test_an_installation_that_fails_says_where_all_of_it_is_and_leaves_no_stamp(bare: Path) -> None:
    # No package index: pip fails at once, and no stamp may say that the environment is ready.
    offline = {"PYTHON": sys.executable, "PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": ""}
    done = run(bare, "scripts/demo", **offline)
    assert done.returncode == 1
    assert "install.log" in done.stderr
    assert (bare / ".venv/install.log").read_text()
    assert not list((bare / ".venv").glob(".installed-*"))


def ensure_peers(bare: Path, pip: str) -> subprocess.CompletedProcess[str]:
    """With this Python's own modules, and a pip that does so."""
    fake_python(bare, "peers-python", f'[[ "$*" != *" pip "* ]] || {pip}\nexec "{sys.executable}" "$@"')
    script = f'source "{bare}/scripts/environment"; VENV_PYTHON=peers-python; ensure_peers'
    (bare / ".venv").mkdir(exist_ok=True)
    environment = {"PATH": str(bare.parent / "bin"), "HOME": str(bare)}
    command = [str(shutil.which("bash")), "-euc", script]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)


def test_peers_that_no_registry_has_are_said_and_asked_for_again(bare: Path) -> None:
    for _ in range(2):
        done = ensure_peers(bare, "{ echo no such package >&2; exit 1; }")
        assert done.returncode == 0
        assert re.search(r"no registry in use has nixl>=\S+ nixl-cu12>=\S+ .*their rows are skipped", done.stderr)
        assert "no such package" in (bare / ".venv/peers.log").read_text()


def test_peers_are_installed_once_without_what_they_require(bare: Path) -> None:
    asked = bare / "asked"
    for _ in range(2):
        assert ensure_peers(bare, f'{{ echo "$*" >>"{asked}"; exit 0; }}').returncode == 0
    installs = [line for line in asked.read_text().splitlines() if "nixl" in line]
    assert len(installs) == 1
    assert re.search(r"--no-deps nixl>=1\S*,<\S+ nixl-cu12>=1\S*,<\S+$", installs[0])


@pytest.mark.parametrize("script", [*SCRIPTS, "scripts/environment"])
def test_every_script_is_well_formed(script: str) -> None:
    subprocess.run([str(shutil.which("bash")), "-n", str(ROOT / script)], check=True)
