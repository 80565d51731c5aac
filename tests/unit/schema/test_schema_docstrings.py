from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

from ucxx_transport import schema


@pytest.mark.parametrize("module", [info.name for info in pkgutil.iter_modules(schema.__path__)])
def test_examples_in_docstrings_run(module: str) -> None:
    assert doctest.testmod(importlib.import_module(f"{schema.__name__}.{module}")).failed == 0
