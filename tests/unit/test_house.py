"""The house's figures say what they count, and fail above their bounds."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from scripts.house import House, bounds_in, faults


@pytest.fixture
def package(tmp_path: Path) -> Path:
    folder = tmp_path / "house"
    (folder / "rooms").mkdir(parents=True)
    return folder


def write(folder: Path, files: dict[str, str]) -> House:
    for name in ("__init__.py", "rooms/__init__.py"):
        (folder / name).touch()
    for name, text in files.items():
        (folder / name).write_text(textwrap.dedent(text))
    return House(folder)


def test_an_import_of_several_lines_counts_by_its_lines_and_one_for_a_type_checker_counts_too(package: Path) -> None:
    text = """\
        from typing import (
            TYPE_CHECKING,
        )
        if TYPE_CHECKING:
            import os
        value = 1
        """
    figures = write(package, {"one.py": text}).figures()
    assert figures["lines"] == 6
    assert figures["modules"] == 3
    assert figures["imports"] == 4


def test_a_circle_is_found_through_annotations_functions_and_re_exports(package: Path) -> None:
    house = write(
        package,
        {
            "rooms/__init__.py": "from house.rooms.second import Second\n",
            "first.py": "def late():\n    from house.rooms import Second\n    return Second\n",
            "rooms/second.py": "import typing\nif typing.TYPE_CHECKING:\n    from house.third import Third\n",
            "third.py": "import house.first\n",
        },
    )
    assert house.circles() == [["house.first", "house.rooms.second", "house.third"]]
    assert house.figures()["circles"] == 1


def test_a_package_that_re_exports_its_modules_is_in_no_circle_with_them(package: Path) -> None:
    house = write(
        package,
        {
            "rooms/__init__.py": "from .base import Base\nfrom .user import Base as Other\n",
            "rooms/base.py": "class Base: ...\n",
            "rooms/user.py": "from house.rooms import Base, base\n",
        },
    )
    assert house.circles() == []


def test_a_stub_says_where_a_lazy_name_is_from(package: Path) -> None:
    modules = {"rooms/base.py": "from house.user import User\n", "user.py": "from house.rooms import Base\n"}
    assert write(package, modules).circles() == []
    stub = {"rooms/__init__.pyi": "from house.rooms.base import Base as Base\n"}
    assert write(package, stub).circles() == [["house.rooms.base", "house.user"]]


def test_a_small_module_has_one_definition_and_under_80_lines(package: Path) -> None:
    house = write(
        package,
        {
            "one.py": "def one(): ...\n",
            "two.py": "def one(): ...\nclass Two: ...\n",
            "none.py": "X = 1\n",
            "long.py": "def one(): ...\n" + "# filler\n" * 79,
        },
    )
    assert house.small() == ["house.one"]
    assert house.figures()["longest"] == 80


def test_a_figure_above_its_bound_fails_and_so_does_a_bound_that_went_up() -> None:
    assert faults({"lines": 10}, {"lines": 10}, {"lines": 12}) == []
    assert faults({"lines": 11}, {"lines": 10}, {}) == ["lines: 11 is above its bound of 10"]
    assert "went up, from 9 to 10" in faults({"lines": 8}, {"lines": 10}, {"lines": 9})[0]
    assert "no bound" in faults({"lines": 8}, {}, {})[0]


def test_this_package_s_bounds_are_set() -> None:
    root = Path(__file__).resolve().parents[2]
    bounds = bounds_in((root / "pyproject.toml").read_text())
    assert set(bounds) == set(House(root / "ucxx_transport").figures())
