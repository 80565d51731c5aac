"""Arrays of a payload: values that a caller gives as arrays that fit their fields, and where these lie in a payload.

| given                                     | becomes                                                    |
|-------------------------------------------|------------------------------------------------------------|
| numpy array                               | itself                                                     |
| torch tensor on the CPU, with a gradient  | its own memory, no copy: bfloat16 and float8 too           |
| or without                                |                                                            |
| buffer, `__array__`, `__array_interface__`| `np.asarray`: no copy where the object allows it (jax too) |
| `__dlpack__` on the CPU                   | `np.from_dlpack`, no copy                                  |
| bytes                                     | uint8                                                      |
| Python number, list of numbers            | the field's dtype: integers exactly, floats to the nearest |
| an empty list, for a varlen field         | 0 rows                                                     |
| numpy's masked array, None                | an error: a mask would be lost, 0 rows are for what is not |
| any of these on a GPU                     | an error: `DeviceArrayError`                               |

Where they lie in a payload, given its actual lengths, is its *placement*:
```
offset 0                 64-aligned            64-aligned
| lengths: u64 × varlen  | field 0, its bytes  | field 1, its bytes | …      a payload with varlen fields
| field 0, its bytes     | field 1, its bytes  | …                           a payload without
```
Little-endian. A varlen field takes only the rows it has, so the next field moves up. The bytes between two fields are
unspecified. `nbytes` ends with the last field's last byte.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import repeat
from math import prod
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np

from ucxx_transport.errors import FOREIGN_ERRORS, ConfigError
from ucxx_transport.schema.fields import (
    DTYPES,
    MAX_DIMENSIONS,
    NUMBERS,
    DType,
    TensorSpec,
    are_numbers,
    casts_exactly,
    remedy_for,
)
from ucxx_transport.schema.wire_form import describe, misfit

if TYPE_CHECKING:
    from typing_extensions import Buffer

Array: TypeAlias = np.ndarray[Any, DType]
Memory: TypeAlias = "Buffer | Array"  # numpy tells type checkers of its buffers from Python 3.12 on

# DLDeviceType, <dlpack/dlpack.h>: kDLCUDA and kDLCUDAManaged. kDLCUDAHost is page-locked memory of the host.
_DLPACK_GPUS = (2, 13)


class DeviceArrayError(ConfigError):
    """An array lies on a GPU where one in host memory is wanted."""


def is_on_device(value: object) -> bool:
    """Whether `value` is an array on a GPU: of torch, or of any library that says so by DLPack or CUDA's interface."""
    torch: Any = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        return bool(value.is_cuda)
    try:
        said: Any = getattr(value, "__dlpack_device__", None)
        if said is not None:
            return said()[0] in _DLPACK_GPUS
        return hasattr(value, "__cuda_array_interface__")
    except FOREIGN_ERRORS:  # an array over several devices says so here
        return False


def as_array(value: object, field: str) -> Array:
    """`value` as a numpy array, without a copy where that is possible; a ConfigError, on a GPU a DeviceArrayError."""
    if type(value) is np.ndarray:
        return value
    if isinstance(value, bytes):
        return np.frombuffer(value, np.uint8)
    if is_on_device(value):
        raise DeviceArrayError(
            f"field {field!r}: {describe(value)} on a GPU is not in host memory; write it with TrajectoryWriter or "
            "UCXXRolloutMixin, which copy it straight into the slot, or copy it to the host first",
            field=field,
        )
    try:
        return _of_any(value, field)
    except ConfigError:
        raise
    except FOREIGN_ERRORS as exc:
        text = f"{describe(value)} is not an array in host memory ({type(exc).__name__}: {exc})"
        raise misfit(field, f"{text}; {_remedy_for(value)}") from exc


