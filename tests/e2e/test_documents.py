"""The programs of the documents run, and print what stands behind them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

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
STREAM, MIXINS = (parameter.values for parameter in PROGRAMS[:2])  # the README's


def printed_by(program: str, folder: Path) -> str:
    """What it prints on standard output; with a log that is shown, it says nothing else."""
    (folder / "example.py").write_text(program)
    (folder / "sitecustomize.py").write_text("import logging\nlogging.basicConfig()\n")
    with subprocess.Popen(
        [sys.executable, "-W", "error", "example.py"],
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
    assert (process.returncode, err) == (0, ""), err
    return out


@pytest.mark.parametrize(("program", "output"), PROGRAMS)
def test_a_program_prints_what_its_page_says(program: str, output: str, tmp_path: Path) -> None:
    assert printed_by(program, tmp_path) == output


@pytest.mark.parametrize(
    ("example", "of_the_client", "name"),
    [
        exhaustive(
            STREAM,
            "EpisodeStream((records.get(timeout=60) for _ in range(3)), {}",
            "EpisodeStream(records.get(timeout=60) for _ in range(3)",
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
