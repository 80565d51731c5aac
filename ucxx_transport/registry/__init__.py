"""Membership: who serves which ring, kept in a store under leases, and who belongs to a group."""

from ucxx_transport.registry.opening import open_store

__all__ = ["open_store"]
