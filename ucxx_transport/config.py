"""Frozen settings of the ring, the server and the client, validated where they are made.

Each is built from keyword arguments over `UCXX_TRANSPORT_*` over `./ucxx_transport.toml` (see `settings_sources`). Sizes may
be text such as `"512MiB"`, durations such as `"250ms"` (see `units`). What is wrong is a `ConfigError` that names the field,
the value, where it came from, and what would be right. `dataclasses.replace` makes a changed copy, validated again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Annotated, Any, Final, Literal, Protocol, TypeVar, cast, dataclass_transform, runtime_checkable

from pydantic import BeforeValidator, ConfigDict, Field, SecretBytes, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass

from ucxx_transport.errors import ConfigError
from ucxx_transport.settings_sources import SectionValues, gather, unknown_name
from ucxx_transport.units import parse_bytes, parse_duration

__all__ = ["ClientConfig", "PayloadSchema", "RingConfig", "ServerConfig"]

MAX_SLOTS: Final = 65536
MAX_READERS: Final = 64
MAX_PORTS: Final = 64
"""As many ports as a segment's published address holds."""


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


def _token(value: object) -> object:
    if isinstance(value, str):
        value = value.encode()
    if isinstance(value, bytes) and not value:
        raise ValueError("an empty token protects nothing; leave the setting out to run without one")
    return value


def _whole(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("expected a whole number")
    return value


def _ports(value: object) -> object:
    if isinstance(value, str):
        words = [word.strip() for word in value.strip().strip("[]").split(",")]
        value = int(words[0]) if len(words) == 1 and "[" not in value else [int(word) for word in words]
    if isinstance(value, bool):
        raise ValueError("expected a number of ports, or a list of port numbers")
    if isinstance(value, int) and not 1 <= value <= MAX_PORTS:
        raise ValueError(f"expected 1 to {MAX_PORTS} ports; a port number goes in a list: [{value}]")
    if isinstance(value, Sequence):
        _check_port_list(value)
        return tuple(value)
    return value


def _check_port_list(ports: Sequence[object]) -> None:
    if not 1 <= len(ports) <= MAX_PORTS:
        raise ValueError(f"expected 1 to {MAX_PORTS} port numbers")
    for port in ports:
        if isinstance(port, bool) or not isinstance(port, int) or not 0 <= port <= 65535:
            raise ValueError(f"{port!r} is not a port number (0 to 65535, 0 for any free one)")
    named = [port for port in ports if port]
    if len(named) != len(set(named)):
        raise ValueError("a port number stands there twice")


def _ucx_settings(value: object) -> object:
    if not isinstance(value, Mapping):
        return value
    words = {True: "y", False: "n"}
    return {
        str(key).upper().removeprefix("UCX_"): words[setting] if isinstance(setting, bool) else str(setting)
        for key, setting in value.items()
    }


Count = Annotated[int, BeforeValidator(_whole)]
Bytes = Annotated[int, BeforeValidator(parse_bytes)]
Seconds = Annotated[float, BeforeValidator(parse_duration)]
Token = Annotated[SecretBytes, BeforeValidator(_token)]
Ports = Annotated[int | tuple[int, ...], BeforeValidator(_ports)]
UCXSettings = Annotated[Mapping[str, str], BeforeValidator(_ucx_settings)]

_SETTINGS_OF_UCX = (
    "further settings of UCX, without the `UCX_`, e.g. {'TLS': 'tcp'}; what stands in the environment wins"
)
_TOKEN_IN_WORDS = "shared secret of all workers and trainers; without one every peer is served"  # noqa: S105 - it is the description
_SHM_LANES_IN_WORDS = "let UCX use shared memory between processes of one host; both sides must agree"
_SPIN_IN_WORDS = "how long a waiting loop polls before it blocks; 0 saves CPU and costs about 50 µs a read"

_KNOWN: dict[str, frozenset[str]] = {}
_NOT_IN_TEXT: Final = frozenset({"schema"})
_MAPPINGS: Final = frozenset({"ucx"})

SectionT = TypeVar("SectionT")


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(Field,))
def _section(name: str) -> Callable[[type[SectionT]], type[SectionT]]:
    """Make a class a section of the settings: a frozen pydantic dataclass whose defaults are the other two sources."""

    def decorate(cls: type[SectionT]) -> type[SectionT]:
        rules = ConfigDict(extra="forbid", arbitrary_types_allowed=True, allow_inf_nan=False)
        made = pydantic_dataclass(frozen=True, kw_only=True, slots=True, config=rules)(cls)
        own = frozenset(field.name for field in fields(made))
        _KNOWN[name] = own - _NOT_IN_TEXT
        validate = made.__init__

        @functools.wraps(validate)
        def initialise(self: SectionT, **arguments: object) -> None:
            for argument in arguments:
                if argument not in own:
                    raise unknown_name(f"setting of {made.__name__}", argument, own)
            found = gather(name, arguments, known=_KNOWN, mappings=_MAPPINGS)
            try:
                validate(self, **_one_payload_kind(found.values, arguments))
            except ValidationError as error:
                raise _as_config_error(name, error, found) from None
            check = getattr(self, "_check", None)
            if check is not None:
                check()

        # `setattr`: assigning `__init__` on a type is what decorating a class means, but mypy refuses the plain form.
        setattr(made, "__init__", initialise)  # noqa: B010 - see above
        return cast("type[SectionT]", made)

    return decorate


