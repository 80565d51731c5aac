"""What a test looks at in a link of either kind."""

from __future__ import annotations

from typing import Any


def endpoints_open(link: Any) -> int:
    """How many connections are not closed yet."""
    return len(link.endpoints)


def _endpoints(link: Any) -> Any:
    return link.endpoints.values() if isinstance(link.endpoints, dict) else link.endpoints


def in_flight(link: Any) -> int:
    """How many operations are posted and not completed."""
    return sum(len(endpoint.posted) for endpoint in _endpoints(link))
