"""The README is true: its example runs and prints what it says, and what it points at exists."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.support.exhaustive import exhaustive
from ucxx_transport.cli.program import VERBS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MIXINS, PIECES = re.findall(r"```python\n(.*?)```\n\n```\n(.*?)```", README, re.DOTALL)
UCX_ONLY = 'ClientConfig(local="off")'


def run_to_the_end(command: list[str], folder: Path) -> tuple[int, str, str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            out, err = process.communicate(timeout=90)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with its worker, which waits for a trainer that failed
            out, err = process.communicate()
    return process.returncode, out, err


def printed_by(program: str, folder: Path) -> str:
    (folder / "example.py").write_text(program)
    code, out, err = run_to_the_end([sys.executable, "-W", "error", "example.py"], folder)
    assert code == 0, err
    return "".join(line + "\n" for line in out.splitlines() if line.startswith(("(", "0", "1", "2", "lost")))


@pytest.mark.parametrize(("settings", "transport"), [("", "view"), exhaustive(UCX_ONLY, "ucx")])
def test_the_example_prints_what_the_readme_says(settings: str, transport: str, tmp_path: Path) -> None:
    example, said = PIECES
    program = example.replace("SyncUCXXClient()", f"SyncUCXXClient({settings})")
    program = program.replace("import RingConfig", "import ClientConfig, RingConfig")
    assert printed_by(program, tmp_path) == said.replace("view", transport)


@pytest.mark.parametrize("settings", ["", exhaustive(f"client={UCX_ONLY}")])
def test_the_example_of_the_mixins_prints_what_the_readme_says(settings: str, tmp_path: Path) -> None:
    example, said = MIXINS
    program = example.replace("setup_ucxx_data_packer()", f"setup_ucxx_data_packer({settings})")
    program = program.replace("import UCXXData", "import ClientConfig, UCXXData")
    assert printed_by(program, tmp_path) == said


def test_the_scripts_it_names_are_there() -> None:
    named = set(re.findall(r"scripts/\w+", README))
    assert named >= {"scripts/demo", "scripts/test"}
    assert all(os.access(ROOT / script, os.X_OK) for script in named)


def test_the_verbs_it_names_are_there() -> None:
    assert set(re.findall(r"ucxx-transport (\w+)", README)) <= set(VERBS)


def test_the_extras_it_names_are_there() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = set(re.findall(r"\[(\w+)\](?!\()", README)) - {"LICENSE"}
    assert named
    assert named <= set(extras)


def test_the_files_it_points_at_are_there() -> None:
    for path in re.findall(r"\]\((?!http)([^)#]+)", README):
        assert (ROOT / path).exists(), path
