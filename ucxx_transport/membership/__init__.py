"""Membership: who serves which ring, kept in a store under leases.

Each name is imported when it is first used: the process that renews a lease must start fast.
"""

from ucxx_transport.lazy import lazy_names

__all__, __getattr__, __dir__ = lazy_names(__name__)
