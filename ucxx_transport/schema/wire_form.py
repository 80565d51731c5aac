"""Forms of records: what a peer, a queue or a store hands to `from_dict` and the like.

Nothing here trusts its input: sizes are bounded before decoding, types are exact (a bool is not an int), and a value
quoted in an error is cut short first.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, NoReturn, TypeGuard

import msgpack

from ucxx_transport.errors import ConfigError, ProtocolError, article

WIRE_VERSION = 1
"""Version of the dict and msgpack forms of `Schema` and `SlotRef`, and of the payload layout they imply."""

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


def refuse(field: str, value: object, words: str) -> NoReturn:
    """Raise the ConfigError for a field that must be what `words` say."""
    raise ConfigError(f"{field} must be {words}, not {describe(value)}", field=field)


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
        raise ProtocolError(
            f"{article(what)} of format version {describe(version)}; this side reads version {WIRE_VERSION}: "
            "run the same release of ucxx_transport on both sides",
            field="version",
            version=describe(version),
        )


pack: Callable[[object], bytes] = msgpack.packb
"""Plain values as msgpack. A ValueError: a lone surrogate, or no end of nesting; an OverflowError: over 64 bits."""


def unpack(raw: object, what: str, *, max_bytes: int) -> object:
    """Decode one msgpack object of bounded size, without extension types; a ProtocolError for anything else."""
    if not isinstance(raw, (bytes, bytearray, memoryview)):
        raise ProtocolError(f"{article(what)} must be bytes, not {describe(raw)}", field=what)
    nbytes = raw.nbytes if isinstance(raw, memoryview) else len(raw)
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


def unpack_json(raw: bytes, what: str, *, max_bytes: int) -> object:
    """Decode JSON of bounded size, of the finite numbers that the standard has; a ProtocolError for anything else."""
    if len(raw) > max_bytes:
        raise ProtocolError(f"{article(what)} of {len(raw)} bytes; at most {max_bytes}", field=what, nbytes=len(raw))
    try:
        decoded: object = json.loads(raw)
    except (ValueError, RecursionError) as exc:
        raise ProtocolError(f"{article(what)} that is not JSON: {exc}", field=what) from exc
    for key, value in decoded.items() if isinstance(decoded, dict) else ((what, decoded),):
        try:
            pack_json(value)  # which refuses what Python's reader lets through
        except (ValueError, RecursionError) as exc:
            name = key if is_plain_text(key, _QUOTED_CHARS) else describe(key)
            text = f"{name} of {article(what)} has NaN or an infinity, which is no number of JSON"
            raise ProtocolError(f"{text}; send null, or leave it out", field=name) from exc
    return decoded
