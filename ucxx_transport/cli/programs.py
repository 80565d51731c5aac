"""Programs that the command runs and that are no part of the library: the demo and the benchmarks.

| program  | in a clone        | in an installed wheel             |
|----------|-------------------|-----------------------------------|
| cartpole | examples/cartpole | ucxx_transport/_programs/cartpole |
| bench    | bench             | ucxx_transport/_programs/bench    |

pyproject.toml puts them there (`tool.hatch.build.targets.wheel`).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Final

import ucxx_transport
from ucxx_transport.errors import ConfigError

_IN_CLONE: Final[Mapping[str, str]] = MappingProxyType({"cartpole": "examples/cartpole", "bench": "bench"})


def program_folder(name: str, package: Path | None = None) -> Path:
    """The folder of a program.

    Args:
        name: a row of the table.
        package: the folder of ucxx_transport; by default that of the package that is imported.

    Raises:
        ConfigError: the program is neither in the package nor beside it.
    """
    package = package or Path(ucxx_transport.__file__).parent
    installed, cloned = package / "_programs" / name, package.parent / _IN_CLONE[name]
    if installed.is_dir():
        return installed
    # Beside an installed package lie other packages: a folder of that name counts only in a clone.
    if cloned.is_dir() and (package.parent / "pyproject.toml").is_file():
        return cloned
    raise ConfigError(
        f"the program {name!r} is not in this installation: install the wheel, or clone the repository",
        installed=str(installed),
        cloned=str(cloned),
    )


def import_program(module: str) -> ModuleType:
    """Import a program's module, for example "cartpole.command".

    The folder around the program goes to the head of `sys.path`, which multiprocessing hands to spawned children.

    Raises:
        ConfigError: as `program_folder`.
        ModuleNotFoundError: a module that the program needs is not installed.
    """
    name = module.partition(".")[0]
    around = str(program_folder(name).parent)
    if sys.path[:1] != [around]:
        sys.path.insert(0, around)
    return import_module(module)
