"""The rollout worker's end: a ring on N ports.

Each name is imported when it is first used: a server process must start fast.
"""

from ucxx_transport.lazy import lazy_names

__all__, __getattr__, __dir__ = lazy_names(__name__)
