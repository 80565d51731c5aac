"""A class of settings: how it is made of its three sources, and how what is wrong with it is worded."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Final, TypeVar, cast, dataclass_transform

from pydantic import ConfigDict, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass

from ucxx_transport.errors import ConfigError
from ucxx_transport.settings.fields import setting
from ucxx_transport.settings.sources import SectionValues, gather, unknown_name

__all__ = ["outside_values", "section"]

_KNOWN: dict[str, frozenset[str]] = {}
_NOT_IN_TEXT: Final = frozenset({"schema"})
_MAPPINGS: Final = frozenset({"ucx"})

SectionT = TypeVar("SectionT")


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(setting,))
def section(name: str, *, choice: frozenset[str] = frozenset()) -> Callable[[type[SectionT]], type[SectionT]]:
    """Make a class a section of the settings: a frozen pydantic dataclass whose defaults are the other two sources.

    Args:
        name: the section's name in the environment and in TOML.
        choice: fields of which one excludes the others: made in code, it replaces what the weaker sources chose.
    """

    def decorate(cls: type[SectionT]) -> type[SectionT]:
        rules = ConfigDict(extra="forbid", arbitrary_types_allowed=True, allow_inf_nan=False)
        made = pydantic_dataclass(frozen=True, kw_only=True, slots=True, config=rules)(cls)
        own = frozenset(field.name for field in fields(made))
        _KNOWN[name] = own - _NOT_IN_TEXT
        validate = made.__init__

        @functools.wraps(validate)
        def initialise(self: SectionT, **arguments: object) -> None:
            for argument in arguments:
                if argument not in own:
                    raise unknown_name(f"setting of {made.__name__}", argument, own)
            found = gather(name, arguments, known=_KNOWN, mappings=_MAPPINGS)
            try:
                validate(self, **_chosen(choice, found.values, arguments))
            except ValidationError as error:
                raise _as_config_error(name, error, found) from None
            check = getattr(self, "_check", None)
            if check is not None:
                check()

        # `setattr`: assigning `__init__` on a type is what decorating a class means, but mypy refuses the plain form.
        setattr(made, "__init__", initialise)  # noqa: B010 - see above
        return cast("type[SectionT]", made)

    return decorate


def outside_values(name: str) -> SectionValues:
    """What the environment and TOML say about the section `name`, not validated.

    Raises:
        ConfigError: an unknown name there, or a file that cannot be read.
    """
    return gather(name, {}, known=_KNOWN, mappings=_MAPPINGS)


def _chosen(
    choice: frozenset[str], values: Mapping[str, object], arguments: Mapping[str, object]
) -> Mapping[str, object]:
    if all(arguments.get(name) is None for name in choice):
        return values
    return {name: value for name, value in values.items() if name in arguments or name not in choice}


def _as_config_error(section: str, error: ValidationError, found: SectionValues) -> ConfigError:
    lines: list[str] = []
    facts: dict[str, object] = {}
    for detail in error.errors(include_url=False, include_context=False):
        field = str(detail["loc"][0]) if detail["loc"] else section
        value = "(hidden)" if field in {"token", "password"} else repr(found.values.get(field, detail.get("input")))
        origin = found.origins.get(field, "keyword argument")
        problem = detail["msg"].removeprefix("Value error, ").removeprefix("Input ")
        line = f"{section}.{field} = {value} ({origin}): {problem}"
        if line not in lines:
            lines.append(line)
        facts = facts or {"field": field, "value": value, "source": origin}
    return ConfigError("; ".join(lines), **facts)
