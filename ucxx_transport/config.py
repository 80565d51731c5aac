"""Frozen settings of the ring, the server, the client and membership, validated where they are made.

Each is built from keyword arguments over `UCXX_TRANSPORT_*` over `./ucxx_transport.toml` (see `settings.section`).
Sizes may be text such as `"512MiB"`, durations such as `"250ms"` (see `units`). What is wrong is a `ConfigError` that
names the field, the value, where it came from, and what would be right. `dataclasses.replace` makes a changed copy,
validated again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal, Protocol, runtime_checkable

from ucxx_transport.errors import ConfigError
from ucxx_transport.settings.fields import (
    Bytes,
    Count,
    Folder,
    Name,
    OptionalBytes,
    OptionalCount,
    OptionalName,
    OptionalPortRange,
    OptionalText,
    OptionalToken,
    Ports,
    Seconds,
    UCXSettings,
)
from ucxx_transport.settings.section import section, setting
from ucxx_transport.units import parse_duration

MAX_SLOTS: Final = 65536
MAX_READERS: Final = 64
_LONGEST_S: Final = float("inf")

_SETTINGS_OF_UCX = (
    "further settings of UCX, without the `UCX_`, e.g. {'TLS': 'tcp'}; what stands in the environment wins"
)
_TOKEN_IN_WORDS = "shared secret of all workers and trainers; without one every peer is served"  # noqa: S105 - words
_SHM_LANES_IN_WORDS = "let UCX use shared memory between processes of one host; both sides must agree"
_DATA_PORTS_IN_WORDS = (
    "first and last of the ports that UCX takes for data over TCP, for a firewall to open; unset takes any free ones"
)
_SPIN_IN_WORDS = "how long a waiting loop polls before it blocks; 0 saves CPU and costs about 50 µs a read"


def checked_seconds(value: float | str, field: str) -> float:
    """A time limit that a call was given, in seconds: a number, or text such as `"250ms"`.

    Args:
        value: what the caller passed.
        field: the argument's name, for the error.

    Raises:
        ConfigError: no finite duration, or a negative one.
    """
    if type(value) is float and 0.0 <= value < _LONGEST_S:
        return value
    try:
        seconds = parse_duration(value)
    except ValueError as exc:
        raise ConfigError(f"{field} = {value!r}: {exc}", field=field, value=value) from exc
    if seconds < 0:
        raise ConfigError(
            f"{field} = {value!r}: a time limit is not negative; 0 does not wait at all", field=field, value=value
        )
    return seconds


def _link_settings(ucx: Mapping[str, str], data_ports: tuple[int, int] | None) -> dict[str, str]:
    return dict(ucx) if data_ports is None else {**ucx, "TCP_PORT_RANGE": f"{data_ports[0]}-{data_ports[1]}"}


@runtime_checkable
class PayloadSchema(Protocol):
    """What a ring's settings need of a `Schema`; `ucxx_transport.Schema` is one."""

    @property
    def nbytes(self) -> int:
        """Bytes of the largest payload, all variable-length fields full."""

    @property
    def fingerprint(self) -> int:
        """Unsigned 64-bit name of the layout."""

    def to_dict(self) -> dict[str, Any]:
        """The schema as plain values; `Any` because its shape is the schema package's own."""


@section("ring", choice=frozenset({"schema", "slot_bytes"}))
class RingConfig:
    """How a `SharedRingBuffer` is made: exactly one of `schema` and `slot_bytes` says what a slot holds."""

    slots: Count = setting(default=64, ge=1, le=MAX_SLOTS, description="number of slots")
    schema: PayloadSchema | None = setting(
        default=None, description="the fields of every payload (a Schema)", code_only=True
    )
    slot_bytes: OptionalBytes = setting(default=None, ge=1, le=1 << 46, description="largest raw payload of a slot")
    name: OptionalName = setting(default=None, description="name of the segment; unset makes a random one")
    folder: Folder = setting(
        default="/dev/shm",  # noqa: S108 - POSIX shared memory, not a temporary file
        description="where the segment is made; readers and `clean` look in the folder of their own setting",
    )
    on_full: Literal["overwrite", "block", "raise"] = setting(
        default="overwrite",
        description="with no free slot: drop the oldest unread payload, wait, or raise RingFullError",
    )
    readers: Count = setting(default=1, ge=1, le=MAX_READERS, description="reads that free a payload")
    prefault: bool = setting(default=True, description="touch all pages at creation, so that the first lap is fast too")
    checksum: bool = setting(default=False, description="xxh3_64 of every payload, carried by its SlotRef")
    envelope_bytes: Bytes = setting(
        default=1024,
        ge=0,
        le=1024,
        description="room beside each payload for what is said of it (its record, or meta), in steps of 64; 0: none",
    )
    block_timeout_s: Seconds = setting(
        default=30.0, gt=0, description="on_full='block': how long a write waits at most"
    )
    lock_timeout_s: Seconds = setting(default=5.0, gt=0, description="how long the header's lock is waited for at most")

    def __post_init__(self) -> None:
        if (self.schema is None) == (self.slot_bytes is None):
            given = "neither" if self.schema is None else "both"
            raise ConfigError(
                f"A ring needs exactly one of ring.schema and ring.slot_bytes, got {given}: pass schema=Schema([...]) "
                "for named arrays or slot_bytes='1MiB' for raw bytes",
                field="slot_bytes",
            )


