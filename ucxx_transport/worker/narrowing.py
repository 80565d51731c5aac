"""Narrowing: what may become of values whose field is narrower than they are, on the host or on a GPU.

| given to a field that may be narrowed | becomes                                                           |
|---------------------------------------|-------------------------------------------------------------------|
| a dtype that keeps its values there   | copied as it is                                                   |
| a wider float                         | rounded to the nearest; one that overflows is refused             |
| a wider integer                       | the same number; one that does not fit is refused                 |
| another kind (a float to an integer)  | refused: convert it first                                         |
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ucxx_transport.errors import ConfigError

if TYPE_CHECKING:
    from ucxx_transport.schema import TensorSpec
    from ucxx_transport.schema.dtypes import DType


def refuse_what_does_not_fit(given: DType, field: TensorSpec, bounds_of: Callable[[], tuple[int, int] | None]) -> None:
    """Refuse values that would be others in the field's dtype, but for rounding; `bounds_of` gives those of integers.

    Raises:
        ConfigError: another kind, or an integer that does not fit; the message names the field and the remedy.
    """
    stored = field.dtype
    if given.kind in "iu" and stored.kind in "iu":
        limits = np.iinfo(stored)
        bounds = bounds_of()
        if bounds is not None and not (bounds[0] >= limits.min and bounds[1] <= limits.max):
            raise ConfigError(
                f"field {field.name!r}: a value of {given.name} does not fit {stored.name}; "
                "give the schema the other dtype",
                field=field.name,
            )
    elif not (_is_float(given.name) and _is_float(stored.name)):
        raise ConfigError(
            f"field {field.name!r}: {given.name} is not narrowed to {stored.name}, which is of another kind; "
            f"convert it first (array.astype({stored.name!r})) or give the schema the other dtype",
            field=field.name,
        )


def too_large(given: DType, field: TensorSpec) -> ConfigError:
    """The error for a float that its field's dtype has no room for."""
    return ConfigError(
        f"field {field.name!r}: a value of {given.name} is too large for {field.dtype.name}; "
        "scale it, or give the schema the other dtype",
        field=field.name,
    )


def _is_float(name: str) -> bool:
    return "float" in name
