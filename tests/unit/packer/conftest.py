"""Packer tests run under virtual time."""

from __future__ import annotations

import pytest

from tests.support.virtual_time import VirtualTimeLoop


@pytest.fixture(scope="session")
def anyio_backend() -> tuple[str, dict[str, object]]:
    """asyncio, with a clock that jumps."""
    return "asyncio", {"loop_factory": VirtualTimeLoop}
