"""Plain values: what JSON and msgpack have in common, None, bools, finite numbers, text, lists, maps keyed by text.

Of these are the forms of records that a peer, a queue or a store hands to `from_dict` and the like. Nothing here trusts
its input: sizes are bounded before decoding, types are exact (a bool is not an int), and a value quoted in an error is
cut short first.

So is what a writer says of a payload: `meta`, in its reference, and the *envelope*, beside the payload itself, msgpack
of at most 1 KiB, so that a reader of a slot knows what it holds without another channel. An envelope is the payload's
`meta`, or, where a rollout worker wrote it, its record: `EpisodeRecord.to_dict()` with the reference's `meta`, or nil,
in place of the reference.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from math import isfinite
from types import MappingProxyType
from typing import Any, Final, NoReturn, TypeGuard

import msgpack
import numpy as np

from ucxx_transport.errors import ConfigError, ProtocolError, article

WIRE_VERSION = 1  # of the dict and msgpack forms of `Schema` and `SlotRef`, and of the payload layout they imply
MAX_ENVELOPE_BYTES: Final = 1024
MAX_META_BYTES: Final = 64 << 10
MAX_META_DEPTH: Final = 16
MARK: Final = "ucxx_transport"  # the key by which a record is known among other mappings
NO_META: Final[Mapping[str, object]] = MappingProxyType({})
_LARGEST_WHOLE = 1 << 53
_QUOTED_CHARS = 80
_QUOTED_INT_BITS = 256


def describe(value: object) -> str:
    """Words for an untrusted value in an error: short whatever its size, and never failing.

    >>> describe("slot"), describe(True), describe(1 << 5000), describe([1, 2])
    ("'slot'", 'True', 'an integer of 5001 bits', 'a list of 2')
    """
    if isinstance(value, int) and abs(value).bit_length() > _QUOTED_INT_BITS:
        return f"an integer of {value.bit_length()} bits"
    if value is None or type(value) in (bool, int, float):
        return repr(value)
    if isinstance(value, (str, bytes)):
        return repr(value) if len(value) <= _QUOTED_CHARS else f"{value[:_QUOTED_CHARS]!r}… ({len(value)} long)"
    name = article(type(value).__name__)
    return f"{name} of {len(value)}" if isinstance(value, (list, tuple, dict)) else name


def misfit(field: str, text: str, **facts: object) -> ConfigError:
    """The error for a field of a payload, named as the caller named it, that is not as it must be."""
    return ConfigError(f"field {field!r}: {text}", field=field, **facts)


def is_unsigned(value: object, bits: int) -> TypeGuard[int]:
    """Whether `value` is an int (and not a bool) of at most `bits` bits, not negative."""
    return type(value) is int and 0 <= value < 1 << bits


def is_plain_text(value: object, max_chars: int) -> TypeGuard[str]:
    """Whether `value` is 1 to `max_chars` printable characters: no control characters, no lone surrogates."""
    return isinstance(value, str) and 0 < len(value) <= max_chars and value.isprintable()


def refuse(field: str, value: object, words: str, /, **facts: object) -> NoReturn:
    """Raise the ConfigError for a field that must be what `words` say."""
    raise ConfigError(f"{field} must be {words}, not {describe(value)}", field=field, **facts)


@contextmanager
def untrusted() -> Iterator[None]:
    """A ConfigError of what is checked here is a ProtocolError: it came from outside."""
    try:
        yield
    except ConfigError as exc:
        raise ProtocolError(exc.message, **exc.facts) from exc


def take_fields(
    data: object, what: str, *, required: Collection[str], optional: Mapping[str, object] = MappingProxyType({})
) -> Mapping[str, Any]:
    """`data`, called `what` in errors, as a mapping of exactly these keys; a ProtocolError that names a wrong one."""
    if not isinstance(data, Mapping):
        raise ProtocolError(f"{article(what)} must be a mapping, not {describe(data)}", field=what)
    for key in required:
        if key not in data:
            raise ProtocolError(f"{article(what)} without the field {key!r}", field=key)
    for key in data:
        if not isinstance(key, str) or (key not in required and key not in optional):
            raise ProtocolError(f"{article(what)} with the unknown field {describe(key)}", field=describe(key))
    return {**optional, **data}


def whole(value: object) -> object:
    """The same with an int for each float that is one: of a JSON whose numbers are all doubles."""
    if isinstance(value, list):
        return [whole(item) for item in value]
    return int(value) if type(value) is float and value.is_integer() and abs(value) < _LARGEST_WHOLE else value


def draft_of(frozen: type) -> type:
    """A class of the same slots, not frozen: an instance is filled, then made one of `frozen` without its checks."""
    return type(f"_{frozen.__name__}Draft", (), {"__slots__": frozen.__slots__})  # type: ignore[attr-defined]


def check_version(version: object, what: str) -> None:
    """Refuse, by a ProtocolError, a form that was written by another version of its format."""
    if type(version) is not int or version != WIRE_VERSION:
        found, remedy = describe(version), "run the same release of ucxx_transport on both sides"
        text = f"{article(what)} of format version {found}; this side reads version {WIRE_VERSION}: {remedy}"
        raise ProtocolError(text, field="version", version=found)


pack: Callable[[object], bytes] = msgpack.packb
"""Plain values as msgpack. A ValueError: a lone surrogate, or no end of nesting; an OverflowError: over 64 bits."""


def unpack(raw: Any, what: str, *, max_bytes: int) -> object:
    """Decode one msgpack object of bounded size, without extension types; a ProtocolError for anything else."""
    is_bytes = type(raw) is bytes
    if not is_bytes and not isinstance(raw, (bytes, bytearray, memoryview)):
        raise ProtocolError(f"{article(what)} must be bytes, not {describe(raw)}", field=what)
    nbytes = len(raw) if is_bytes else memoryview(raw).nbytes
    if nbytes > max_bytes:
        raise ProtocolError(f"{article(what)} of {nbytes} bytes; at most {max_bytes}", field=what, nbytes=nbytes)
    try:
        decoded: object = msgpack.unpackb(raw, ext_hook=_refuse_extension)
    except (ValueError, TypeError, OverflowError) as exc:
        raise ProtocolError(f"{article(what)} that is not msgpack: {type(exc).__name__}", field=what) from exc
    return decoded


def _refuse_extension(code: int, _data: bytes) -> object:
    raise ValueError(f"msgpack extension type {code}")


def pack_json(form: object) -> bytes:
    """Encode plain values as JSON, as short as it can be. A TypeError or ValueError: JSON has no such value."""
    return json.dumps(form, allow_nan=False, separators=(",", ":")).encode()


def take_json(raw: bytes, what: str, *, required: Collection[str], max_bytes: int) -> dict[str, Any]:
    """The fields of a JSON record of this format's version, NaN and infinities too; a ProtocolError for all else."""
    if len(raw) > max_bytes:
        raise ProtocolError(f"{article(what)} of {len(raw)} bytes; at most {max_bytes}", field=what, nbytes=len(raw))
    try:
        decoded: object = json.loads(raw)
    except (ValueError, RecursionError) as exc:
        raise ProtocolError(f"{article(what)} that is not JSON: {exc}", field=what) from exc
    form = dict(take_fields(decoded, what, required=("version", *required)))
    check_version(form.pop("version"), what)
    return form


