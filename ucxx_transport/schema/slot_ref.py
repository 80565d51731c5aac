"""SlotRef: the name of one payload and where to fetch it, small enough for any queue.

| field       | msgpack array index | bounds                                                            |
|-------------|---------------------|-------------------------------------------------------------------|
| version     | 0                   | 1                                                                 |
| ring_id     | 1                   | 16 bytes (32 hex digits in a dict)                                |
| ring_name   | 2                   | 1-200 printable characters, no "/", not "." or ".."               |
| slot        | 3                   | u32                                                               |
| generation  | 4                   | u64                                                               |
| nbytes      | 5                   | u64                                                               |
| host_id     | 6                   | 1-128 printable characters                                        |
| host        | 7                   | nil, or 1-255 printable characters                                |
| ports       | 8                   | at most 64, each 1-65535                                          |
| fingerprint | 9                   | u64, 0 for a raw ring                                             |
| checksum    | 10                  | nil, or u64                                                       |
| meta        | 11                  | 64 KiB of msgpack, 16 deep: nil, bool, finite numbers, text, lists, maps |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import isfinite
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, NoReturn

import numpy as np

from ucxx_transport.errors import ConfigError, ProtocolError
from ucxx_transport.schema.wire_form import (
    WIRE_VERSION,
    check_version,
    describe,
    is_plain_text,
    is_unsigned,
    pack,
    take_fields,
    unpack,
)

if TYPE_CHECKING:
    from typing_extensions import Buffer

RING_ID_BYTES = 16
MAX_RING_NAME_CHARS = 200
MAX_HOST_ID_CHARS = 128
MAX_HOST_CHARS = 255
MAX_PORTS = 64
MAX_META_BYTES = 64 << 10
MAX_META_DEPTH = 16
MAX_SLOT_REF_BYTES = MAX_META_BYTES + 4096

_REQUIRED = ("version", "ring_id", "ring_name", "slot", "generation", "nbytes", "host_id")
_OPTIONAL = ("host", "ports", "fingerprint", "checksum", "meta")
_IN_BYTES = (*_REQUIRED, *_OPTIONAL)
_NO_META: Mapping[str, object] = MappingProxyType({})
_DEFAULTS = (None, (), 0, None, _NO_META)


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotRef:
    """Names one payload for ever, and says where it can be fetched.

    Hashed by `name`; equal when every field is. Pickles, and travels as `to_bytes` (≈ 200 bytes) or `to_dict` (JSON).

    Attributes:
        ring_id: the ring's random id, new for every created segment.
        ring_name: the segment's name on its own host.
        slot: the slot's index.
        generation: which write to that slot.
        nbytes: bytes of the payload.
        host_id: which machine and namespace the segment is on; equal to the reader's own means: read it in place.
        host: address of the ring's server, None as long as there is none.
        ports: its ports.
        fingerprint: the schema's, 0 for a raw ring.
        checksum: xxh3_64 of the payload, None when the ring takes none.
        meta: what the writer said about the payload. The mapping is read-only and its content the reference's own copy.
    """

    ring_id: bytes
    ring_name: str
    slot: int
    generation: int
    nbytes: int
    host_id: str
    host: str | None = None
    ports: tuple[int, ...] = ()
    fingerprint: int = 0
    checksum: int | None = None
    meta: Mapping[str, object] = field(default_factory=lambda: _NO_META)

    def __post_init__(self) -> None:
        """Check every field against its bounds.

        Raises:
            ConfigError: one is out of them; `facts["field"]` names it.
        """
        if type(self.ring_id) is not bytes or len(self.ring_id) != RING_ID_BYTES:
            _refuse("ring_id", self.ring_id, f"{RING_ID_BYTES} bytes")
        if (
            not is_plain_text(self.ring_name, MAX_RING_NAME_CHARS)
            or "/" in self.ring_name
            or self.ring_name in (".", "..")
        ):
            _refuse("ring_name", self.ring_name, f"a file name of at most {MAX_RING_NAME_CHARS} printable characters")
        if not is_unsigned(self.slot, 32):
            _refuse("slot", self.slot, "an integer of 32 bits, not negative")
        for name in ("generation", "nbytes", "fingerprint"):
            if not is_unsigned(value := getattr(self, name), 64):
                _refuse(name, value, "an integer of 64 bits, not negative")
        if not is_plain_text(self.host_id, MAX_HOST_ID_CHARS):
            _refuse("host_id", self.host_id, f"1 to {MAX_HOST_ID_CHARS} printable characters")
        if self.host is not None and not is_plain_text(self.host, MAX_HOST_CHARS):
            _refuse("host", self.host, f"1 to {MAX_HOST_CHARS} printable characters, or None")
        if self.checksum is not None and not is_unsigned(self.checksum, 64):
            _refuse("checksum", self.checksum, "an integer of 64 bits, not negative, or None")
        object.__setattr__(self, "ports", _checked_ports(self.ports))
        object.__setattr__(self, "meta", _checked_meta(self.meta))

    @property
    def name(self) -> tuple[bytes, int, int]:
        """(ring_id, slot, generation): two references with this in common name the same payload."""
        return (self.ring_id, self.slot, self.generation)

    def __hash__(self) -> int:
        """By name: `meta` need not be hashable."""
        return hash((self.ring_id, self.slot, self.generation))

    def __reduce__(self) -> tuple[object, ...]:
        """Pickled as its msgpack form, which is smaller than the default and checked on arrival."""
        return (SlotRef.from_bytes, (self.to_bytes(),))

    def to_dict(self) -> dict[str, object]:
        """The reference as plain JSON- and msgpack-safe values."""
        return {
            "version": WIRE_VERSION,
            "ring_id": self.ring_id.hex(),
            "ring_name": self.ring_name,
            "slot": self.slot,
            "generation": self.generation,
            "nbytes": self.nbytes,
            "host_id": self.host_id,
            "host": self.host,
            "ports": list(self.ports),
            "fingerprint": self.fingerprint,
            "checksum": self.checksum,
            "meta": _plain(self.meta, 0) if self.meta else {},
        }

    def to_bytes(self) -> bytes:
        """The reference as one msgpack array, in the order of the module's table."""
        return pack(
            (
                *(WIRE_VERSION, self.ring_id, self.ring_name, self.slot, self.generation, self.nbytes, self.host_id),
                *(self.host, self.ports, self.fingerprint, self.checksum, dict(self.meta) if self.meta else {}),
            )
        )

    @classmethod
    def from_dict(cls, data: object) -> SlotRef:
        """Rebuild a reference from `to_dict`'s form, which is not trusted.

        Raises:
            ProtocolError: the form is malformed or of another version; the message and `facts["field"]` name the field.
        """
        if type(data) is dict and tuple(data) == _IN_BYTES:  # as `to_dict` makes it
            values = list(data.values())
        else:
            form = take_fields(data, "slot reference", required=_REQUIRED, optional=_OPTIONAL)
            values = [form[key] for key in _REQUIRED]
            values += [form.get(key, default) for key, default in zip(_OPTIONAL, _DEFAULTS, strict=True)]
        check_version(values[0], "slot reference")
        text = values[1]
        try:
            ring_id = bytes.fromhex(text)
        except (TypeError, ValueError):
            ring_id = b""
        if len(ring_id) != RING_ID_BYTES or ring_id.hex() != text:
            raise ProtocolError(
                f"ring_id must be {2 * RING_ID_BYTES} hex digits, not {describe(text)}", field="ring_id"
            )
        values[1] = ring_id
        return _rebuilt(values)

    @classmethod
    def from_bytes(cls, raw: Buffer) -> SlotRef:
        """Rebuild a reference from `to_bytes`'s form, which is not trusted.

        Raises:
            ProtocolError: the form is malformed, too long or of another version; the message names the field.
        """
        values = unpack(raw, "slot reference", max_bytes=MAX_SLOT_REF_BYTES)
        if not isinstance(values, list) or not values:
            raise ProtocolError(f"a slot reference must be an array, not {describe(values)}", field="slot reference")
        if type(values[0]) is not int or values[0] != WIRE_VERSION:
            check_version(values[0], "slot reference")
        if len(values) != len(_IN_BYTES):
            raise ProtocolError(
                f"a slot reference of {len(values)} values, not {len(_IN_BYTES)}", field="slot reference"
            )
        return _rebuilt(values)