@section("server")
class ServerConfig:
    """How a `UCXXServer` listens, and what it allows a peer."""

    host: OptionalText = setting(
        default=None, max_length=255, description="address to publish; unset finds one (RDMA interface first)"
    )
    ports: Ports = setting(default=2, description="how many ports, or a list of port numbers (0 for any free one)")
    base_port: OptionalCount = setting(
        default=None, ge=1, le=65535, description="first port to try; unset takes any free ones"
    )
    mode: Literal["process", "thread"] = setting(
        default="process", description="each port a supervised process, or a thread of this one"
    )
    token: OptionalToken = setting(default=None, description=_TOKEN_IN_WORDS)
    shm_lanes: bool = setting(default=False, description=_SHM_LANES_IN_WORDS)
    spin_s: Seconds = setting(default=50e-6, ge=0, le=0.1, description=_SPIN_IN_WORDS)
    first_frame_timeout_s: Seconds = setting(
        default=5.0, gt=0, description="a new connection that sends nothing is closed"
    )
    idle_timeout_s: Seconds = setting(default=120.0, gt=0, description="a silent connection is closed")
    send_timeout_s: Seconds = setting(
        default=60.0, gt=0, description="a payload that is not received by then is abandoned"
    )
    ack_timeout_s: Seconds = setting(default=10.0, gt=0, description="a payload not acknowledged goes back to its slot")
    max_connections: Count = setting(default=256, ge=1, le=65536, description="connections of one port")
    port_attempts: Count = setting(default=64, ge=1, le=65535, description="ports tried from base_port on")
    data_ports: OptionalPortRange = setting(default=None, description=_DATA_PORTS_IN_WORDS)
    start_timeout_s: Seconds = setting(default=30.0, gt=0, description="bound on start()")
    stop_timeout_s: Seconds = setting(default=5.0, gt=0, description="bound on stop()")
    stall_timeout_s: Seconds = setting(
        default=10.0, gt=0, description="a port's process whose loop has not turned for so long is replaced"
    )
    ucx: UCXSettings = setting(default={}, description=_SETTINGS_OF_UCX)

    @property
    def token_bytes(self) -> bytes | None:
        """The shared secret itself, or None."""
        return None if self.token is None else self.token.reveal()

    @property
    def link_settings(self) -> dict[str, str]:
        """`ucx`, and what follows from `data_ports`."""
        return _link_settings(self.ucx, self.data_ports)

    def __post_init__(self) -> None:
        self._check_data_ports()
        if self.base_port is None:
            return
        field, value = "base_port", self.base_port
        if not isinstance(self.ports, int):
            problem = "ports names them already; drop one of the two"
        elif self.port_attempts < self.ports:
            field, value, problem = "port_attempts", self.port_attempts, f"expected at least ports = {self.ports}"
        elif self.base_port + self.ports > 65536:
            problem = f"{self.ports} ports from there on pass 65535"
        else:
            return
        raise ConfigError(f"server.{field} = {value}: {problem}", field=field, value=value)

    def _check_data_ports(self) -> None:
        if self.data_ports is None:
            return
        first, last = self.data_ports
        count = self.ports if isinstance(self.ports, int) else len(self.ports)
        listening = range(self.base_port or 0, (self.base_port or 0) + count)
        named = set(listening if isinstance(self.ports, int) else self.ports)
        if last - first + 1 < count:
            problem = f"expected at least ports = {count}: each listening port takes one of these too"
        elif clash := sorted(port for port in named if first <= port <= last):
            problem = f"{clash[0]} is to be listened on already"
        else:
            return
        value = f"{first}-{last}"
        raise ConfigError(f"server.data_ports = {value}: {problem}", field="data_ports", value=value)


