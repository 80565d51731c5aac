"""The rollout worker's end: a ring on N ports.

Each name is imported when it is first used: a server process that is started anew must be there in no time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ucxx_transport.late_names import late_names

if TYPE_CHECKING:
    from ucxx_transport.server.counters import PortStatistics, ServerStatistics
    from ucxx_transport.server.ring_source import RingSource
    from ucxx_transport.server.server import UCXXServer

_HOMES = {
    "counters": ("PortStatistics", "ServerStatistics"),
    "ring_source": ("RingSource",),
    "server": ("UCXXServer",),
}

__all__ = ["PortStatistics", "RingSource", "ServerStatistics", "UCXXServer"]

if not TYPE_CHECKING:  # a type checker would take any name for one of this module
    __getattr__, __dir__ = late_names(__name__, globals(), _HOMES)
