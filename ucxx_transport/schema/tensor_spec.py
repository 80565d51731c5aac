"""TensorSpec: one field of a payload, and the element types that it may have, by name.

| family   | names                                                       | stored as                          |
|----------|-------------------------------------------------------------|------------------------------------|
| numpy    | bool, (u)int8…64, float16…64, complex64…128, long double    | little-endian                      |
| ml_dtypes| bfloat16, float8_e3m4 … float8_e8m0fnu                      | as ml_dtypes defines them          |

A long double is named after its size (`float128`), so a platform without that size refuses the schema.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING, Any, SupportsIndex, TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt

from ucxx_transport.errors import ConfigError
from ucxx_transport.schema.wire_form import describe, is_plain_text, misfit, refuse, take_fields, untrusted

MAX_NAME_CHARS = 255
MAX_NAME_DEPTH = 32
MAX_DIMENSIONS = 32
MAX_FIELD_BYTES = 1 << 48
"""Far above any memory, far below where a product of sizes could leave 64 bits."""


DType: TypeAlias = np.dtype[Any]

_BUILTIN = (
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64", "longdouble", "complex64", "complex128", "clongdouble"),
)
_EXTENSION = ("bfloat16", *sorted(name for name in dir(ml_dtypes) if name.startswith("float8_")))
_MAX_TEXT = 32
_REMEDIES = {
    "O": "make it an array of numbers of 64 bits at most: objects cannot be shared without pickle",
    "U": "encode the text and pass it as uint8, or put it into the SlotRef's meta",
    "S": "pass bytes as uint8 (np.frombuffer(data, np.uint8))",
    "V": "make each member of a structured type a field of its own",
    "M": "view it as int64 (array.view('int64')) and keep the unit in the field's name",
    "m": "view it as int64 (array.view('int64')) and keep the unit in the field's name",
}


def _of_text(text: str) -> DType:
    dtype = np.dtype(text if text in _BUILTIN else getattr(ml_dtypes, text))
    # On a little-endian machine numpy's own object, so that identity means equality: newbyteorder() makes another.
    return dtype if sys.byteorder == "little" else dtype.newbyteorder("<")


DTYPES: dict[str, DType] = {dtype.name: dtype for dtype in map(_of_text, (*_BUILTIN, *_EXTENSION))}
"""Every supported dtype by its canonical name."""


def canonical_dtype(dtype: npt.DTypeLike | None, field: str) -> DType:
    """The supported dtype that a name, a scalar type or a dtype means, in the payload's byte order, or a ConfigError.

    >>> canonical_dtype("bfloat16", "w").itemsize, canonical_dtype(">f4", "obs").name
    (2, 'float32')
    """
    if isinstance(dtype, str) and dtype in DTYPES:
        return DTYPES[dtype]
    if dtype is None or (isinstance(dtype, str) and len(dtype) > _MAX_TEXT):
        raise misfit(field, f"{describe(dtype)} is not a dtype; give its name")
    try:
        found = np.dtype(dtype)
    except (TypeError, ValueError, SyntaxError, DeprecationWarning) as exc:  # numpy parses its own little language here
        raise misfit(field, f"{describe(dtype)} is not a dtype; supported are {', '.join(DTYPES)}") from exc
    known = DTYPES.get(found.name)
    if known is None or known != found.newbyteorder("<"):
        raise misfit(field, f"dtype {found.name} cannot be a payload; {remedy_for(found)}", dtype=found.name)
    return known


def remedy_for(dtype: DType) -> str:
    """What to do about values of a dtype that is not supported."""
    kind = dtype.kind if dtype.kind != "V" or dtype.type is np.void else ""  # extension types are V too
    return _REMEDIES.get(kind) or f"supported are {', '.join(DTYPES)}"


@lru_cache(maxsize=1024)
def casts_exactly(source: DType, target: DType) -> bool:
    """Whether every value of `source` keeps its value in `target`.

    Stricter than numpy's "safe", which lets 64-bit integers into float64 and one float8 format into another.
    """
    if source.newbyteorder("<") == target:
        return True
    if target.name in _EXTENSION or source.name not in DTYPES or not np.can_cast(source, target, "safe"):
        return False
    if source.kind in "iu" and target.kind in "fc":
        return int(np.finfo(target).nmant) + 1 >= 8 * source.itemsize - (source.kind == "i")
    return True


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, shape and element type of one array in a payload.

    Attributes:
        name: the field's path in the payload's tree, 1 to 32 segments joined by "/", none empty, at most 255 printable
            characters: "obs/image", "layers/0/w". A segment of decimal digits is a position in a list.
        shape: sizes of the dimensions, ≥ 0, at most 32 of them; one integer stands for one dimension; () is a scalar.
            For a `varlen` field the first is the maximum.
        dtype: what numpy takes as a numeric, bool or complex dtype, or a bfloat16/float8 of ml_dtypes, or its name;
            always little-endian here.
        varlen: whether the leading dimension varies from payload to payload, between 0 and `shape[0]`.

    Raises:
        ConfigError: one of them is not so; the message names the field.

    >>> TensorSpec("obs/image", (500, 84, 84), "uint8", varlen=True).nbytes
    3528000
    """

    name: str
    shape: tuple[int, ...]
    dtype: DType
    varlen: bool = False

    if TYPE_CHECKING:

        def __init__(
            self,
            name: str,
            shape: SupportsIndex | Iterable[SupportsIndex],
            dtype: npt.DTypeLike,
            varlen: bool = False,  # noqa: FBT001, FBT002  # a field reads as one row: name, shape, dtype, varlen
        ) -> None: ...

    def __post_init__(self) -> None:
        name, varlen = self.name, self.varlen
        _check_name(name)
        object.__setattr__(self, "name", str(name))
        object.__setattr__(self, "shape", _checked_shape(self.shape, name))
        object.__setattr__(self, "dtype", canonical_dtype(self.dtype, name))
        if not isinstance(varlen, bool):
            raise misfit(name, f"varlen must be True or False, not {describe(varlen)}")
        if varlen and (not self.shape or self.shape[0] == 0):
            raise misfit(name, "varlen needs a leading dimension, its maximum length ≥ 1")
        # A zero size elsewhere must not hide an absurd one: numpy refuses such shapes when a view is made.
        if prod(max(size, 1) for size in self.shape) * self.dtype.itemsize > MAX_FIELD_BYTES:
            raise misfit(name, f"shape {self.shape} is too large; at most {MAX_FIELD_BYTES} bytes")

    @property
    def nbytes(self) -> int:
        """Bytes of the field at its full size."""
        return prod(self.shape) * self.dtype.itemsize

    @property
    def absence_remedy(self) -> str:
        """How an episode says that it has nothing of this field, in words for an error."""
        rows = f"give 0 rows, np.zeros({(0, *self.shape[1:])}, {self.dtype.name!r})"
        if self.varlen:
            return f"an episode without {self.name!r} must {rows}"
        return f"make {self.name!r} varlen (schema= or varlen=) where some episodes lack it, and {rows}, in those"

    def to_dict(self) -> dict[str, object]:
        """The field as plain JSON- and msgpack-safe values, in a fixed order of keys."""
        return {"name": self.name, "shape": list(self.shape), "dtype": self.dtype.name, "varlen": self.varlen}

    @classmethod
    def from_dict(cls, data: object) -> TensorSpec:
        """Rebuild a field from `to_dict`'s form, which is not trusted.

        Raises:
            ProtocolError: the form is malformed; the message names the field.
        """
        form = take_fields(data, "tensor spec", required=("name", "shape", "dtype", "varlen"))
        shape, dtype = form["shape"], form["dtype"]
        with untrusted():
            if not isinstance(shape, (list, tuple)):
                refuse("shape", shape, "a list of sizes")
            if not isinstance(dtype, str) or dtype not in DTYPES:
                refuse("dtype", dtype, "a dtype known here, by its name")
            return cls(**form)


def _check_name(name: object) -> None:
    if not isinstance(name, str):
        raise ConfigError(f"a field's name must be text, not {describe(name)}", field="name")
    if not is_plain_text(name, MAX_NAME_CHARS):
        raise ConfigError(
            f"field {describe(name)}: a name is 1 to {MAX_NAME_CHARS} printable characters", field=describe(name)
        )
    segments = name.split("/")
    if "" in segments or len(segments) > MAX_NAME_DEPTH:
        raise misfit(name, f"a path is 1 to {MAX_NAME_DEPTH} segments joined by '/', none of them empty")


def _checked_shape(shape: object, name: str) -> tuple[int, ...]:
    sizes = tuple(shape) if isinstance(shape, Iterable) and not isinstance(shape, (str, bytes)) else (shape,)
    if len(sizes) > MAX_DIMENSIONS:
        raise misfit(name, f"{len(sizes)} dimensions; at most {MAX_DIMENSIONS}")
    try:
        checked = tuple(operator.index(size) for size in sizes if not isinstance(size, bool))
    except TypeError:
        checked = ()
    if len(checked) != len(sizes) or any(size < 0 for size in checked):
        raise misfit(name, f"{describe(shape)} is not a shape: sizes must be integers ≥ 0")
    return checked
