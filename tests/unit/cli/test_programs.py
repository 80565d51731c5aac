"""Where the command finds the programs that are no part of the library."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from ucxx_transport.cli.program import VERBS, import_program, program_folder
from ucxx_transport.errors import ConfigError

ROOT = Path(__file__).parents[3]


def test_in_a_clone_a_program_lies_beside_the_package() -> None:
    assert program_folder("cartpole") == ROOT / "examples/cartpole"
    assert program_folder("bench") == ROOT / "bench"


def test_in_an_installed_wheel_it_lies_inside_the_package_and_a_neighbour_s_folder_is_not_taken_for_it(
    tmp_path: Path,
) -> None:
    package = tmp_path / "ucxx_transport"
    package.mkdir()
    (tmp_path / "bench").mkdir()  # some other package's, in site-packages
    with pytest.raises(ConfigError, match="'bench' is not in this installation"):
        program_folder("bench", package)
    (package / "_programs/bench").mkdir(parents=True)
    assert program_folder("bench", package) == package / "_programs/bench"


def test_the_wheel_has_every_program_where_it_is_looked_for() -> None:
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    for verb in ("bench", "demo"):
        name = VERBS[verb].partition(".")[0]
        folder = str(program_folder(name).relative_to(ROOT))
        assert folder in wheel["only-include"], verb
        assert wheel["sources"][folder] == f"ucxx_transport/_programs/{name}", verb


def test_a_program_s_own_module_is_what_is_imported() -> None:
    for verb in ("bench", "demo"):
        module = VERBS[verb].partition(":")[0]
        assert Path(str(import_program(module).__file__)).is_relative_to(ROOT), verb
