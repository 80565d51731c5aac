"""Frozen settings of the ring, the server, the client and membership, validated where they are made.

Where their values come from: see `settings`; what may stand for a size or a duration: see `units`. What is wrong is a
`ConfigError` that names the field, the value, where it came from, and what would be right. `dataclasses.replace` makes
a changed copy, validated again.
"""

from __future__ import annotations

import operator
from typing import Any, Final, Literal, Protocol, runtime_checkable

from ucxx_transport import units
from ucxx_transport.errors import ConfigError
from ucxx_transport.settings import section, setting

MAX_SLOTS: Final = 65536
MAX_READERS: Final = 64
_LONGEST_S: Final = float("inf")

_SETTINGS_OF_UCX = "further settings of UCX, without the `UCX_`, e.g. {'TLS': 'tcp'}; what the environment says wins"
_SECRECY_IN_WORDS = "shared secret of all workers and trainers; without one every peer is served"
_SHM_LANES_IN_WORDS = "let UCX use shared memory between processes of one host; both sides must agree"
_DATA_PORTS_IN_WORDS = "first and last port that UCX takes for data over TCP, for a firewall to open; unset takes any"
_SPIN_IN_WORDS = "how long a waiting loop polls before it blocks; 0 saves CPU and costs about 50 µs a read"


def checked_seconds(value: float | str, field: str) -> float:
    """A time limit that a call was given as its argument `field`, in seconds; a ConfigError: no finite duration."""
    if type(value) is float and 0.0 <= value < _LONGEST_S:
        return value
    try:
        return units.parse_duration(value)
    except ValueError as exc:
        raise ConfigError(f"{field} = {value!r}: {exc}", field=field, value=value) from exc


def checked_count(value: int, field: str, *, at_least: int, unset: str | None = None) -> int:
    """A number that a call was given as its argument `field`; `unset` is what None stands for, where it may be None."""
    try:
        count = operator.index(value)
    except TypeError:
        count = at_least - 1
    if count < at_least or isinstance(value, bool):
        choice = "" if unset is None else f", or None for {unset}"
        message = f"{field} must be a whole number, at least {at_least}{choice}, not {value!r}"
        raise ConfigError(message, field=field, value=value)
    return count


@runtime_checkable
class Schema(Protocol):
    """What a ring's settings need of a schema; `ucxx_transport.Schema` is one."""

    @property
    def nbytes(self) -> int: ...
    @property
    def fingerprint(self) -> int: ...
    def to_dict(self) -> dict[str, Any]: ...


@section("ring", choice=frozenset({"schema", "slot_bytes"}))
class RingConfig:
    """How a `SharedRingBuffer` is made: exactly one of `schema` and `slot_bytes` says what a slot holds."""

    slots: units.Count = setting("number of slots", default=64, ge=1, le=MAX_SLOTS)
    schema: Schema | None = setting("the fields of every payload (a Schema)", default=None, code_only=True)
    slot_bytes: units.OptionalBytes = setting("largest raw payload of a slot", default=None, ge=1, le=1 << 46)
    name: units.OptionalName = setting("name of the segment; unset makes a random one", default=None)
    folder: units.Folder = setting(
        "where the segment is made; readers and `clean` look in the folder of their own setting",
        default="/dev/shm",  # noqa: S108 - POSIX shared memory, not a temporary file
    )
    on_full: Literal["overwrite", "block", "raise"] = setting(
        "with no free slot: drop the oldest unread payload, wait, or raise RingFullError", default="overwrite"
    )
    readers: units.Count = setting("reads that free a payload", default=1, ge=1, le=MAX_READERS)
    prefault: bool = setting("touch all pages at creation, so that the first lap is fast too", default=True)
    checksum: bool = setting("xxh3_64 of every payload, carried by its SlotRef", default=False)
    envelope_bytes: units.Bytes = setting(
        "room for what is noted of a payload (record or meta), in steps of 64; 0: none", default=1024, ge=0, le=1024
    )
    block_timeout_s: units.Seconds = setting("on_full='block': how long a write waits at most", default=30.0, gt=0)
    lock_timeout_s: units.Seconds = setting("how long the header's lock is waited for at most", default=5.0, gt=0)

    def __post_init__(self) -> None:
        if (self.schema is None) == (self.slot_bytes is None):
            given = "neither" if self.schema is None else "both"
            raise ConfigError(
                f"A ring needs exactly one of ring.schema and ring.slot_bytes, got {given}: pass schema=Schema([...]) "
                "for named arrays or slot_bytes='1MiB' for raw bytes",
                field="slot_bytes",
            )


