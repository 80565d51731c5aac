"""Ports over the in-memory link, run by the test itself, under a clock of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.unit.server.port_rig import PortRig, open_rig


@pytest.fixture
def rig() -> Iterator[PortRig]:
    """One port before a raw ring of 4 slots of 64 KiB."""
    with open_rig() as made:
        yield made
