"""The UCX settings of a link's context: ours, then the configuration's, then what the user set in the environment.

| setting                 | value | why                                                                                       |
|-------------------------|-------|-------------------------------------------------------------------------------------------|
| TCP_TX_SEG_SIZE         | 256K  | 1.7 -> 7.9 GB/s at 16 MiB over TCP; touches TCP alone                                     |
| TCP_RX_SEG_SIZE         | 512K  | must not be smaller than the above                                                        |
| TCP_CM_REUSEADDR        | y     | the port of a killed server can be listened on again at once                              |
| MEMTYPE_CACHE           | n     | what ucxx itself sets: with the cache, UCX can take GPU memory for host memory            |
| MM_ERROR_HANDLING       | y     | `shm_lanes` only: without it UCX never puts shared memory under such an endpoint          |

A name in the environment (`UCX_TCP_TX_SEG_SIZE`) beats both: whoever sets it for one run means that run.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from ucxx_transport.errors import ConfigError

__all__ = ["SHM_LANES", "TUNED", "context_settings"]

TUNED: Mapping[str, str] = MappingProxyType(
    {
        "TCP_TX_SEG_SIZE": "256K",
        "TCP_RX_SEG_SIZE": "512K",
        "TCP_CM_REUSEADDR": "y",
        "MEMTYPE_CACHE": "n",
    }
)

SHM_LANES: Mapping[str, str] = MappingProxyType({"POSIX_ERROR_HANDLING": "y", "SYSV_ERROR_HANDLING": "y"})


def context_settings(*, shm_lanes: bool, ucx: Mapping[str, str], environment: Mapping[str, str]) -> dict[str, str]:
    """What to give to the context, names without the `UCX_` prefix.

    Args:
        shm_lanes: let same-host connections use shared memory instead of TCP; needed on both sides.
        ucx: the configuration's own settings, with or without the prefix.
        environment: the process's; what it sets is left out of the result, for UCX reads it there by itself.

    Raises:
        ConfigError: a name or value that is not a string.
    """
    merged = dict(TUNED)
    if shm_lanes:
        merged.update(SHM_LANES)
    for name, value in ucx.items():
        if not isinstance(name, str) or not isinstance(value, str):
            raise ConfigError("ucx settings are strings, such as {'TLS': 'tcp'}", name=name, value=value)
        merged[name.removeprefix("UCX_")] = value
    return {name: value for name, value in merged.items() if f"UCX_{name}" not in environment}
