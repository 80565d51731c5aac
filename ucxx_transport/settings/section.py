"""A section of the settings: a frozen dataclass that validates, whose defaults are the environment and the file."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, TypeVar, cast, dataclass_transform, get_type_hints

from ucxx_transport.errors import ConfigError
from ucxx_transport.settings import fields
from ucxx_transport.settings.sources import KNOWN, Given, gather, unknown_name

SectionT = TypeVar("SectionT")

_SECTIONS: Final[dict[str, dict[str, tuple[fields.Parse, Rule]]]] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What is declared of a setting beside its kind; `metadata["rule"]` of the dataclass's field.

    Attributes:
        default: as the section holds it.
        description: what it is for.
        gt: its value is more than this.
        ge: its value is at least this.
        le: its value is at most this.
        max_length: its text is at most as long.
        code_only: whether it cannot stand in the environment or in TOML.
    """

    default: object
    description: str
    gt: float | None = None
    ge: float | None = None
    le: float | None = None
    max_length: int | None = None
    code_only: bool = False

    @property
    def bounds(self) -> str:
        """The bounds in words, or nothing."""
        if self.ge is not None and self.le is not None:
            return f"{self.ge} to {self.le}"
        words = (("more than", self.gt), ("at least", self.ge), ("at most", self.le))
        return ", ".join(f"{word} {bound}" for word, bound in words if bound is not None)

    def check(self, value: object) -> None:
        """Raise ValueError for a value out of bounds."""
        if isinstance(value, str) and self.max_length is not None and len(value) > self.max_length:
            raise ValueError(f"expected at most {self.max_length} characters")
        if isinstance(value, int | float) and not (
            (self.gt is None or value > self.gt)
            and (self.ge is None or value >= self.ge)
            and (self.le is None or value <= self.le)
        ):
            raise ValueError(f"expected {self.bounds}")


def setting(*, default: object, **declared: Any) -> Any:  # as every field specifier: it stands for a field of any type
    """A field of a section, with its default as the section holds it, and what else its `Rule` says."""
    rule = Rule(default=default, **declared)
    if isinstance(default, dict):
        return dataclasses.field(default_factory=default.copy, metadata={"rule": rule})
    return dataclasses.field(default=default, metadata={"rule": rule})


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(setting,))
def section(name: str, *, choice: frozenset[str] = frozenset()) -> Callable[[type[SectionT]], type[SectionT]]:
    """Make a class a section: a frozen dataclass whose constructor fills in the other sources and validates.

    `dataclasses.replace` validates the copy; `copy` and `pickle` restore the values without reading a source again.

    Args:
        name: the section's name in the environment and in TOML.
        choice: fields of which one excludes the others: set in code, it replaces what the weaker sources chose.
    """

    def decorate(cls: type[SectionT]) -> type[SectionT]:
        made: Any = dataclass(frozen=True, kw_only=True, slots=True)(cls)
        hints = get_type_hints(cls)
        own = _SECTIONS[name] = {
            field.name: (fields.kind_of(hints[field.name]), field.metadata["rule"])
            for field in dataclasses.fields(made)
        }
        KNOWN[name] = {
            field: kind is fields.parse_ucx_settings for field, (kind, rule) in own.items() if not rule.code_only
        }
        store = made.__init__

        @functools.wraps(store)
        def initialise(self: SectionT, **arguments: object) -> None:
            for argument in arguments:
                if argument not in own:
                    raise unknown_name(f"setting of {made.__name__}", argument, own)
            given = gather(name, arguments)
            if any(arguments.get(field) is not None for field in choice):
                given = {field: one for field, one in given.items() if field in arguments or field not in choice}
            store(self, **_validated(name, given))

        made.__init__ = initialise
        return cast("type[SectionT]", made)

    return decorate


class Effective(NamedTuple):
    """A setting as a program gets it that does not set it in code; `source` is "default" if none has it."""

    value: object
    source: str
    rule: Rule


def effective(section: str) -> Mapping[str, Effective]:
    """Every setting of a section with its value and its source; errors as `gather`, and of a wrong value."""
    given = gather(section, {})
    held = _validated(section, given)
    return {
        field: Effective(held.get(field, rule.default), given[field].source if field in given else "default", rule)
        for field, (_, rule) in _SECTIONS[section].items()
    }


def _validated(section: str, given: Mapping[str, Given]) -> dict[str, object]:
    """What the section holds for what was given; all that is wrong is one error."""
    held: dict[str, object] = {}
    problems: list[str] = []
    facts: dict[str, object] = {}
    for field, one in given.items():
        kind, rule = _SECTIONS[section][field]
        try:
            held[field] = kind(one.value)
            rule.check(held[field])
        except ValueError as error:
            shown = "(hidden)" if kind is fields.parse_token else repr(one.value)
            problems.append(f"{section}.{field} = {shown} ({one.source}): {error}")
            facts = facts or {"field": field, "value": shown, "source": one.source}
    if problems:
        raise ConfigError("; ".join(problems), **facts)
    return held
