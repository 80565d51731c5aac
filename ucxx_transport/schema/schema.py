"""Schema: the fields of a payload, their places in memory, and the identity that both sides compare."""

from __future__ import annotations

import operator
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

import numpy as np
import xxhash

from ucxx_transport.errors import ConfigError, ProtocolError, nearest_remedy
from ucxx_transport.schema import wire_form
from ucxx_transport.schema.fields import ArrayTree, TensorSpec, collect, flatten, grown, listed, nesting_of
from ucxx_transport.schema.tensors import Array, Memory, Placement, as_array, byte_view, fit, make_placer, view_fields
from ucxx_transport.schema.wire_form import describe, is_unsigned, misfit, refuse, untrusted

Lengths: TypeAlias = Literal["equal", "any"]

MAX_FIELDS = 4096
MAX_SCHEMA_BYTES = 1 << 20  # of the msgpack form; 4096 fields with names of 150 characters stay below it
MAX_PAYLOAD_BYTES = 1 << 48
_COMPARED = 20  # names, at most, that are looked at for the one that was meant: each takes some µs


class Schema:
    """What a ring's payloads look like. Not to be changed; equal schemas have equal fingerprints.

    Attributes:
        fields: in payload order.
        nbytes: of a payload at full size: what a slot must hold.
        offsets: each field's first byte in a payload at full size.
        varlen: names of the fields whose leading dimension varies, in payload order.
        lengths: what is written by this schema: "equal", varlen fields of one maximum have as many rows as each other,
            or none; "any". It is the writer's own: equality, fingerprint and `to_dict` are without it, and a reader's
            schema has "any".
        fingerprint: 64-bit identity: xxh3_64 of the msgpack form, whose keys have a fixed order; never 0.

    Examples:
        >>> image = TensorSpec("obs/image", (500, 84, 84), "uint8", varlen=True)
        >>> schema = Schema([image, TensorSpec("reward", (), "float32")])
        >>> schema.layout({"obs/image": 2}).nbytes
        14212
        >>> schema.views(bytes(schema.nbytes))["obs"]["image"].shape
        (0, 84, 84)
    """

    __slots__ = (
        *("_alike", "_by_name", "_flat", "_full", "_names", "_nesting", "_place", "_varlen", "_varlen_maxima"),
        *("fields", "fingerprint", "lengths", "nbytes", "offsets", "varlen"),
    )

    def __init__(self, fields: Iterable[TensorSpec], lengths: Lengths = "any") -> None:
        """Lay out the fields in the order given.

        Args:
            fields: 1 to 4096 of them, with names that make one tree.
            lengths: "equal" or "any"; see the attribute.

        Raises:
            ConfigError: no field or too many, names that collide or leave gaps in a list, more than 2**48 bytes of
                payload or 1 MiB of description.
        """
        given: object = fields
        self.fields: tuple[TensorSpec, ...] = tuple(given) if isinstance(given, Iterable) else ()
        if not 1 <= len(self.fields) <= MAX_FIELDS or not all(isinstance(field, TensorSpec) for field in self.fields):
            text = f"a Schema is made of 1 to {MAX_FIELDS} TensorSpec objects, not of {describe(fields)}"
            raise ConfigError(text, field="fields")
        self._names = tuple(field.name for field in self.fields)
        self._nesting, self._flat = nesting_of(self._names), not any("/" in name for name in self._names)
        self._by_name = {field.name: field for field in self.fields}
        self._varlen = tuple(index for index, field in enumerate(self.fields) if field.varlen)
        self._varlen_maxima = tuple(self.fields[index].shape[0] for index in self._varlen)
        self._place = make_placer(self.fields)
        self._full = self._place(self._varlen_maxima)
        self.nbytes = self._full.nbytes
        self.varlen = tuple(self.fields[index].name for index in self._varlen)
        if lengths not in ("equal", "any"):
            refuse("lengths", lengths, "'equal' or 'any'")
        self.lengths: Lengths = lengths
        by_maximum: dict[int, list[int]] = {}
        for position, maximum in enumerate(self._varlen_maxima):
            by_maximum.setdefault(maximum, []).append(position)
        self._alike = [alike for alike in by_maximum.values() if lengths == "equal" and len(alike) > 1]
        self.offsets: Mapping[str, int] = MappingProxyType(dict(zip(self._by_name, self._full.offsets, strict=True)))
        if self.nbytes > MAX_PAYLOAD_BYTES:
            raise ConfigError(f"a payload of {self.nbytes} bytes; at most {MAX_PAYLOAD_BYTES}", field="fields")
        packed = self.to_bytes()
        if len(packed) > MAX_SCHEMA_BYTES:
            text = f"a Schema of {len(packed)} bytes is over {MAX_SCHEMA_BYTES}: shorten names"
            raise ConfigError(text, field="fields")
        # 0 stands for "raw, no schema" on the wire and in a SlotRef
        self.fingerprint = xxhash.xxh3_64_intdigest(packed) or 1

    def __len__(self) -> int:
        return len(self.fields)

    def __iter__(self) -> Iterator[TensorSpec]:
        return iter(self.fields)

    def __eq__(self, other: object) -> bool:
        return self.fields == other.fields if isinstance(other, Schema) else NotImplemented

    def __hash__(self) -> int:
        return self.fingerprint

    def __repr__(self) -> str:
        return f"<Schema {len(self.fields)} fields, {self.nbytes} bytes, fingerprint {self.fingerprint:016x}>"

    def __reduce__(self) -> tuple[object, ...]:
        """Rebuilt from its fields: the caches stay behind."""
        return (Schema, (self.fields, self.lengths))

    @classmethod
    def from_example(
        cls,
        tree: Mapping[str, object],
        varlen: Iterable[str] | Mapping[str, int | None] | int = (),
        lengths: Lengths = "equal",
    ) -> Schema:
        """The schema that `tree` fits.

        Args:
            tree: nested mappings, lists and tuples of arrays; a Python number becomes a 0-d bool, int64, float64 or
                complex128.
            varlen: names of the fields whose leading dimension varies, either with their maximum lengths, or without:
                then the example has the maximum. One number is the maximum of every field with a leading dimension.
            lengths: "equal": of these fields, those of one maximum, or without, have as many rows as each other, or
                none, in every payload; "any": as many as they like.

        Raises:
            ConfigError: an array cannot be a payload, `varlen` names no field, or a maximum that the example exceeds,
                or `lengths` does not hold for it.
        """
        maxima = checked_varlen(varlen)
        leaves = flatten(tree)
        if isinstance(maxima, int):
            maxima = {name: maxima for name, leaf in leaves.items() if as_array(leaf, name).ndim}
        for name in maxima:
            if name not in leaves:
                remedy = "give it 0 rows there, such as np.zeros((0, 1176), 'float32'), or name the fields by schema="
                remedy = nearest_remedy(name, leaves) or remedy
                text = f"varlen names {describe(name)}, which the example lacks; {remedy}"
                raise ConfigError(text, field=describe(name))
        specs = []
        for name, leaf in leaves.items():
            array = as_array(leaf, name)
            spec = TensorSpec(name, array.shape, array.dtype)
            if name in maxima:
                most = spec.shape[:1] if maxima[name] is None else (maxima[name],)
                spec = replace(spec, shape=(*most, *spec.shape[1:]), varlen=True)
            specs.append(spec)
        if lengths == "equal":
            _check_equal({spec.name: spec.shape[0] for spec in specs if spec.varlen and maxima[spec.name] is None})
        made = cls(specs, lengths)
        made.arrange(tree)
        return made

    def to_dict(self) -> dict[str, object]:
        """The schema as plain JSON- and msgpack-safe values, in a fixed order of keys."""
        return {"version": wire_form.WIRE_VERSION, "fields": [field.to_dict() for field in self.fields]}

    def to_bytes(self) -> bytes:
        """`to_dict` in msgpack: what the segment holds and what the fingerprint is taken of."""
        return wire_form.pack(self.to_dict())

    @classmethod
    def from_dict(cls, data: object) -> Schema:
        """Rebuild a schema from `to_dict`'s form, which is not trusted.

        Raises:
            ProtocolError: the form is malformed or of another version; the message names the field.
        """
        form = wire_form.take_fields(data, "schema", required=("version", "fields"))
        wire_form.check_version(form["version"], "schema")
        fields = form["fields"]
        if not isinstance(fields, (list, tuple)) or not 1 <= len(fields) <= MAX_FIELDS:
            text = f"a schema has a list of 1 to {MAX_FIELDS} fields, not {describe(fields)}"
            raise ProtocolError(text, field="fields")
        with untrusted():
            return cls([TensorSpec.from_dict(field) for field in fields])

    @classmethod
    def from_bytes(cls, raw: bytes | bytearray | memoryview) -> Schema:
        """Rebuild a schema from `to_bytes`'s form, which is not trusted.

        Raises:
            ProtocolError: the form is malformed, over 1 MiB or of another version; the message names the field.
        """
        return cls.from_dict(wire_form.unpack(raw, "schema", max_bytes=MAX_SCHEMA_BYTES))

    def gather(self, tree: object) -> list[Any]:
        """The leaves of `tree` in field order, whatever they are; a ConfigError names those missing or unknown."""
        try:
            if self._flat and type(tree) is dict and len(tree) == len(self._names):
                return [tree[name] for name in self._names]
            leaves: list[object] = [None] * len(self._names)
            collect(self._nesting, tree, leaves)
        except LookupError:
            return self._gather_any(tree)
        return leaves

    def _gather_any(self, tree: object) -> list[object]:
        """The same by definition rather than by structure: accepts keys that are paths, words what does not fit."""
        known = self._by_name
        found = flatten(tree, self._names)
        missing = [name for name in known if name not in found]
        unknown = [name for name in found if name not in known]
        if missing or unknown:
            words = [f"missing: {listed(missing)}"] * bool(missing) + [f"unknown: {listed(unknown)}"] * bool(unknown)
            near = (nearest_remedy(name, missing[:_COMPARED]) for name in unknown[:_COMPARED])
            remedy = next(filter(None, near), None) or (
                known[missing[0]].absence_remedy
                if missing
                else "name in schema= every field that any episode has, and give 0 rows where one has none"
            )
            text = f"the data does not fit the schema; {'; '.join(words)}: {remedy}"
            raise ConfigError(text, field=(missing or unknown)[0])
        return [found[name] for name in known]

    def nest(self, leaves: Sequence[object]) -> ArrayTree:
        """A new tree of these leaves, given in field order."""
        if self._flat:
            return dict(zip(self._names, leaves, strict=True))
        tree: ArrayTree = grown(self._nesting, leaves)
        return tree

    def layout(self, lengths: Mapping[str, int] | None = None) -> Placement:
        """Where the fields lie in a payload of these lengths.

        Args:
            lengths: rows of each varlen field; one left out has its maximum.

        Raises:
            ConfigError: a length is not 0 to its maximum, or names no varlen field.
        """
        if not lengths:
            return self._full
        for name, length in lengths.items():
            field = self._by_name.get(name)
            if field is None or not field.varlen:
                raise ConfigError(f"lengths must be of varlen fields, not {describe(name)}", field=describe(name))
            if not is_unsigned(length, 64) or length > field.shape[0]:
                raise misfit(name, f"a length is 0 to {field.shape[0]}, not {describe(length)}")
        return self._place(tuple(map(lengths.get, self.varlen, self._varlen_maxima)))

    def arrange(self, tree: Mapping[str, object]) -> tuple[list[Array], Placement]:
        """The arrays of `tree` in field order, each fitting its field, and where they go, or a ConfigError."""
        ndarray = np.ndarray
        arrays: list[Array] = self.gather(tree)
        for index, field in enumerate(self.fields):
            array = arrays[index]
            # the common case inline: a call a field would double the time
            if type(array) is not ndarray or array.dtype is not field.dtype or array.shape != field.shape:
                arrays[index] = fit(array, field)
        if not self._varlen:
            return arrays, self._full
        lengths = tuple(arrays[index].shape[0] for index in self._varlen)
        if self._alike and len({0, *lengths}) > 2:
            for alike in self._alike:
                _check_equal({self.varlen[position]: lengths[position] for position in alike})
        return arrays, self._place(lengths)

    def views(self, buffer: Memory, *, writable: bool = False) -> ArrayTree:
        """The arrays of a payload, without a copy: they share and keep alive the memory of `buffer`.

        Args:
            buffer: contiguous bytes that begin with a payload of this schema.
            writable: whether the arrays may be written to; the buffer must then be writable.

        Raises:
            ProtocolError: the payload is too short or names a length over the maximum.
            ConfigError: `buffer` is not a contiguous buffer, or not writable when asked for.
        """
        memory = byte_view(buffer, writable=writable)
        return self.nest(view_fields(memory, self.placement_in(memory)))

    def placement_in(self, memory: memoryview) -> Placement:
        """Where the fields of a payload lie in its bytes, which may be somewhere else by then; errors as `views`."""
        placement = self._full
        if self._varlen:
            count = len(self._varlen)
            try:
                lengths = struct.unpack_from(f"<{count}Q", memory)
            except struct.error as exc:
                text = f"a payload of {len(memory)} bytes ends within its table of {count} lengths"
                raise ProtocolError(text, nbytes=len(memory)) from exc
            if any(map(operator.gt, lengths, self._varlen_maxima)):
                claims = zip(self.varlen, lengths, self._varlen_maxima, strict=True)
                name, length, most = next(claim for claim in claims if claim[1] > claim[2])
                raise ProtocolError(f"field {name!r} claims {length} rows of at most {most}", field=name, length=length)
            placement = self._place(lengths)
        if placement.nbytes > len(memory):
            given, needed = len(memory), placement.nbytes
            raise ProtocolError(f"a payload of {given} bytes is shorter than its {needed}", nbytes=given)
        return placement


