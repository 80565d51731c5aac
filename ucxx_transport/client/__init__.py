"""The trainer's end: payloads by reference.

Each name is imported when it is first used: the blocking client needs no event loop.
"""

from ucxx_transport.lazy import lazy_names

__all__, __getattr__, __dir__ = lazy_names(__name__)
