"""Test doubles: a network in memory, to test programs that transport payloads where UCX is not installed.

A server in thread mode and its clients take `MemoryNetwork.link` in the place of UCX's; docs/testing.md has an example.
"""

from ucxx_transport.testing.memory_link import Faults, Hold, MemoryLink, MemoryNetwork

__all__ = ["Faults", "Hold", "MemoryLink", "MemoryNetwork"]