class _OverUCX:
    """What servers and clients alike make of their settings."""

    __slots__ = ()
    token: units.OptionalToken
    ucx: units.UCXSettings
    data_ports: units.OptionalPortRange

    @property
    def token_bytes(self) -> bytes | None:
        """The shared secret itself, or None."""
        return None if self.token is None else self.token.reveal()

    @property
    def link_settings(self) -> dict[str, str]:
        """`ucx`, and what follows from `data_ports`."""
        ports = {} if self.data_ports is None else {"TCP_PORT_RANGE": "{}-{}".format(*self.data_ports)}
        return {**self.ucx, **ports}


@section("server")
class ServerConfig(_OverUCX):
    """How a `UCXXServer` listens, and what it allows a peer."""

    host: units.OptionalHost = setting(
        "address, name or interface of this machine to publish; unset finds one (RDMA first)", default=None
    )
    publish_host: units.OptionalHost = setting(
        "published instead of host, as it is: what trainers connect to, in front of address translation", default=None
    )
    ports: units.Ports = setting("how many ports, or a list of port numbers (0 for any free one)", default=2)
    base_port: units.OptionalCount = setting(
        "listen on the first free ports of 64 from this one on; unset takes any free ones", default=None, ge=1, le=65535
    )
    mode: Literal["process", "thread"] = setting(
        "each port a supervised process, or a thread of this one", default="process"
    )
    token: units.OptionalToken = setting(_SECRECY_IN_WORDS, default=None)
    shm_lanes: bool = setting(_SHM_LANES_IN_WORDS, default=False)
    spin_s: units.Seconds = setting(_SPIN_IN_WORDS, default=200e-6, ge=0, le=0.1)
    first_frame_timeout_s: units.Seconds = setting("a new connection that sends nothing is closed", default=5.0, gt=0)
    idle_timeout_s: units.Seconds = setting("a silent connection is closed", default=120.0, gt=0)
    send_timeout_s: units.Seconds = setting("a payload that is not received by then is abandoned", default=60.0, gt=0)
    ack_timeout_s: units.Seconds = setting("a payload not acknowledged goes back to its slot", default=10.0, gt=0)
    max_connections: units.Count = setting("connections of one port", default=256, ge=1, le=65536)
    data_ports: units.OptionalPortRange = setting(_DATA_PORTS_IN_WORDS, default=None)
    start_timeout_s: units.Seconds = setting("bound on start()", default=30.0, gt=0)
    stop_timeout_s: units.Seconds = setting("bound on stop()", default=5.0, gt=0)
    stall_timeout_s: units.Seconds = setting(
        "a port's process whose loop has not turned for so long is replaced", default=10.0, gt=0
    )
    ucx: units.UCXSettings = setting(_SETTINGS_OF_UCX, default={})

    @property
    def numbered_ports(self) -> tuple[int, ...]:
        """Their numbers, 0 for any free one."""
        return (0,) * self.ports if isinstance(self.ports, int) else self.ports

    def candidates(self, index: int) -> list[int]:
        """What one of them tries, in this order: those that start side by side begin at different ones."""
        wanted, base = self.numbered_ports[index], self.base_port
        if wanted or base is None:
            return [wanted]
        every = range(base, min(65536, base + units.MAX_PORTS))
        return [*every[index:], *every[:index]]

    def __post_init__(self) -> None:
        _check_host("host", self.host)
        _check_host("publish_host", self.publish_host)
        count, base, listening = len(self.numbered_ports), self.base_port, self.numbered_ports
        if base is not None:
            if isinstance(self.ports, tuple):
                raise _wrong("base_port", base, "ports names them already; drop one of the two")
            if base + count > 65536:
                raise _wrong("base_port", base, f"expected at most {65536 - count}: {count} ports end at 65535")
            listening = tuple(range(base, base + count))
        if self.data_ports is not None:
            first, last = self.data_ports
            value = f"{first}-{last}"
            if last - first + 1 < count:
                problem = f"expected at least ports = {count}: each listening port takes one of these too"
                raise _wrong("data_ports", value, problem)
            if clash := [port for port in listening if first <= port <= last]:
                raise _wrong("data_ports", value, f"{clash[0]} is to be listened on; choose others")


def _check_host(field: str, host: str | None) -> None:
    name, _, port = (host or "").rpartition(":")
    if port.isdecimal() and name and (":" not in name or name.endswith("]")):
        raise _wrong(field, host, f"it has a port in it: give {name!r}, and the port by ports or base_port")
    if host in ("0.0.0.0", "::", "*"):  # noqa: S104 - refused
        raise _wrong(field, host, "a wildcard, which clients cannot connect to; give an address, name or interface")


