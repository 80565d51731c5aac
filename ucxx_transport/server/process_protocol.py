"""What a worker and its server process say to each other: one JSON line each way at the start, and a goodbye.

The worker writes a `ServerOrder` to the child's standard input and keeps that pipe open. `GOODBYE` there is its wish to
stop; an end of file without it is its death. The child answers on a pipe of its own with a `ServerReport`. No pickle.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from ucxx_transport.errors import ConfigError, DeadlineExceededError, TransportError
from ucxx_transport.server.port_settings import PortSettings

GOODBYE = b"goodbye\n"

_CLASSES: dict[str, type[TransportError]] = {
    "ConfigError": ConfigError,
    "DeadlineExceededError": DeadlineExceededError,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOrder:
    """Which ring to serve, and how.

    Attributes:
        ring_name: the segment to attach.
        ring_folder: where it is; the server process reads no settings.
        worker_pid: the process whose death ends the server.
        settings: `ports` names the very ports after a restart.
    """

    ring_name: str
    ring_folder: str
    worker_pid: int
    settings: PortSettings

    def to_line(self) -> bytes:
        """The order as one line of JSON; the token travels here and nowhere else."""
        token = self.settings.token
        order = asdict(self)
        order["settings"]["token"] = token.hex() if token is not None else None
        return json.dumps(order).encode() + b"\n"

    @staticmethod
    def from_line(line: bytes) -> ServerOrder:
        """Rebuild the order in the child."""
        order = json.loads(line)
        settings = order["settings"]
        token = bytes.fromhex(settings["token"]) if settings["token"] is not None else None
        return ServerOrder(
            ring_name=order["ring_name"],
            ring_folder=order["ring_folder"],
            worker_pid=order["worker_pid"],
            settings=PortSettings(**{**settings, "ports": tuple(settings["ports"]), "token": token}),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerReport:
    """The child's answer: its ports, or why it has none."""

    ports: tuple[int, ...] = ()
    error_class: str = ""
    error: str = ""

    def to_line(self) -> bytes:
        """The report as one line of JSON."""
        return json.dumps({name: getattr(self, name) for name in ("ports", "error_class", "error")}).encode() + b"\n"

    @staticmethod
    def from_line(line: bytes) -> ServerReport:
        """Rebuild the report in the worker."""
        report = json.loads(line)
        return ServerReport(ports=tuple(report["ports"]), error_class=report["error_class"], error=report["error"])

    def raise_error(self) -> None:
        """Raise what stopped the child from serving, if anything did.

        Raises:
            ConfigError, DeadlineExceededError, TransportError: as it was raised there.
        """
        if self.error_class:
            raise _CLASSES.get(self.error_class, TransportError)(self.error)