@section("client")
class ClientConfig:
    """How a `UCXXClient` reads: in place or over UCX, how long, how often, and with how much memory."""

    local: Literal["auto", "view", "copy", "off"] = setting(
        default="auto", description="a ring of this host: read in place, copied, or over UCX like any other ('off')"
    )
    token: OptionalToken = setting(default=None, description=_TOKEN_IN_WORDS)
    shm_lanes: bool = setting(default=False, description=_SHM_LANES_IN_WORDS)
    spin_s: Seconds = setting(default=50e-6, ge=0, le=0.1, description=_SPIN_IN_WORDS)
    deadline_s: Seconds = setting(default=5.0, gt=0, description="bound on a read that names none")
    connect_timeout_s: Seconds = setting(default=1.0, gt=0, description="bound on connecting to one port")
    port_quarantine_s: Seconds = setting(default=30.0, ge=0, description="how long a port that failed is not used")
    read_attempts: Count = setting(
        default=2, ge=1, le=100, description="calls made for one read, when retrying can help"
    )
    pool_endpoint_max_age_s: Seconds = setting(
        default=100.0,
        gt=0,
        description="an idle connection is not used again; keep it below the server's idle_timeout_s",
    )
    max_connections: OptionalCount = setting(
        default=None, ge=1, le=65536, description="connections at a time; unset follows the limit of open files"
    )
    buffer_pool_bytes: Bytes = setting(default=1 << 30, ge=0, description="receive buffers kept for reuse")
    max_payload_bytes: Bytes = setting(default=64 << 30, ge=1, description="a SlotRef that promises more is refused")
    data_ports: OptionalPortRange = setting(default=None, description=_DATA_PORTS_IN_WORDS)
    max_attached_rings: Count = setting(default=256, ge=1, le=65536, description="local rings kept mapped")
    verify_checksum: bool = setting(default=True, description="check the SlotRef's checksum when it has one")
    ucx: UCXSettings = setting(default={}, description=_SETTINGS_OF_UCX)

    @property
    def token_bytes(self) -> bytes | None:
        """The shared secret itself, or None."""
        return None if self.token is None else self.token.reveal()

    @property
    def link_settings(self) -> dict[str, str]:
        """`ucx`, and what follows from `data_ports`."""
        return _link_settings(self.ucx, self.data_ports)


@section("store")
class StoreConfig:
    """How a store of membership is reached; its address is the URL given to `open_store`."""

    namespace: Name = setting(
        default="default", description="keeps the jobs that share a store apart; the same for all of one job"
    )
    timeout_s: Seconds = setting(default=5.0, gt=0, description="bound on one call")
    user: OptionalText = setting(default=None, description="etcd: the user's name")
    password: OptionalToken = setting(default=None, description="etcd: the user's password")
    ca_file: OptionalText = setting(default=None, description="etcd: certificates to trust; turns TLS on")
    cert_file: OptionalText = setting(default=None, description="etcd: this client's certificate")
    key_file: OptionalText = setting(default=None, description="etcd: the key of cert_file")

    @property
    def password_text(self) -> str | None:
        """The password itself, or None."""
        return None if self.password is None else self.password.reveal().decode()

    def __post_init__(self) -> None:
        if (self.cert_file is None) != (self.key_file is None):
            missing = "key_file" if self.key_file is None else "cert_file"
            raise ConfigError(f"store.{missing} is missing: a certificate and its key go together", field=missing)
        if (self.user is None) != (self.password is None):
            missing = "password" if self.password is None else "user"
            raise ConfigError(f"store.{missing} is missing: a user and a password go together", field=missing)


@section("publisher")
class PublisherConfig:
    """How a worker publishes itself, and how its lease is kept."""

    interval_s: Seconds = setting(
        default=2.0, gt=0, description="how often the lease is renewed; it lives three times this"
    )
    publish_timeout_s: Seconds = setting(
        default=1800.0, gt=0, description="how long a worker tries to publish itself before on_timeout"
    )
    on_timeout: Literal["retry", "stop"] = setting(
        default="retry", description="then keep retrying, with errors in the log, or stop"
    )
    backoff_s: Seconds = setting(default=0.1, gt=0, description="first pause between two tries; doubles, with jitter")
    max_backoff_s: Seconds = setting(default=5.0, gt=0, description="longest pause between two tries")
    keeper: Literal["process", "thread"] = setting(
        default="process",
        description="who renews the lease: a process, which no blocked interpreter starves, or a thread",
    )
    stop_timeout_s: Seconds = setting(default=5.0, gt=0, description="bound on stop()")

    @property
    def ttl_s(self) -> float:
        """How long a lease lives without a renewal: one may be missed, not two in a row."""
        return 3 * self.interval_s