# References are made and rebuilt tens of thousands of times a second, and all of a ring differ in few fields. So what
# they have in common is checked once, in a template, and a reference is one of its copies, made by the members: the
# constructor takes 6 µs.
_new: Final = object.__new__
_puts: tuple[Callable[[SlotRef, object], None], ...] = tuple(getattr(SlotRef, name).__set__ for name in _IN_BYTES[1:])
_put_ring_id, _put_ring_name, _put_slot, _put_generation, _put_nbytes, _put_host_id = _puts[:6]
_put_host, _put_ports, _put_fingerprint, _put_checksum, _put_meta = _puts[6:]

_MAX_U32: Final = (1 << 32) - 1
_MAX_U64: Final = (1 << 64) - 1


def renumbered(template: SlotRef, slot: int, generation: int, nbytes: int, checksum: int | None) -> SlotRef:
    """A reference to another payload of the same ring, by numbers that were checked before. Cannot fail."""
    ref = _new(SlotRef)
    _put_ring_id(ref, template.ring_id)
    _put_ring_name(ref, template.ring_name)
    _put_slot(ref, slot)
    _put_generation(ref, generation)
    _put_nbytes(ref, nbytes)
    _put_host_id(ref, template.host_id)
    _put_host(ref, template.host)
    _put_ports(ref, template.ports)
    _put_fingerprint(ref, template.fingerprint)
    _put_checksum(ref, checksum)
    _put_meta(ref, template.meta)
    return ref


