"""Tests that need a GPU: each is skipped with its reason where there is none. `pytest tests/gpu`, or `-m gpu`."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import pytest


def _imported(name: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what this machine lacks; the tests say what matters of it
            return importlib.import_module(name)
    except ImportError as error:
        pytest.skip(f"{name} is not installed, or cannot be loaded: {error}")


@pytest.fixture(scope="session")
def torch() -> Any:
    """torch, with a GPU."""
    module = _imported("torch")
    if not module.cuda.is_available():
        pytest.skip(f"torch {module.__version__} finds no GPU that it can use")
    module.zeros(1, device="cuda")
    return module


@pytest.fixture(scope="session")
def cupy() -> Any:
    """cupy, with a GPU."""
    module = _imported("cupy")
    runtime = module.cuda.runtime
    try:
        count = runtime.getDeviceCount()
    except runtime.CUDARuntimeError as error:
        pytest.skip(f"cupy {module.__version__} finds no GPU that it can use: {error}")
    if not count:
        pytest.skip(f"cupy {module.__version__} finds no GPU")
    module.zeros(1)
    return module
