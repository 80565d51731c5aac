"""The rollout worker's end: a ring on N ports."""

from ucxx_transport.server.counters import PortStatistics, ServerStatistics
from ucxx_transport.server.ring_source import RingSource
from ucxx_transport.server.server import UCXXServer

__all__ = ["PortStatistics", "RingSource", "ServerStatistics", "UCXXServer"]