def _of_any(value: Any, field: str) -> Array:
    """As `as_array`; what is no array raises a ConfigError, or what its library raises."""
    if value is None:
        remedy = "give 0 rows where an episode has none, such as np.zeros((0, 1176), 'float32')"
        raise misfit(field, f"None has neither shape nor dtype; {remedy} for a field that varlen= or schema= names")
    if isinstance(value, np.ma.MaskedArray):
        remedy = "and the mask as a field of its own (np.ma.getmaskarray(array)), or array.data where nothing is masked"
        raise misfit(field, f"a masked array would lose its mask; give array.filled(value), {remedy}")
    if isinstance(value, (list, tuple)):
        return _of_list(value, field)
    # not imported here: only a program that has loaded it can hold one of its tensors
    torch: Any = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        return _of_tensor(value, torch)
    if hasattr(value, "__dlpack__") and not hasattr(value, "__array__") and not hasattr(value, "__array_interface__"):
        return np.from_dlpack(value)
    return np.asarray(value)


def _of_list(value: list[Any] | tuple[Any, ...], field: str) -> Array:
    """Numbers in nested lists as one array: what numpy makes of them, unless it rounds an integer."""
    if {*map(type, value)} <= {float}:
        return np.asarray(value)
    leaves: list[object] = []
    nested = _unwrapped(value, field, leaves)
    try:
        array = np.asarray(nested)
    except ValueError as exc:
        text = f"{_raggedness(value)}; pad them, or give one flat list and the lengths as a field of their own"
        raise misfit(field, text) from exc
    if array.dtype.kind not in "biu" and len(leaves) == array.size:
        pairs = zip(leaves, array.ravel().tolist(), strict=True)
        if any(isinstance(leaf, (int, np.integer)) and leaf != number for leaf, number in pairs):
            text = f"{describe(value)} has integers that {array.dtype.name} would round"
            raise misfit(field, f"{text}; give them as a field of their own")
    return array


def _unwrapped(value: Any, field: str, leaves: list[object]) -> Any:
    """The same lists with numpy's scalars for tensors of 0 dimensions, and arrays for others."""
    if isinstance(value, (list, tuple)):
        return [_unwrapped(item, field, leaves) for item in value]
    leaf = value if isinstance(value, (*NUMBERS, np.generic)) else as_array(value, field)[()]
    leaves.append(leaf)
    return leaf


def _raggedness(value: object) -> str:
    """What lengths the rows of nested lists have that are no array."""
    level: list[Any] = [value]
    for _ in range(MAX_DIMENSIONS):
        lengths = [len(item) if isinstance(item, (list, tuple)) else np.shape(item)[:1] for item in level]
        if len({*map(str, lengths)}) > 1:
            shown = ", ".join("a number" if length == () else str(length).strip("(,)") for length in lengths[:8])
            return f"its rows are of unequal lengths ({shown}{', …' * (len(lengths) > 8)})"
        level = [child for item in level for child in item]
    return f"it is nested deeper than {MAX_DIMENSIONS}"


def _remedy_for(value: Any) -> str:
    """What makes an array in host memory of a tensor that is none."""
    torch: Any = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        if value.is_nested:
            return "pad it (to_padded_tensor), or give its values and lengths as two fields"
        if value.layout != torch.strided:
            return "give value.to_dense(), or its indices and values as two fields"
        if value.is_quantized:
            return "give value.dequantize(), or value.int_repr() and its scale"
        if hasattr(value, "full_tensor"):
            return "give value.full_tensor(), or value.to_local()"
        if value.is_meta or hasattr(value, "fake_mode"):
            return "it has no values: give the tensor that it stands for"
    return "copy it to the host, or view it as a dtype that numpy knows"


def _of_tensor(tensor: Any, torch: Any) -> Array:
    """A torch tensor's memory; whatever cannot be one array in host memory raises what torch raises for it."""
    plain = tensor.detach().resolve_conj().resolve_neg()
    name = str(plain.dtype).removeprefix("torch.")
    if not name.startswith(("bfloat16", "float8_")):
        array: Array = plain.numpy()
        return array
    bits = plain.view(torch.int16 if plain.dtype.itemsize == 2 else torch.uint8)
    typed: Array = bits.numpy().view(DTYPES[name])
    return typed