def _wrong(field: str, value: object, problem: str) -> ConfigError:
    return ConfigError(f"server.{field} = {value}: {problem}", field=field, value=value)


@section("client")
class ClientConfig(_OverUCX):
    """How a `UCXXClient` reads: in place or over UCX, how long, how often, and with how much memory."""

    local: Literal["auto", "view", "copy", "off"] = setting(
        "a ring of this host: in place ('view': tensors too; write to none), copied, or over UCX ('off')",
        default="auto",
    )
    token: units.OptionalToken = setting(_SECRECY_IN_WORDS, default=None)
    shm_lanes: bool = setting(_SHM_LANES_IN_WORDS, default=False)
    spin_s: units.Seconds = setting(_SPIN_IN_WORDS, default=200e-6, ge=0, le=0.1)
    deadline_s: units.Seconds = setting("bound on a read that names none", default=5.0, gt=0)
    connect_timeout_s: units.Seconds = setting("bound on connecting to one port", default=1.0, gt=0)
    port_quarantine_s: units.Seconds = setting("how long a port that failed is not used", default=30.0, ge=0)
    read_attempts: units.Count = setting("calls made for one read, when retrying can help", default=2, ge=1, le=100)
    pool_endpoint_max_age_s: units.Seconds = setting(
        "an idle connection is not used again; keep it below the server's idle_timeout_s", default=100.0, gt=0
    )
    max_connections: units.OptionalCount = setting(
        "connections at a time; unset follows the limit of open files", default=None, ge=1, le=65536
    )
    buffer_pool_bytes: units.Bytes = setting("receive buffers kept for reuse", default=1 << 30, ge=0)
    max_payload_bytes: units.Bytes = setting("a SlotRef that promises more is refused", default=64 << 30, ge=1)
    data_ports: units.OptionalPortRange = setting(_DATA_PORTS_IN_WORDS, default=None)
    max_attached_rings: units.Count = setting("local rings kept mapped", default=256, ge=1, le=65536)
    verify_checksum: bool = setting("check the SlotRef's checksum when it has one", default=True)
    ucx: units.UCXSettings = setting(_SETTINGS_OF_UCX, default={})


@section("store")
class StoreConfig:
    """Where the store of membership is, and how it is reached."""

    url: units.OptionalStoreURL = setting(
        "local://, local:///abs/path or etcd://host:2379,…; used where code names no store", default=None
    )
    namespace: units.Name = setting("keeps jobs that share a store apart; the same in all of a job", default="default")
    timeout_s: units.Seconds = setting("bound on one call", default=5.0, gt=0)
    user: units.OptionalText = setting("etcd: the user's name", default=None)
    password: units.OptionalToken = setting("etcd: the user's password", default=None)
    ca_file: units.OptionalText = setting("etcd: certificates to trust; turns TLS on", default=None)
    cert_file: units.OptionalText = setting("etcd: this client's certificate", default=None)
    key_file: units.OptionalText = setting("etcd: the key of cert_file", default=None)

    def __post_init__(self) -> None:
        for pair in (("cert_file", "key_file"), ("user", "password")):
            missing = [name for name in pair if getattr(self, name) is None]
            if len(missing) == 1:
                raise ConfigError(f"store.{missing[0]} is missing: set both, {' and '.join(pair)}", field=missing[0])


@section("publisher")
class PublisherConfig:
    """How a worker publishes itself, and how its lease is kept."""

    interval_s: units.Seconds = setting("how often the lease is renewed; it lives three times this", default=2.0, gt=0)
    publish_timeout_s: units.Seconds = setting("how long it tries to publish, before on_timeout", default=1800.0, gt=0)
    on_timeout: Literal["retry", "stop"] = setting("then keep trying, with errors in the log, or stop", default="retry")
    backoff_s: units.Seconds = setting("first pause between two tries; doubles, with jitter", default=0.1, gt=0)
    max_backoff_s: units.Seconds = setting("longest pause between two tries", default=5.0, gt=0)
    keeper: Literal["process", "thread"] = setting(
        "renews the lease: a process too, which no blocked interpreter starves, or a thread alone", default="process"
    )
    stop_timeout_s: units.Seconds = setting("bound on stop()", default=5.0, gt=0)

    @property
    def ttl_s(self) -> float:
        """How long a lease lives without a renewal: one may be missed, not two in a row."""
        return 3 * self.interval_s
