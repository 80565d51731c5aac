"""Schema: the fields of a payload, their places in memory, and the identity that both sides compare."""

from __future__ import annotations

import operator
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from ucxx_transport.errors import ConfigError, ProtocolError
from ucxx_transport.schema.tensor_spec import TensorSpec
from ucxx_transport.schema.tensors import (
    LENGTH_BYTES,
    Array,
    Placement,
    as_array,
    byte_view,
    fit,
    make_placer,
    view_fields,
)
from ucxx_transport.schema.tree import ArrayTree, TreeShape, flatten
from ucxx_transport.schema.wire_form import (
    WIRE_VERSION,
    check_version,
    describe,
    is_unsigned,
    misfit,
    pack,
    take_fields,
    unpack,
    untrusted,
)

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from ucxx_transport.schema.tensors import Memory

MAX_FIELDS = 4096
MAX_SCHEMA_BYTES = 1 << 20
"""Bound on the msgpack form; 4096 fields with names of 150 characters stay below it."""

MAX_PAYLOAD_BYTES = 1 << 48


class Schema:
    """What a ring's payloads look like. Not to be changed; equal schemas have equal fingerprints.

    Attributes:
        fields: in payload order.
        nbytes: of a payload at full size: what a slot must hold.
        offsets: each field's first byte in a payload at full size.
        varlen: names of the fields whose leading dimension varies, in payload order.
        fingerprint: 64-bit identity: xxh3_64 of the msgpack form, whose keys have a fixed order; never 0.
        gather: `gather(tree)` gives the leaves of a tree in field order, whatever they are; a ConfigError names fields
            that are missing or unknown.
        nest: `nest(leaves)` is the tree of these, given in field order.

    Examples:
        >>> image = TensorSpec("obs/image", (500, 84, 84), "uint8", varlen=True)
        >>> schema = Schema([image, TensorSpec("reward", (), "float32")])
        >>> schema.layout({"obs/image": 2}).nbytes
        14212
        >>> schema.views(bytes(schema.nbytes))["obs"]["image"].shape
        (0, 84, 84)
    """

    __slots__ = (
        *("_by_name", "_full", "_place", "_varlen", "_varlen_maxima"),
        *("fields", "fingerprint", "gather", "nbytes", "nest", "offsets", "varlen"),
    )

    def __init__(self, fields: Iterable[TensorSpec]) -> None:
        """Lay out the fields in the order given.

        Args:
            fields: 1 to 4096 of them, with names that make one tree.

        Raises:
            ConfigError: no field or too many, names that collide or leave gaps in a list, more than 2**48 bytes of
                payload or 1 MiB of description.
        """
        given: object = fields
        self.fields: tuple[TensorSpec, ...] = tuple(given) if isinstance(given, Iterable) else ()
        if not 1 <= len(self.fields) <= MAX_FIELDS or not all(isinstance(field, TensorSpec) for field in self.fields):
            raise ConfigError(
                f"a Schema is made of 1 to {MAX_FIELDS} TensorSpec objects, not of {describe(fields)}", field="fields"
            )
        shape = TreeShape(self.fields)
        self.gather, self.nest = shape.gather, shape.build
        self._by_name = {field.name: field for field in self.fields}
        self._varlen = tuple(index for index, field in enumerate(self.fields) if field.varlen)
        self._varlen_maxima = tuple(self.fields[index].shape[0] for index in self._varlen)
        self._place = make_placer(self.fields)
        self._full = self._place(self._varlen_maxima)
        self.nbytes = self._full.nbytes
        self.varlen = tuple(field.name for field in self.fields if field.varlen)
        self.offsets: Mapping[str, int] = MappingProxyType(dict(zip(self._by_name, self._full.offsets, strict=True)))
        if self.nbytes > MAX_PAYLOAD_BYTES:
            raise ConfigError(f"a payload of {self.nbytes} bytes; at most {MAX_PAYLOAD_BYTES}", field="fields")
        packed = self.to_bytes()
        if len(packed) > MAX_SCHEMA_BYTES:
            raise ConfigError(
                f"a Schema of {len(packed)} bytes is over {MAX_SCHEMA_BYTES}: shorten names", field="fields"
            )
        # 0 stands for "raw, no schema" on the wire and in a SlotRef
        self.fingerprint = xxhash.xxh3_64_intdigest(packed) or 1

    def __len__(self) -> int:
        """Number of fields."""
        return len(self.fields)

    def __iter__(self) -> Iterator[TensorSpec]:
        """The fields, in payload order."""
        return iter(self.fields)

    def __eq__(self, other: object) -> bool:
        """Same fields in the same order."""
        return self.fields == other.fields if isinstance(other, Schema) else NotImplemented

    def __hash__(self) -> int:
        """Consistent with equality, in every process."""
        return self.fingerprint

    def __repr__(self) -> str:
        """Size and identity; the fields would fill pages."""
        return f"<Schema {len(self.fields)} fields, {self.nbytes} bytes, fingerprint {self.fingerprint:016x}>"

    def __reduce__(self) -> tuple[object, ...]:
        """Rebuilt from its fields: the caches stay behind."""
        return (Schema, (self.fields,))

    @classmethod
    def from_example(cls, tree: Mapping[str, object], varlen: Iterable[str] | Mapping[str, int] | int = ()) -> Schema:
        """The schema that `tree` fits.

        Args:
            tree: nested mappings, lists and tuples of arrays; a Python number becomes a 0-d bool, int64, float64 or
                complex128.
            varlen: names of the fields whose leading dimension varies, either with their maximum lengths, or without:
                then the example has the maximum. One number is the maximum of every field with a leading dimension.

        Raises:
            ConfigError: an array cannot be a payload, `varlen` names no field, or a maximum that the example exceeds.
        """
        if isinstance(varlen, str):
            raise ConfigError("varlen is a list of names, or a mapping of names to maximum lengths", field="varlen")
        leaves = flatten(tree)
        if isinstance(varlen, int):
            varlen = {name: varlen for name, leaf in leaves.items() if as_array(leaf, name).ndim}
        maxima = dict(varlen) if isinstance(varlen, Mapping) else dict.fromkeys(varlen)
        for name in maxima:
            if name not in leaves:
                raise ConfigError(
                    f"varlen names {describe(name)}, which the example lacks: give it 0 rows there, such as "
                    "np.zeros((0, 1176), 'float32'), or name the fields by schema=",
                    field=describe(name),
                )
        specs = []
        for name, leaf in leaves.items():
            array = as_array(leaf, name)
            spec = TensorSpec(name, array.shape, array.dtype)
            if name in maxima:
                maximum = maxima[name]
                rows = spec.shape[:1] if maximum is None else (maximum,)
                spec = replace(spec, shape=(*rows, *spec.shape[1:]), varlen=True)
            fit(array, spec)
            specs.append(spec)
        return cls(specs)

    def to_dict(self) -> dict[str, object]:
        """The schema as plain JSON- and msgpack-safe values, in a fixed order of keys."""
        return {"version": WIRE_VERSION, "fields": [field.to_dict() for field in self.fields]}

    def to_bytes(self) -> bytes:
        """`to_dict` in msgpack: what the segment holds and what the fingerprint is taken of."""
        return pack(self.to_dict())

    @classmethod
    def from_dict(cls, data: object) -> Schema:
        """Rebuild a schema from `to_dict`'s form, which is not trusted.

        Raises:
            ProtocolError: the form is malformed or of another version; the message names the field.
        """
        form = take_fields(data, "schema", required=("version", "fields"))
        check_version(form["version"], "schema")
        fields = form["fields"]
        if not isinstance(fields, (list, tuple)) or not 1 <= len(fields) <= MAX_FIELDS:
            raise ProtocolError(
                f"a schema has a list of 1 to {MAX_FIELDS} fields, not {describe(fields)}", field="fields"
            )
        with untrusted():
            return cls([TensorSpec.from_dict(field) for field in fields])

    @classmethod
    def from_bytes(cls, raw: Buffer) -> Schema:
        """Rebuild a schema from `to_bytes`'s form, which is not trusted.

        Raises:
            ProtocolError: the form is malformed, over 1 MiB or of another version; the message names the field.
        """
        return cls.from_dict(unpack(raw, "schema", max_bytes=MAX_SCHEMA_BYTES))

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
        """The arrays of `tree` in field order, each fitting its field, and where they go.

        Raises:
            ConfigError: the tree does not fit the schema; the message names the field and the remedy.
        """
        ndarray = np.ndarray
        arrays: list[Array] = self.gather(tree)
        for index, field in enumerate(self.fields):
            array = arrays[index]
            # the common case inline: a call a field would double the time
            if type(array) is not ndarray or array.dtype is not field.dtype or array.shape != field.shape:
                arrays[index] = fit(array, field)
        if not self._varlen:
            return arrays, self._full
        return arrays, self._place(tuple(arrays[index].shape[0] for index in self._varlen))

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
        """Where the fields of a payload lie in its bytes, which may be somewhere else by then.

        Raises:
            ProtocolError: as for `views`.
        """
        placement = self._full
        if self._varlen:
            count = len(self._varlen)
            if len(memory) < count * LENGTH_BYTES:
                text = f"a payload of {len(memory)} bytes ends within its table of {count} lengths"
                raise ProtocolError(text, nbytes=len(memory))
            lengths = struct.unpack_from(f"<{count}Q", memory)
            if any(map(operator.gt, lengths, self._varlen_maxima)):
                claims = zip(self.varlen, lengths, self._varlen_maxima, strict=True)
                name, length, most = next(claim for claim in claims if claim[1] > claim[2])
                raise ProtocolError(f"field {name!r} claims {length} rows of at most {most}", field=name, length=length)
            placement = self._place(lengths)
        if placement.nbytes > len(memory):
            given, needed = len(memory), placement.nbytes
            raise ProtocolError(f"a payload of {given} bytes is shorter than its {needed}", nbytes=given)
        return placement
