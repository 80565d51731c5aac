"""Groups of ranks: which ones are members, which are about to join, and how all come to agree on it."""

from ucxx_transport.lazy import lazy_names

__all__, __getattr__, __dir__ = lazy_names(__name__)
