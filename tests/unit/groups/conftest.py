from __future__ import annotations

from tests.support.group_ranks import ranks

__all__ = ["ranks"]