def fit(value: object, spec: TensorSpec) -> Array:
    """`value` as an array that fits its field, and whose every element keeps its value there, or a ConfigError."""
    if value is None:
        raise misfit(spec.name, f"None is no array; {spec.absence_remedy}")
    array = value if type(value) is np.ndarray else as_array(value, spec.name)
    if array.dtype is not spec.dtype and not casts_exactly(array.dtype, spec.dtype):
        # Python's numbers, and lists of only numbers, carry no dtype of their own
        is_weak = all(are_numbers(value)) if isinstance(value, (list, tuple)) else type(value) in NUMBERS
        if array.dtype.kind not in "biufc" or not is_weak:
            raise too_narrow(array.dtype, spec)
        array = _cast_numbers(array, spec)
    shape, full = array.shape, spec.shape
    if shape == (0,) and spec.varlen and isinstance(value, (list, tuple)):
        shape = (0, *full[1:])
        array = array.reshape(shape)
    if shape != full and not (spec.varlen and shape and shape[0] <= full[0] and shape[1:] == full[1:]):
        wanted = f"(≤{full[0]}, {', '.join(map(str, full[1:]))})" if spec.varlen else str(full)
        text = f"shape {shape} is not {wanted}: {_shape_remedy(shape, spec)}"
        raise misfit(spec.name, text, given=shape, expected=wanted)
    return array


def _shape_remedy(shape: tuple[int, ...], spec: TensorSpec) -> str:
    """What helps where an array of this shape does not fit its field."""
    full, name = spec.shape, spec.name
    if len(shape) != len(full) or not full:
        return f"give {len(full)} dimensions, or the field its own shape by schema="
    if shape[1:] != full[1:]:
        return f"give rows of shape {full[1:]}, or the field its own shape by schema="
    if spec.varlen:
        return f"{shape[0]} rows, at most {full[0]}: give varlen={{{name!r}: N}}, N the longest there will be"
    return f"{shape[0]} rows, the first episode (or schema=) had {full[0]}: give varlen={{{name!r}: N}}, N the longest"


def copy_fields(targets: Iterable[Array], sources: Iterable[Array]) -> None:
    """Copy fitted arrays into their places, converting elements where the dtypes differ."""
    for target, source in zip(targets, sources):  # noqa: B905 - one each a field; checked, it takes a fifth longer
        if source.dtype is target.dtype:
            target[...] = source  # 0.1 to 0.4 µs less a field than np.copyto, which goes through a dispatcher
        else:
            # widening a signalling NaN is reported as an invalid value; it stays a NaN
            with np.errstate(all="ignore"):
                np.copyto(target, source, casting="unsafe")


def too_narrow(given: DType, spec: TensorSpec) -> ConfigError:
    """The error for values of a dtype that its field would not keep; what it advises loses none of them."""
    stored = spec.dtype
    text = f"dtype {given.name} would not keep its values in {stored.name}"
    if given.name not in DTYPES:
        return misfit(spec.name, f"{text}; {remedy_for(given)}", given=given.name, expected=stored.name)
    wider = given.name
    with suppress(TypeError):  # of some pairs there is none
        both = np.promote_types(given, stored)
        if casts_exactly(given, both):
            wider = both.name
    remedy = f"give the field {wider}: schema=Schema([TensorSpec({spec.name!r}, …, {wider!r}), …])"
    if given.kind in "iu" and _kind_order(stored) > 1 and wider == given.name:
        remedy = "give floats for a field of floats (array.astype('float64') keeps integers up to 2**53)"
        if stored.name != "float64":
            remedy += f", and the field float64 by schema= ({stored.name} keeps fewer)"
    elif "float" in given.name and "float" in stored.name:
        remedy += f", or have it rounded by the writer's narrow=[{spec.name!r}]"
    return misfit(spec.name, f"{text}; {remedy}", given=given.name, expected=stored.name)


