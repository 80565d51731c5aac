"""A trainer's end: batches of episodes fetched ahead, each episode once, each loss with its reason."""

from ucxx_transport.lazy import lazy_names

__all__, __getattr__, __dir__ = lazy_names(__name__)
