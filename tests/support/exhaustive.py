"""Parameters of a test that the gate leaves out; `scripts/test --exhaustive` and `.ci/long` run them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from _pytest.mark.structures import ParameterSet

__all__ = ["exhaustive"]


def exhaustive(*values: object, id: str | None = None) -> ParameterSet:  # noqa: A002 - as pytest.param names it
    """One more variant of what the test's other parameters show, or the same for longer."""
    return pytest.param(*values, id=id, marks=pytest.mark.exhaustive)
