"""What the ports need of a `ServerConfig`: plain values, checked there.

A server process is started anew when it died, while clients wait: it is spared the 0.2 s that loading pydantic takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ucxx_transport.config import ServerConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class PortSettings:
    """Names and units as in `ServerConfig`.

    Attributes:
        ports: one number for each port; 0: any, or one from `base_port` on.
        token: the shared secret itself.
    """

    ports: tuple[int, ...]
    base_port: int | None
    port_attempts: int
    token: bytes | None = field(repr=False)
    shm_lanes: bool
    spin_s: float
    first_frame_timeout_s: float
    idle_timeout_s: float
    send_timeout_s: float
    ack_timeout_s: float
    max_connections: int
    start_timeout_s: float
    stop_timeout_s: float
    ucx: Mapping[str, str]

    @classmethod
    def of(cls, config: ServerConfig) -> PortSettings:
        """Those of a server."""
        values: dict[str, Any] = {spec.name: getattr(config, spec.name) for spec in fields(cls)}
        ports = (0,) * config.ports if isinstance(config.ports, int) else tuple(config.ports)
        return cls(**{**values, "ports": ports, "token": config.token_bytes, "ucx": dict(config.ucx)})