def _one_payload_kind(values: Mapping[str, object], arguments: Mapping[str, object]) -> dict[str, object]:
    """`schema` and `slot_bytes` are one choice: made in code, it replaces what the weaker sources chose."""
    merged = dict(values)
    if arguments.get("schema") is not None and "slot_bytes" not in arguments:
        merged.pop("slot_bytes", None)
    return merged


def _as_config_error(section: str, error: ValidationError, found: SectionValues) -> ConfigError:
    lines: list[str] = []
    facts: dict[str, object] = {}
    for detail in error.errors(include_url=False, include_context=False):
        field = str(detail["loc"][0]) if detail["loc"] else section
        value = "(hidden)" if field == "token" else repr(found.values.get(field, detail.get("input")))
        origin = found.origins.get(field, "keyword argument")
        problem = detail["msg"].removeprefix("Value error, ").removeprefix("Input ")
        line = f"{section}.{field} = {value} ({origin}): {problem}"
        if line not in lines:
            lines.append(line)
        facts = facts or {"field": field, "value": value, "source": origin}
    return ConfigError("; ".join(lines), **facts)


def _refuse(section: str, field: str, value: object, problem: str) -> ConfigError:
    return ConfigError(f"{section}.{field} = {value!r}: {problem}", field=field, value=value)


@_section("ring")
class RingConfig:
    """How a `SharedRingBuffer` is made: exactly one of `schema` and `slot_bytes` says what a slot holds."""

    slots: Count = Field(default=64, ge=1, le=MAX_SLOTS, description="number of slots")
    schema: PayloadSchema | None = Field(default=None, description="the fields of every payload (a Schema)")
    slot_bytes: Bytes | None = Field(default=None, ge=1, le=1 << 46, description="largest raw payload of a slot")
    name: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$",
        description="name of the segment; unset makes a random one",
    )
    on_full: Literal["overwrite", "block", "raise"] = Field(
        default="overwrite",
        description="when no slot is free: drop the oldest unread payload, wait, or raise RingFullError",
    )
    readers: Count = Field(default=1, ge=1, le=MAX_READERS, description="reads that free a payload")
    prefault: bool = Field(default=True, description="touch all pages at creation, so that the first lap is fast too")
    checksum: bool = Field(default=False, description="xxh3_64 of every payload, carried by its SlotRef")
    block_timeout_s: Seconds = Field(default=30.0, gt=0, description="on_full='block': how long a write waits at most")
    lock_timeout_s: Seconds = Field(default=5.0, gt=0, description="how long the header's lock is waited for at most")

    def _check(self) -> None:
        if (self.schema is None) == (self.slot_bytes is None):
            given = "neither" if self.schema is None else "both"
            raise ConfigError(
                f"A ring needs exactly one of ring.schema and ring.slot_bytes, got {given}: pass schema=Schema([...]) for "
                "named arrays or slot_bytes='1MiB' for raw bytes",
                field="slot_bytes",
            )


