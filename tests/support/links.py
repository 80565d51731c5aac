"""What a test looks at in a link of either kind."""

from __future__ import annotations

from typing import Any


def endpoints_open(link: Any) -> int:
    """How many connections are not closed yet."""
    return len(link.endpoints)


def in_flight(link: Any) -> int:
    """How many operations are posted and not completed."""
    return sum(len(endpoint.posted) for endpoint in link.endpoints.values())
