"""The fields of a schema, read off one example of the data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from ucxx_transport.errors import ConfigError
from ucxx_transport.schema.tensor_spec import TensorSpec
from ucxx_transport.schema.tensors import as_array, fit
from ucxx_transport.schema.tree import flatten
from ucxx_transport.schema.wire_form import describe


def specs_of_example(tree: Mapping[str, object], varlen: Iterable[str] | Mapping[str, int]) -> list[TensorSpec]:
    """One field for each leaf of `tree`, in its order; see `Schema.from_example`.

    Raises:
        ConfigError: an array cannot be a payload, `varlen` names no field, or a maximum that the example exceeds.
    """
    if isinstance(varlen, str):
        raise ConfigError("varlen is a list of names, or a mapping of names to maximum lengths", field="varlen")
    maxima = dict(varlen) if isinstance(varlen, Mapping) else dict.fromkeys(varlen)
    leaves = flatten(tree)
    for name in maxima:
        if name not in leaves:
            raise ConfigError(f"varlen names {describe(name)}, which the example lacks", field=describe(name))
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
    return specs
