from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from ucxx_transport import groups, membership, server
from ucxx_transport.lazy import lazy_names


@pytest.fixture
def package(tmp_path: Path) -> Iterator[ModuleType]:
    """A package of which only the stub exists; its one name is json's."""
    (tmp_path / "__init__.pyi").write_text("from json.decoder import JSONDecoder as JSONDecoder\n\n__version__: str\n")
    module = ModuleType("lazy_package")
    module.__path__ = [str(tmp_path)]
    sys.modules[module.__name__] = module
    yield module
    del sys.modules[module.__name__]


def test_a_name_is_imported_when_it_is_first_used_and_kept(package: ModuleType) -> None:
    _, fetch, _ = lazy_names(package.__name__)
    assert "JSONDecoder" not in vars(package)
    assert fetch("JSONDecoder") is sys.modules["json.decoder"].JSONDecoder
    assert vars(package)["JSONDecoder"] is sys.modules["json.decoder"].JSONDecoder


def test_an_unknown_name_is_an_attribute_error_that_names_it(package: ModuleType) -> None:
    _, fetch, _ = lazy_names(package.__name__)
    with pytest.raises(AttributeError, match=r"module 'lazy_package' has no attribute 'nonsense'"):
        fetch("nonsense")
    with pytest.raises(ImportError):
        exec("from ucxx_transport.membership import nonsense", {})  # noqa: S102 - as any caller would write it


def test_names_not_used_yet_are_listed(package: ModuleType) -> None:
    names, _, listed = lazy_names(package.__name__, "__version__")
    assert names == ["JSONDecoder", "__version__"]
    assert {"JSONDecoder", "__name__"} <= set(listed())


def test_every_name_of_the_lazy_packages_is_what_it_says() -> None:
    for package in (groups, membership, server):
        assert set(vars(package)["__all__"]) <= set(dir(package))
        for name in vars(package)["__all__"]:
            assert getattr(package, name).__name__ == name, (package, name)
