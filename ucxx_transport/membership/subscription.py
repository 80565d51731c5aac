"""Subscription: listeners of one who asked to hear of sources."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ucxx_transport.membership.source_record import SourceRecord

Listener = Callable[[SourceRecord], None]


@dataclass(frozen=True, slots=True, eq=False)
class Subscription:
    """Who is called for which kind of change; known by identity, since two may name the same listeners."""

    on_add: Listener | None
    on_update: Listener | None
    on_remove: Listener | None

    def listener_of(self, kind: str) -> Listener | None:
        """Who hears of changes of this kind ("add", "update", "remove"), if anybody."""
        return {"add": self.on_add, "update": self.on_update, "remove": self.on_remove}[kind]
