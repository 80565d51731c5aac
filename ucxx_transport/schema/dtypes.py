"""The element types a payload may hold, by name.

| family   | names                                                       | stored as                          |
|----------|-------------------------------------------------------------|------------------------------------|
| numpy    | bool, (u)int8…64, float16…64, complex64…128, long double    | little-endian                      |
| ml_dtypes| bfloat16, float8_e3m4 … float8_e8m0fnu                      | as ml_dtypes defines them          |

A long double is named after its size (`float128`), so a platform without that size refuses the schema.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt

from ucxx_transport.schema.wire_form import describe, misfit

DType: TypeAlias = np.dtype[Any]

_BUILTIN = (
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64", "longdouble", "complex64", "complex128", "clongdouble"),
)
_EXTENSION = ("bfloat16", *sorted(name for name in dir(ml_dtypes) if name.startswith("float8_")))
_MAX_TEXT = 32
_REMEDIES = {
    "O": "convert it to an array of numbers: objects cannot be shared without pickle",
    "U": "encode the text and pass it as uint8, or put it into the SlotRef's meta",
    "S": "pass bytes as uint8 (np.frombuffer(data, np.uint8))",
    "V": "make each member of a structured type a field of its own",
    "M": "view it as int64 (array.view('int64')) and keep the unit in the field's name",
    "m": "view it as int64 (array.view('int64')) and keep the unit in the field's name",
}


def _table() -> dict[str, DType]:
    table: dict[str, DType] = {}
    for text in _BUILTIN:
        # On a little-endian machine numpy's own object, so that identity means equality: newbyteorder() makes another.
        dtype = np.dtype(text) if sys.byteorder == "little" else np.dtype(text).newbyteorder("<")
        table.setdefault(dtype.name, dtype)
    for text in _EXTENSION:
        table[text] = np.dtype(getattr(ml_dtypes, text))
    return table


DTYPES: dict[str, DType] = _table()
"""Every supported dtype by its canonical name."""


def canonical_dtype(dtype: npt.DTypeLike | None, field: str) -> DType:
    """The supported dtype that `dtype` names, in the payload's byte order.

    Args:
        dtype: a name ("float32", "bfloat16"), a numpy or ml_dtypes scalar type, or a dtype.
        field: the field it belongs to, for the error.

    Raises:
        ConfigError: not a dtype, or one that cannot be shared as plain bytes; the message gives the remedy.

    >>> canonical_dtype("bfloat16", "w").itemsize, canonical_dtype(">f4", "obs").name
    (2, 'float32')
    """
    if isinstance(dtype, str) and dtype in DTYPES:
        return DTYPES[dtype]
    if dtype is None or (isinstance(dtype, str) and len(dtype) > _MAX_TEXT):
        raise misfit(field, f"{describe(dtype)} is not a dtype")
    try:
        found = np.dtype(dtype)
    except (TypeError, ValueError, SyntaxError, DeprecationWarning) as exc:  # numpy parses its own little language here
        raise misfit(field, f"{describe(dtype)} is not a dtype; supported are {', '.join(DTYPES)}") from exc
    known = DTYPES.get(found.name)
    if known is None or known != found.newbyteorder("<"):
        kind = found.kind if found.kind != "V" or found.type is np.void else ""  # extension types are V too
        remedy = _REMEDIES.get(kind) or f"supported are {', '.join(DTYPES)}"
        raise misfit(field, f"dtype {found.name} cannot be a payload; {remedy}", dtype=found.name)
    return known


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
