"""The ring: payloads in shared memory, and who may touch them when.

A lease is the right to one slot for a while, and finalises exactly once. It is left in one of three ways: by its own
call (`commit`, `mark_consumed` …), by leaving its `with` block, or by being dropped. Arrays and buffers made from it
keep its slot even when the lease object is gone, but not beyond its finalise.

Each name is imported when it is first used: a process that renews a lease needs no numpy.
"""

from ucxx_transport.lazy import lazy_names

__all__, __getattr__, __dir__ = lazy_names(__name__)