@_section("server")
class ServerConfig:
    """How a `UCXXServer` listens, and what it allows a peer."""

    host: str | None = Field(
        default=None,
        min_length=1,
        max_length=255,
        description="address to publish; unset finds one (RDMA interface first)",
    )
    ports: Ports = Field(default=4, description="how many ports, or a list of port numbers (0 for any free one)")
    base_port: Count | None = Field(
        default=None, ge=1, le=65535, description="first port to try; unset takes any free ones"
    )
    mode: Literal["process", "thread"] = Field(
        default="process", description="a supervised process of its own, or threads of this one"
    )
    token: Token | None = Field(default=None, description=_TOKEN_IN_WORDS)
    shm_lanes: bool = Field(default=False, description=_SHM_LANES_IN_WORDS)
    spin_s: Seconds = Field(default=50e-6, ge=0, le=0.1, description=_SPIN_IN_WORDS)
    first_frame_timeout_s: Seconds = Field(
        default=5.0, gt=0, description="a new connection that says nothing is closed"
    )
    idle_timeout_s: Seconds = Field(default=120.0, gt=0, description="a silent connection is closed")
    send_timeout_s: Seconds = Field(default=60.0, gt=0, description="a payload that does not move is given up")
    ack_timeout_s: Seconds = Field(default=10.0, gt=0, description="a payload not acknowledged goes back to its slot")
    max_connections: Count = Field(default=256, ge=1, le=65536, description="connections of one port")
    port_attempts: Count = Field(default=64, ge=1, le=65535, description="ports tried from base_port on")
    start_timeout_s: Seconds = Field(default=30.0, gt=0, description="bound on start()")
    stop_timeout_s: Seconds = Field(default=5.0, gt=0, description="bound on stop()")
    ucx: UCXSettings = Field(default_factory=dict, description=_SETTINGS_OF_UCX)

    @property
    def token_bytes(self) -> bytes | None:
        """The shared secret itself, or None."""
        return None if self.token is None else self.token.get_secret_value()

    def _check(self) -> None:
        if self.base_port is None:
            return
        if not isinstance(self.ports, int):
            raise _refuse("server", "base_port", self.base_port, "ports names them already; drop one of the two")
        if self.port_attempts < self.ports:
            raise _refuse("server", "port_attempts", self.port_attempts, f"must be at least ports = {self.ports}")
        if self.base_port + self.ports > 65536:
            raise _refuse("server", "base_port", self.base_port, f"{self.ports} ports from there on pass 65535")


@_section("client")
class ClientConfig:
    """How a `UCXXClient` reads: in place or over UCX, how long, how often, and with how much memory."""

    local: Literal["auto", "view", "copy", "off"] = Field(
        default="auto", description="a ring of this host: read in place, copied, or over UCX like any other ('off')"
    )
    token: Token | None = Field(default=None, description=_TOKEN_IN_WORDS)
    shm_lanes: bool = Field(default=False, description=_SHM_LANES_IN_WORDS)
    spin_s: Seconds = Field(default=50e-6, ge=0, le=0.1, description=_SPIN_IN_WORDS)
    deadline_s: Seconds = Field(default=5.0, gt=0, description="bound on a read that names none")
    connect_timeout_s: Seconds = Field(default=1.0, gt=0, description="bound on connecting to one port")
    port_quarantine_s: Seconds = Field(default=30.0, ge=0, description="how long a port that failed is left alone")
    read_attempts: Count = Field(default=2, ge=1, le=100, description="calls made for one read, when retrying can help")
    pool_endpoint_max_age_s: Seconds = Field(
        default=100.0,
        gt=0,
        description="an idle connection is not used again; keep it below the server's idle_timeout_s",
    )
    max_pooled_endpoints: Count = Field(
        default=4, ge=0, le=1024, description="idle connections kept for one address and port"
    )
    max_concurrent_reads: Count = Field(default=4, ge=1, le=4096, description="reads in flight")
    buffer_pool_bytes: Bytes = Field(default=1 << 30, ge=0, description="receive buffers kept for reuse")
    max_payload_bytes: Bytes = Field(default=64 << 30, ge=1, description="a SlotRef that promises more is refused")
    max_attached_rings: Count = Field(default=256, ge=1, le=65536, description="local rings kept mapped")
    verify_checksum: bool = Field(default=True, description="check the SlotRef's checksum when it has one")
    ucx: UCXSettings = Field(default_factory=dict, description=_SETTINGS_OF_UCX)

    @property
    def token_bytes(self) -> bytes | None:
        """The shared secret itself, or None."""
        return None if self.token is None else self.token.get_secret_value()
