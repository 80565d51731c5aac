"""The programs of the documents run, and print what stands behind them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import cast

import pytest

from tests.support.exhaustive import exhaustive

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = [
    pytest.param(program, output, id=f"{page.stem}-{number}")
    for page in PAGES
    for number, (program, output) in enumerate(
        re.findall(
            r"^```python\n(?!>>> )(.*?)^```\n\n```\n(.*?)^```", page.read_text("utf-8"), re.DOTALL | re.MULTILINE
        )
    )
]
STREAM, MIXINS = (cast("tuple[str, str]", parameter.values) for parameter in PROGRAMS[:2])  # the README's


def run(program: str, folder: Path, python: Path | str = sys.executable) -> tuple[int, str, str]:
    """Status, standard output and standard error of a program whose log is shown."""
    (folder / "example.py").write_text(program)
    (folder / "sitecustomize.py").write_text("import logging\nlogging.basicConfig()\n")
    with subprocess.Popen(
        [python, "-W", "error", "example.py"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{folder}"},
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


def printed_by(program: str, folder: Path, python: Path | str = sys.executable) -> str:
    """What it prints on standard output; with a log that is shown, it says nothing else."""
    status, out, err = run(program, folder, python)
    assert (status, err) == (0, ""), err
    return out


@pytest.fixture
def base_install(tmp_path: Path) -> Path:
    """A Python that has all packages of this one but those of UCX."""
    folder = tmp_path / "base"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True, timeout=120)
    (packages,) = folder.glob("lib/python*/site-packages")
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if not re.match(r"(lib)?ucxx?(_cu\d+.*|\..*)?$", path.name):
            (packages / path.name).symlink_to(path)
    return folder / "bin" / "python"


@pytest.mark.parametrize(("program", "output"), PROGRAMS)
def test_a_program_prints_what_its_page_says(program: str, output: str, tmp_path: Path) -> None:
    assert printed_by(program, tmp_path) == output


@pytest.mark.parametrize(
    ("example", "of_the_client", "name"),
    [
        exhaustive(
            STREAM,
            "EpisodeStream((records.recv() for _ in range(3)), {}",
            "EpisodeStream(records.recv() for _ in range(3)",
        ),
        exhaustive(MIXINS, "setup_ucxx_data_packer(client={}", "setup_ucxx_data_packer("),
    ],
)
def test_the_readme_s_programs_print_the_same_over_ucx(
    example: tuple[str, str], of_the_client: str, name: str, tmp_path: Path
) -> None:
    program, output = example
    client = '__import__("ucxx_transport").ClientConfig(local="off")'
    assert name in program
    assert printed_by(program.replace(name, of_the_client.format(client)), tmp_path) == output


def test_the_readme_s_first_program_says_on_a_base_install_what_to_do_and_waits_for_nothing(
    base_install: Path, tmp_path: Path
) -> None:
    names = "ucxx", "libucx", "libucxx"
    program = f"import importlib.util\nprint([*map(importlib.util.find_spec, {names})])"
    assert printed_by(program, tmp_path, base_install) == "[None, None, None]\n"
    status, out, err = run(STREAM[0], tmp_path, base_install)
    assert (status, out) == (1, ""), err
    (said,) = [line for line in err.splitlines() if "ConfigError: UCX is not installed" in line]
    assert "pip install" in said
    assert "serve=False" in said
    assert err.splitlines()[-1] == "EOFError", err  # its worker's death, and no time limit
    program = STREAM[0].replace('"worker-0", ', '"worker-0", serve=False, ')
    assert printed_by(program, tmp_path, base_install) == STREAM[1]
