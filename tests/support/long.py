"""Parameters of a test that continuous integration runs in its other run, `.ci/long`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from _pytest.mark.structures import ParameterSet

__all__ = ["long"]


def long(*values: object, id: str | None = None) -> ParameterSet:  # noqa: A002 - as pytest.param names it
    """One more way of what the test's other parameters show in less time: a variant, or the same for longer."""
    return pytest.param(*values, id=id, marks=pytest.mark.long)
