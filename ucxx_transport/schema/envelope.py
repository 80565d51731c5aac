"""What a writer says of a payload: `meta`, in its reference, and the *envelope*, beside the payload itself.

An envelope is msgpack of at most 1 KiB, so that a reader of a slot knows what it holds without another channel. It is
the payload's `meta`, or, where a rollout worker wrote it, the payload's record: `EpisodeRecord.to_dict()` with the
reference's `meta`, or nil, in place of the reference.

Both are made of what JSON and msgpack have in common: None, bools, finite numbers, text, lists, maps keyed by text.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from ucxx_transport.errors import ConfigError, ProtocolError
from ucxx_transport.schema.wire_form import describe, pack, refuse, unpack

if TYPE_CHECKING:
    from typing_extensions import Buffer

MAX_ENVELOPE_BYTES: Final = 1024
MAX_META_BYTES: Final = 64 << 10
MAX_META_DEPTH: Final = 16
MARK: Final = "ucxx_transport"
"""The key by which a record is known among other mappings."""

NO_META: Final[Mapping[str, object]] = MappingProxyType({})


def unpack_envelope(raw: Buffer) -> dict[str, object] | None:
    """What an envelope says, None for an empty one; a ProtocolError: it is too long, or no mapping of plain values."""
    return record_and_meta(raw)[0]


def record_and_meta(raw: Buffer) -> tuple[dict[str, object] | None, Mapping[str, object]]:
    """`unpack_envelope`, and the `meta` of the reference to its payload, read-only; errors as of both."""
    if not memoryview(raw):
        return None, NO_META
    form = unpack(raw, "envelope", max_bytes=MAX_ENVELOPE_BYTES)
    if not isinstance(form, dict):
        raise ProtocolError(f"an envelope must be a mapping, not {describe(form)}", field="envelope")
    try:
        record: dict[str, object] = plain(form)
    except ConfigError as exc:
        raise ProtocolError(exc.message, **exc.facts) from exc
    meta = meta_of(form)  # which nothing else refers to
    return record, MappingProxyType(meta) if meta else NO_META


def meta_of(envelope: Mapping[str, object] | None) -> Mapping[str, object]:
    """The `meta` of the reference to a payload with this envelope; a ProtocolError: a record's has something else."""
    meta = envelope["ref"] if envelope and MARK in envelope and "ref" in envelope else envelope
    if meta is None:
        return NO_META
    if not isinstance(meta, Mapping):
        raise ProtocolError(f"a record's envelope has {describe(meta)} for its meta", field="meta")
    return meta


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
        raise ConfigError(
            f"meta takes {len(packed)} bytes; at most {MAX_META_BYTES}: make what is large a field of the payload",
            field="meta",
            nbytes=len(packed),
        )
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
        raise ConfigError(
            f"{path} must be a finite number, not {value} (JSON has no others): give None, as a TrajectoryWriter does "
            "in the meta of an episode by nonfinite_meta='none'",
            field="meta",
        )
    if not isinstance(value, (int, float, str)):
        raise ConfigError(
            f"{path} must be made of None, bools, numbers, text, lists and mappings (of an array: .tolist()), "
            f"not {describe(value)}",
            field="meta",
        )
    return value
