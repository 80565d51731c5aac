"""SlotRef: the name of one payload and where to fetch it, small enough for any queue.

In msgpack it is an array: the version of the form, 1, then the fields in the order of the class. As a dict, for JSON,
its hashes (`ring_id`, `fingerprint`, `checksum`) are text of hex digits: in many languages a number of JSON is a
double, which keeps 53 bits. Such a JSON's 3.0 is 3 here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from operator import itemgetter
from typing import Any, Final, TypeAlias

from ucxx_transport.errors import ConfigError, ProtocolError
from ucxx_transport.schema import wire_form
from ucxx_transport.schema.wire_form import NO_META, WIRE_VERSION, checked_meta, pack, refuse
from ucxx_transport.units import MAX_PORTS

RING_ID_BYTES = 16
MAX_RING_NAME_CHARS = 200
MAX_HOST_ID_CHARS = 128
MAX_HOST_CHARS = 255
MAX_SLOT_REF_BYTES = wire_form.MAX_META_BYTES + 4096


def are_ports(ports: Any) -> bool:
    """Whether these are ports, and no more than a server may have."""
    is_list = isinstance(ports, (tuple, list)) and len(ports) <= MAX_PORTS
    return is_list and all(wire_form.is_unsigned(port, 16) and port for port in ports)


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotRef:
    """Names one payload for ever, and says where it can be fetched.

    A ConfigError names the field that is out of its bounds (`facts["field"]`). Hashed by `name`; equal when every field
    is. Pickles, and travels as `to_bytes` (≈ 200 bytes) or `to_dict` (JSON).

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
        meta: what the writer noted of the payload. The mapping is read-only and its content the reference's own copy.
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
    meta: Mapping[str, object] = field(default_factory=lambda: NO_META)

    def __post_init__(self) -> None:
        if type(self.ring_id) is not bytes or len(self.ring_id) != RING_ID_BYTES:
            refuse("ring_id", self.ring_id, f"{RING_ID_BYTES} bytes")
        name = self.ring_name
        if not wire_form.is_plain_text(name, MAX_RING_NAME_CHARS) or "/" in name or name in (".", ".."):
            refuse("ring_name", name, f"a file name of at most {MAX_RING_NAME_CHARS} printable characters")
        for name, bits in (("slot", 32), ("generation", 64), ("nbytes", 64), ("fingerprint", 64)):
            if not wire_form.is_unsigned(value := getattr(self, name), bits):
                refuse(name, value, f"an integer of {bits} bits, not negative")
        if not wire_form.is_plain_text(self.host_id, MAX_HOST_ID_CHARS):
            refuse("host_id", self.host_id, f"1 to {MAX_HOST_ID_CHARS} printable characters")
        if self.host is not None and not wire_form.is_plain_text(self.host, MAX_HOST_CHARS):
            refuse("host", self.host, f"1 to {MAX_HOST_CHARS} printable characters, or None")
        if self.checksum is not None and not wire_form.is_unsigned(self.checksum, 64):
            refuse("checksum", self.checksum, "an integer of 64 bits, not negative, or None")
        if not are_ports(self.ports):
            refuse("ports", self.ports, f"at most {MAX_PORTS} numbers from 1 to 65535")
        object.__setattr__(self, "ports", tuple(self.ports))
        if self.meta is not NO_META:
            object.__setattr__(self, "meta", checked_meta(self.meta)[0])

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
            "fingerprint": _digits(self.fingerprint),
            "checksum": None if self.checksum is None else f"{self.checksum:016x}",
            "meta": wire_form.plain(self.meta) if self.meta else {},
        }

    def to_bytes(self) -> bytes:
        """The reference as one msgpack array, in the order of the module's table."""
        named = (WIRE_VERSION, self.ring_id, self.ring_name, self.slot, self.generation, self.nbytes, self.host_id)
        meta = {} if self.meta is NO_META else dict(self.meta)
        return pack((*named, self.host, self.ports, self.fingerprint, self.checksum, meta))

    @classmethod
    def from_dict(cls, data: Any) -> SlotRef:
        """Rebuild a reference from `to_dict`'s form, which is not trusted.

        Raises:
            ProtocolError: the form is malformed or of another version; the message and `facts["field"]` name the field.
        """
        try:
            values = _values_of(data if len(data) == _FIELDS else ())
        except (KeyError, TypeError, IndexError):
            values = _values_of(wire_form.take_fields(data, "slot reference", required=_REQUIRED, optional=_DEFAULTS))
        if values[0] is not WIRE_VERSION:
            values = (*map(wire_form.whole, values[:-1]), values[-1])
        return _rebuilt(values, True)  # noqa: FBT003

    @classmethod
    def from_bytes(cls, raw: bytes | bytearray | memoryview) -> SlotRef:
        """Rebuild a reference from `to_bytes`'s form, which is not trusted.

        Raises:
            ProtocolError: the form is malformed, over 68 KiB or of another version; the message names the field.
        """
        values = wire_form.unpack(raw, "slot reference", max_bytes=MAX_SLOT_REF_BYTES)
        if type(values) is not list or len(values) != _FIELDS:
            if isinstance(values, list) and values:
                wire_form.check_version(values[0], "slot reference")
            text = f"a slot reference must be an array of {_FIELDS}, not {wire_form.describe(values)}"
            raise ProtocolError(text, field="slot reference")
        return _rebuilt(values)


