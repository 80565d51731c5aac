"""RL trajectories from a rollout worker's shared memory to a trainer: in place on one host, over UCX between hosts.

The public names are those of the stub beside this file. Each is imported when it is first used: a server process does
not load the client, and nothing here loads ucxx, torch or cupy.
"""

from ucxx_transport.lazy import lazy_names

__version__ = "0.1.0"
__all__, __getattr__, __dir__ = lazy_names(__name__, "__version__")