def checked_varlen(varlen: Any) -> dict[str, int | None] | int:
    """`varlen` of `Schema.from_example`, names with their maxima or one maximum for all, or a ConfigError."""
    given: list[tuple[Any, Any]] = [("", varlen)]
    if isinstance(varlen, Mapping):
        given = [*varlen.items()]
    elif isinstance(varlen, Iterable) and not isinstance(varlen, (str, bytes)):
        given = [(name, None) for name in varlen]
    for name, most in given:
        is_count = hasattr(most, "__index__") and not isinstance(most, bool) and most >= 1
        if not isinstance(name, str) or not (is_count or (most is None and varlen is not None)):
            shown = f"{{{describe(name)}: {describe(most)}}}" if isinstance(varlen, Mapping) else describe(varlen)
            text = "varlen must be names of fields, or these with maxima from 1 on such as {'obs': 500}, or one maximum"
            raise ConfigError(f"{text}, not {shown}", field="varlen")
    return dict(given) if isinstance(varlen, Iterable) else operator.index(varlen)


def _check_equal(rows: Mapping[str, int]) -> None:
    """Refuse, by a ConfigError, fields that have neither as many rows as each other, nor none."""
    (first, most), *others = [(name, count) for name, count in rows.items() if count] or [("", 0)]
    for name, count in others:
        if count != most:
            text = f"{most} rows, but {name!r} has {count}: give both as many, or lengths='any' if they may differ"
            raise misfit(first, f"{text} (an observation after the last step, say)")