# References are made and rebuilt tens of thousands of times a second, and all of a ring differ in few fields. So what
# they have in common is checked once, by the constructor, which takes 6 µs. The next one is made as a draft, which is
# not frozen.
_REQUIRED: Final = ("version", "ring_id", "ring_name", "slot", "generation", "nbytes", "host_id")
_DEFAULTS: Final = {"host": None, "ports": (), "fingerprint": f"{0:016x}", "checksum": None, "meta": NO_META}
_values_of: Final[Callable[[Any], tuple[Any, ...]]] = itemgetter(*_REQUIRED, *_DEFAULTS)
_Draft: Any = wire_form.draft_of(SlotRef)
_FIELDS: Final = 1 + len(SlotRef.__slots__)

_digits: Final = lru_cache(maxsize=1024)("{:016x}".format)

# What references to one ring have in common, checked.
Common: TypeAlias = tuple[bytes, str, str, str | None, tuple[int, ...], int]

_MOST_RINGS: Final = 1024
# Of each ring that was heard of, by its id as the form has it: what its references have in common, as the form has it
# and as it is.
_rings: dict[object, tuple[object, Common]] = {}
_UNKNOWN: Final[tuple[None, Any]] = (None, None)


def renumbered(  # noqa: PLR0917 - one is made at every write
    common: Common, slot: int, generation: int, nbytes: int, checksum: int | None, meta: Mapping[str, object] | None
) -> SlotRef:
    """A reference to a payload of a ring, by numbers and a `meta` that are checked. Cannot fail."""
    ref = _Draft()
    ref.ring_id, ref.ring_name, ref.host_id, ref.host, ref.ports, ref.fingerprint = common
    ref.slot, ref.generation, ref.nbytes = slot, generation, nbytes
    ref.checksum, ref.meta = checksum, meta or NO_META
    ref.__class__ = SlotRef
    made: SlotRef = ref
    return made


def _rebuilt(values: Sequence[Any], digits: bool = False) -> SlotRef:  # noqa: FBT001, FBT002 - a keyword takes longer
    """A reference of untrusted values in the module's order, their hashes text with `digits`; errors as `from_dict`."""
    version, ring_id, ring_name, slot, generation, nbytes, host_id, host, ports, fingerprint, checksum, meta = values
    if version is not WIRE_VERSION:
        wire_form.check_version(version, "slot reference")
    try:
        known, common = _rings.get(ring_id, _UNKNOWN)
    except TypeError:  # of no use as an id: the constructor says so
        known, common = _UNKNOWN
    try:
        if digits and checksum is not None:
            checksum = int.from_bytes(_of_digits("checksum", checksum, 8))
        if (
            known == (ring_name, host_id, host, ports, fingerprint)
            and (digits or type(fingerprint) is int)
            and type(slot) is type(generation) is type(nbytes) is int
            and not (slot >> 32 or generation >> 64 or nbytes >> 64)  # of a negative number all bits are left
            and (checksum is None or (type(checksum) is int and not checksum >> 64))
            and type(meta) is dict
        ):
            draft = _Draft()  # as `renumbered`: its call takes as long as this
            draft.ring_id, draft.ring_name, draft.host_id, draft.host, draft.ports, draft.fingerprint = common
            draft.slot, draft.generation, draft.nbytes = slot, generation, nbytes
            draft.checksum, draft.meta = checksum, checked_meta(meta)[0] if meta else NO_META
            draft.__class__ = SlotRef
            made: SlotRef = draft
            return made
        named, number = ring_id, fingerprint
        if digits:
            named = _of_digits("ring_id", ring_id, RING_ID_BYTES)
            number = int.from_bytes(_of_digits("fingerprint", fingerprint, 8))
        fields = (named, ring_name, slot, generation, nbytes, host_id, host, ports, number, checksum, meta)
        ref = SlotRef(**dict(zip(SlotRef.__slots__, fields, strict=True)))  # takes it, or names what is wrong
    except ConfigError as exc:
        raise ProtocolError(exc.message, **exc.facts) from exc
    if len(_rings) >= _MOST_RINGS:
        _rings.clear()
    common = (ref.ring_id, ref.ring_name, ref.host_id, ref.host, ref.ports, ref.fingerprint)
    _rings[ring_id] = (ring_name, host_id, host, [*ref.ports], fingerprint), common
    return ref


def _of_digits(field: str, digits: object, nbytes: int) -> bytes:
    try:
        value = bytes.fromhex(digits)  # type: ignore[arg-type]  # a TypeError then
    except (TypeError, ValueError):
        value = b""
    if value.hex() != digits or len(value) != nbytes:
        refuse(field, digits, f"text of {2 * nbytes} hex digits, as to_dict() gives it")
    return value
