"""Membership: who serves which ring, kept in a store under leases, and who belongs to a group."""