def record_and_meta(raw: bytes | memoryview) -> tuple[dict[str, object] | None, Mapping[str, object]]:
    """What an envelope says, None for an empty one, and the read-only `meta` of its reference, or a ProtocolError."""
    if not raw:
        return None, NO_META
    form = unpack(raw, "envelope", max_bytes=MAX_ENVELOPE_BYTES)
    if not isinstance(form, dict):
        raise ProtocolError(f"an envelope must be a mapping, not {describe(form)}", field="envelope")
    with untrusted():
        record: dict[str, object] = plain(form)
    meta = form["ref"] if MARK in form and "ref" in form else form  # which nothing else refers to
    if meta is not None and not isinstance(meta, Mapping):
        raise ProtocolError(f"a record's envelope has {describe(meta)} for its meta", field="meta")
    return record, MappingProxyType(meta) if meta else NO_META


def checked_meta(meta: object, field: str = "meta") -> tuple[Mapping[str, object], bytes]:
    """A read-only copy of `meta`, and its msgpack form; a ConfigError: no mapping, not plain, or too large."""
    if not isinstance(meta, (dict, Mapping)):  # a dict first: an ABC's look takes longer
        refuse(field, meta, "a mapping")
    if not meta:
        return NO_META, b""
    copy: dict[str, object] = plain(meta, path=field)
    try:
        packed = pack(copy)
    except (ValueError, OverflowError) as exc:  # a lone surrogate in text; an integer of more than 64 bits
        raise ConfigError(f"meta must be what msgpack can hold: {exc}", field="meta") from exc
    if len(packed) > MAX_META_BYTES:
        text = f"meta takes {len(packed)} bytes; at most {MAX_META_BYTES}: make what is large a field of the payload"
        raise ConfigError(text, field="meta", nbytes=len(packed))
    return MappingProxyType(copy), packed


_AS_THEY_ARE: Final = frozenset({type(None), bool, int, str})


def finite_meta(meta: object) -> Any:
    """The same with None in the place of each NaN and infinity; what is not plain is left to `checked_meta`."""
    if isinstance(meta, (dict, Mapping)):
        return {key: finite_meta(item) for key, item in meta.items()}
    if isinstance(meta, (list, tuple)):
        return [finite_meta(item) for item in meta]
    return None if isinstance(meta, (float, np.floating)) and not isfinite(meta) else meta


def plain(value: Any, depth: int = 0, path: str = "meta") -> Any:
    """A copy of `value` in types that both JSON and msgpack have; a ConfigError, with its path, where there is none."""
    if type(value) in _AS_THEY_ARE or (type(value) is float and isfinite(value)):
        return value
    if depth > MAX_META_DEPTH:
        raise ConfigError(f"meta must be at most {MAX_META_DEPTH} levels deep", field="meta")
    if isinstance(value, np.generic):  # rewards.mean() and the like
        value = value.item()
    if isinstance(value, (dict, Mapping)):
        copy = {}
        for key, item in value.items():
            if not isinstance(key, str):
                raise ConfigError(f"{path} must be keyed by text, not {describe(key)}", field="meta")
            simple = type(item) in _AS_THEY_ARE
            copy[key] = item if simple else plain(item, depth + 1, f"{path}[{describe(key)}]")
        return copy
    if isinstance(value, (list, tuple)):
        return [plain(item, depth + 1, path) for item in value]
    if isinstance(value, float) and not isfinite(value):
        remedy = "give None, as a TrajectoryWriter does in the meta of an episode by nonfinite_meta='none'"
        raise ConfigError(f"{path} must be a finite number, not {value} (JSON has no others): {remedy}", field="meta")
    if not isinstance(value, (int, float, str)):
        plain_types = "None, bools, numbers, text, lists and mappings (of an array: .tolist())"
        raise ConfigError(f"{path} must be made of {plain_types}, not {describe(value)}", field="meta")
    return value
