"""A store in one file: many processes of one machine, no server."""

from ucxx_transport.membership.local.store import LocalStore

__all__ = ["LocalStore"]