def _cast_numbers(array: Array, spec: TensorSpec) -> Array:
    """Give Python numbers the field's dtype: same kind or wider, integers exactly, floats without overflow."""
    if array.size == 0 or _kind_order(array.dtype) <= _kind_order(spec.dtype):
        with np.errstate(all="ignore"):
            narrowed = array.astype(spec.dtype)
            back = narrowed.astype(array.dtype)
        is_same = np.isfinite(back) == np.isfinite(array) if array.dtype.kind in "fc" else back == array
        if is_same.all():
            return narrowed
    raise too_narrow(array.dtype, spec)


def _kind_order(dtype: DType) -> int:
    # those of ml_dtypes are floats, whatever kind they register as
    return {"b": 0, "u": 1, "i": 1, "c": 3}.get(dtype.kind, 2)


ALIGNMENT_BYTES = 64  # a cache line and the widest vector register; also what an aligned device copy wants
LENGTH_BYTES = 8
_CACHED_PLACEMENTS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """The byte map of one payload: the actual length of each varlen field, and each field's first byte and shape."""

    lengths: tuple[int, ...]
    offsets: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[DType, ...]
    nbytes: int


def make_placer(fields: tuple[TensorSpec, ...]) -> Callable[[tuple[int, ...]], Placement]:
    """A function from actual lengths, which are checked, to a `Placement`: 2 µs for 8 fields, a remembered one 0.1."""
    dtypes = tuple(spec.dtype for spec in fields)
    table_bytes = LENGTH_BYTES * sum(spec.varlen for spec in fields)  # aligned by the first field
    # (varlen?, the shape of a row or of the whole field, its bytes)
    plan = [
        (spec.varlen, spec.shape[spec.varlen :], prod(spec.shape[spec.varlen :]) * spec.dtype.itemsize)
        for spec in fields
    ]

    def place(lengths: tuple[int, ...], /) -> Placement:
        remaining = iter(lengths)
        offsets, shapes, end = [], [], table_bytes
        for varlen, shape, nbytes in plan:
            offset = (end + ALIGNMENT_BYTES - 1) & -ALIGNMENT_BYTES
            offsets.append(offset)
            length = next(remaining) if varlen else 1
            shapes.append((length, *shape) if varlen else shape)
            end = offset + length * nbytes
        return Placement(lengths=lengths, offsets=tuple(offsets), shapes=tuple(shapes), dtypes=dtypes, nbytes=end)

    return lru_cache(maxsize=_CACHED_PLACEMENTS)(place)


def byte_view(buffer: Memory, *, writable: bool) -> memoryview:
    """The memory of `buffer` as plain bytes, writable or not as asked; a ConfigError: it is not to be had so."""
    try:
        memory = memoryview(cast("Any", buffer))  # an array is one, to type checkers too from Python 3.12 on
        # cast() refuses memory with gaps
        if memory.ndim != 1 or memory.format != "B" or not memory.contiguous:
            memory = memory.cast("B")
    except (TypeError, ValueError, BufferError) as exc:
        text = f"{describe(buffer)} is no contiguous buffer ({exc}); give a copy in C order, or array.view('uint8')"
        raise ConfigError(text, field="buffer") from exc
    if not writable:
        return memory.toreadonly()
    if memory.readonly:
        raise ConfigError("the buffer is read-only; pass writable memory", field="buffer")
    return memory


def view_fields(memory: memoryview, placement: Placement) -> list[Array]:
    """One array per field over `memory`, which must hold `placement.nbytes`."""
    make: Callable[..., Array] = np.ndarray
    # map() over C callables: faster than a comprehension, and this is most of a decode
    return list(map(make, placement.shapes, placement.dtypes, repeat(memory), placement.offsets))