@lru_cache(maxsize=1024, typed=True)
def _template(ring_id: bytes, ring_name: str, host_id: str, host: str | None, fingerprint: int, *ports: int) -> SlotRef:
    """A reference with these, checked."""
    return SlotRef(
        ring_id=ring_id,
        ring_name=ring_name,
        slot=0,
        generation=0,
        nbytes=0,
        host_id=host_id,
        host=host,
        ports=ports,
        fingerprint=fingerprint,
    )


def _rebuilt(values: Sequence[Any]) -> SlotRef:
    """A reference of a form's values, in the module's order, all but the version untrusted; errors as `from_dict`."""
    _, ring_id, ring_name, slot, generation, nbytes, host_id, host, ports, fingerprint, checksum, meta = values
    try:
        if (
            type(slot) is int
            and 0 <= slot <= _MAX_U32
            and type(generation) is int
            and 0 <= generation <= _MAX_U64
            and type(nbytes) is int
            and 0 <= nbytes <= _MAX_U64
            and (checksum is None or (type(checksum) is int and 0 <= checksum <= _MAX_U64))
            and (type(ports) is list or type(ports) is tuple)
        ):
            try:
                template = _template(ring_id, ring_name, host_id, host, fingerprint, *ports)
            except TypeError:
                pass  # a value that has no hash, and is refused below
            else:
                ref = renumbered(template, slot, generation, nbytes, checksum)
                if meta or type(meta) is not dict:
                    _put_meta(ref, _checked_meta(meta))
                return ref
        return SlotRef(**dict(zip(_IN_BYTES[1:], values[1:], strict=True)))  # names the field that is wrong
    except ConfigError as exc:
        raise ProtocolError(exc.message, **exc.facts) from exc


def _refuse(name: str, value: object, expected: str) -> NoReturn:
    raise ConfigError(f"{name} must be {expected}, not {describe(value)}", field=name)


def _checked_ports(ports: object) -> tuple[int, ...]:
    if not isinstance(ports, (tuple, list)) or len(ports) > MAX_PORTS:
        _refuse("ports", ports, f"at most {MAX_PORTS} port numbers")
    for port in ports:
        if not is_unsigned(port, 16) or port == 0:
            _refuse("ports", port, "numbers from 1 to 65535")
    return tuple(ports)


def _checked_meta(meta: object) -> Mapping[str, object]:
    if not isinstance(meta, Mapping):
        _refuse("meta", meta, "a mapping")
    if not meta:
        return _NO_META
    plain = _plain(meta, 0)
    try:
        nbytes = len(pack(plain))
    except (ValueError, OverflowError) as exc:  # a lone surrogate in text; an integer of more than 64 bits
        raise ConfigError(f"meta cannot be written as msgpack: {exc}", field="meta") from exc
    if nbytes > MAX_META_BYTES:
        raise ConfigError(
            f"meta takes {nbytes} bytes; at most {MAX_META_BYTES}: make what is large a field of the payload",
            field="meta",
            nbytes=nbytes,
        )
    return MappingProxyType(plain)  # type: ignore[arg-type]  # a Mapping's plain form is a dict


def _plain(value: object, depth: int) -> object:
    """A copy of `value` in types that both JSON and msgpack have."""
    if depth > MAX_META_DEPTH:
        raise ConfigError(f"meta is deeper than {MAX_META_DEPTH}", field="meta")
    if isinstance(value, np.generic):  # rewards.mean() and the like
        value = value.item()
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        if not isfinite(value):
            _refuse("meta", value, "made of finite numbers (JSON has no others; use None)")
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(item, depth + 1) for item in value]
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                _refuse("meta", key, "keyed by text")
        return {key: _plain(item, depth + 1) for key, item in value.items()}
    _refuse("meta", value, "made of None, bools, numbers, text, lists and mappings")
