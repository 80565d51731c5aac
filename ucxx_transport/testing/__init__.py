"""Test doubles: a network in memory, to test programs that transport payloads where UCX is not installed.

A server and its clients take the network's `link` in the place of UCX's. The server runs in thread mode; the client has
`local="off"` where its test is about the network, since on one host it would read the ring itself.

>>> import numpy as np
>>> from ucxx_transport import (
...     ClientConfig, RingConfig, Schema, ServerConfig, SharedRingBuffer, SyncUCXXClient, TensorSpec, UCXXServer
... )
>>> from ucxx_transport.testing import MemoryNetwork
>>> network = MemoryNetwork()
>>> schema = Schema([TensorSpec("reward", (3,), "float32")])
>>> with (
...     SharedRingBuffer.create(RingConfig(schema=schema, slots=4)) as ring,
...     UCXXServer(ring, ServerConfig(mode="thread"), link_factory=network.link),
...     SyncUCXXClient(ClientConfig(local="off"), link_factory=network.link) as client,
... ):
...     ref = ring.write({"reward": np.array([1, 2, 3], "float32")})
...     with client.read(ref) as payload:
...         print(payload.transport, payload.arrays["reward"])
ucx [1. 2. 3.]

`network.faults` makes it misbehave: messages vanish, arrive cut short or changed, connections are refused or break.
"""

from ucxx_transport.testing.faults import Faults, Hold
from ucxx_transport.testing.memory_link import MemoryLink, MemoryNetwork

__all__ = ["Faults", "Hold", "MemoryLink", "MemoryNetwork"]
