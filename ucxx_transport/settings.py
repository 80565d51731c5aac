"""Settings: a section is a frozen dataclass that validates, and whose defaults are the environment and a file.

A keyword argument wins over `UCXX_TRANSPORT_SECTION__FIELD`, of a mapping `…__FIELD__KEY`, and that over the tables of
`./ucxx_transport.toml`. Mappings are merged key by key, every other value is replaced as a whole. A name that is
unknown in any section is an error wherever it stands: a misspelt setting never passes in silence.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import os
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, ParamSpec, TypeVar, cast, dataclass_transform, get_type_hints

from ucxx_transport.errors import ConfigError, nearest_remedy
from ucxx_transport.units import Parse, kind_of, parse_store_url, parse_token, parse_ucx_settings

SectionT = TypeVar("SectionT")
T = TypeVar("T")
P = ParamSpec("P")

ENV_PREFIX: Final = "UCXX_TRANSPORT_"
_MAY_HOLD_A_SECRET: Final = (parse_token, parse_store_url)
TOML_NAME: Final = "ucxx_transport.toml"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What is declared of a setting; `metadata["rule"]` of the dataclass's field."""

    default: object  # as the section holds it; None stands for "unset", and may be given then
    description: str
    gt: float | None = None
    ge: float | None = None
    le: float | None = None  # goes with `ge`
    code_only: bool = False  # it cannot stand in the environment or in TOML
    parse: Parse = str  # its kind, once it is in a section

    def held(self, value: object) -> object:
        """What the section holds for a value that was given, or a ValueError."""
        if value is None and self.default is None:
            return None
        held: Any = self.parse(value)
        if self.gt is not None and not held > self.gt:
            raise ValueError(f"expected more than {self.gt}")
        if self.ge is not None and not self.ge <= held <= (math.inf if self.le is None else self.le):
            raise ValueError(f"expected at least {self.ge}" if self.le is None else f"expected {self.ge} to {self.le}")
        return held


SECTIONS: Final[dict[str, dict[str, Rule]]] = {}  # every setting, by section and name


class Given(NamedTuple):
    """A value, and in words where it is from: `environment UCXX_TRANSPORT_SERVER__PORTS`."""

    value: object
    source: str


def setting(description: str, *, default: object, **declared: Any) -> Any:  # `Any`: it stands for a field of any type
    """A field of a section: what it is for, its default as the section holds it, and what else its `Rule` says."""
    rule = Rule(description=description, default=default, **declared)
    if isinstance(default, dict):
        return dataclasses.field(default_factory=default.copy, metadata={"rule": rule})
    return dataclasses.field(default=default, metadata={"rule": rule})


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(setting,))
def section(name: str, *, choice: frozenset[str] = frozenset()) -> Callable[[type[SectionT]], type[SectionT]]:
    """Make a class the section `name`: a frozen dataclass whose constructor fills in the other sources and validates.

    `dataclasses.replace` validates the copy; `copy` and `pickle` restore the values without reading a source again.
    Of the fields of a `choice` one excludes the others: set in code, it replaces what the weaker sources chose.
    """

    def decorate(cls: type[SectionT]) -> type[SectionT]:
        made: Any = dataclass(frozen=True, kw_only=True, slots=True)(cls)
        hints = get_type_hints(cls, include_extras=True)
        own = SECTIONS[name] = {
            field.name: dataclasses.replace(field.metadata["rule"], parse=kind_of(hints[field.name]))
            for field in dataclasses.fields(made)
        }
        store = made.__init__

        @functools.wraps(store)
        def initialise(self: SectionT, **arguments: object) -> None:
            check_names(f"setting of {made.__name__}", arguments, own)
            given = gather(name, arguments)
            if any(arguments.get(field) is not None for field in choice):
                given = {field: one for field, one in given.items() if field in arguments or field not in choice}
            store(self, **_validated(name, given))

        made.__init__ = initialise
        return cast("type[SectionT]", made)

    return decorate


def effective(section: str) -> dict[str, Given]:
    """Every setting of a section as a program gets it that sets none in code; errors as `gather`, and of its value."""
    given = gather(section, {})
    held = _validated(section, given)
    return {
        field: Given(held[field], given[field].source) if field in given else Given(rule.default, "default")
        for field, rule in SECTIONS[section].items()
    }


def gather(section: str, arguments: Mapping[str, object]) -> dict[str, Given]:
    """What the three sources say, the stronger one winning, not validated; a ConfigError: an unknown name in one."""
    found: dict[str, Given] = {}
    in_code = [(name, Given(value, "keyword argument")) for name, value in arguments.items()]
    for name, given in (*_from_toml(section), *_from_environment(section), *in_code):
        before = found.get(name)
        if before is not None and isinstance(before.value, Mapping) and isinstance(given.value, Mapping):
            # behind the weaker ones: a kind whose names are written in several ways (`UCX_TLS`, `TLS`) takes the last
            weaker = {key: one for key, one in before.value.items() if key not in given.value}
            found[name] = Given({**weaker, **given.value}, f"{before.source}, {given.source}")
        else:
            found[name] = given
    return found


def _validated(section: str, given: Mapping[str, Given]) -> dict[str, object]:
    """What the section holds for what was given; all that is wrong is one error."""
    held: dict[str, object] = {}
    problems: list[str] = []
    facts: dict[str, object] = {}
    for field, one in given.items():
        rule = SECTIONS[section][field]
        try:
            held[field] = rule.held(one.value)
        except ValueError as error:
            shown = "(hidden)" if rule.parse in _MAY_HOLD_A_SECRET else repr(one.value)
            problems.append(f"{section}.{field} = {shown} ({one.source}): {error}")
            facts = facts or {"field": field, "value": shown, "source": one.source}
    if problems:
        raise ConfigError("; ".join(problems), **facts)
    return held


def _from_environment(section: str) -> Iterator[tuple[str, Given]]:
    # Iterating decodes each name once (0.3 µs); the values of foreign variables are never looked at.
    for variable in [name for name in os.environ if name.startswith(ENV_PREFIX)]:
        words, source = variable.removeprefix(ENV_PREFIX), f"environment {variable}"
        own_section, field, key = (*words.split("__", 2), "", "")[:3]
        own_section, field = own_section.lower(), field.lower()
        rule = _rule_of(own_section, field, source)
        if own_section != section:
            continue
        if key and rule.parse is not parse_ucx_settings:
            raise ConfigError(f"{variable}: {section}.{field} has no parts; drop '__{key}'", field=field)
        text = os.environ[variable]
        yield field, Given({key: text} if key else text, source)


def _from_toml(section: str) -> Iterator[tuple[str, Given]]:
    for own_section, table in _toml_document().items():
        if not isinstance(table, dict):
            sections = ", ".join(f"[{name}]" for name in sorted(SECTIONS))
            raise ConfigError(f"{TOML_NAME}: {own_section!r} stands outside a section; use one of {sections}")
        for name, value in table.items():
            _rule_of(own_section, name, TOML_NAME)
            if own_section == section:
                yield name, Given(value, f"{TOML_NAME} [{section}]")


def _rule_of(section: str, field: str, source: str) -> Rule:
    """The rule of a setting that may stand outside of code."""
    check_names("settings section", [section], SECTIONS, source=source)
    rules = {name: rule for name, rule in SECTIONS[section].items() if not rule.code_only}
    check_names(f"setting in [{section}]", [field], rules, source=source)
    return rules[field]


def made_of(kind: type[SectionT], given: SectionT | Mapping[str, Any] | None, field: str) -> SectionT:
    """Settings as a caller gave them for `field`: made, a dict of them, or None; a ConfigError for anything else."""
    if isinstance(given, kind):
        return given
    if given is not None and not isinstance(given, Mapping):
        words = f"{field} takes a {kind.__name__}, or a dict of its settings, not {type(given).__name__}"
        raise ConfigError(words, field=field)
    return kind(**(given or {}))


def check_can(given: object, method: str, field: str, what: str) -> None:
    """Refuse, by a ConfigError, an argument that has not the method by which `what` is used."""
    if not callable(getattr(given, method, None)):
        kind = type(given).__name__  # all that is said of it: an address may have a password in it
        raise ConfigError(f"{field} must be {what}, not {kind}", field=field)


def check_names(what: str, given: Iterable[str], known: Collection[str], **facts: object) -> None:
    """Refuse, by a ConfigError, the first of `given` that is none of `known`; with the one that was meant, or all."""
    for name in given:
        if name not in known:
            remedy = nearest_remedy(name, known) or f"known: {', '.join(sorted(known))}"
            raise ConfigError(f"Unknown {what} {name!r}; {remedy}", field=name, **facts)


def known_options(call: Callable[P, T]) -> Callable[P, T]:
    """The same call; a keyword argument that it does not take is a ConfigError with the one that was meant."""
    known = frozenset(inspect.signature(call).parameters) - {"self"}
    what = f"option of {call.__qualname__.removesuffix('.__init__')}"

    @functools.wraps(call)
    def checked(*given: P.args, **options: P.kwargs) -> T:
        check_names(what, options, known)
        return call(*given, **options)

    @functools.wraps(call)
    async def awaited(*given: P.args, **options: P.kwargs) -> object:
        check_names(what, options, known)
        return await cast("Awaitable[object]", call(*given, **options))

    # what retries or schedules a function looks which kind it is
    return cast("Callable[P, T]", awaited) if inspect.iscoroutinefunction(call) else checked


def _toml_document() -> Mapping[str, object]:
    if not os.path.exists(TOML_NAME):  # nor in a folder that may not be entered, as after a change of user
        return {}
    import tomllib

    try:
        with open(TOML_NAME, "rb") as file:
            return tomllib.load(file)
    except (OSError, ValueError) as error:  # it is no TOML, or no UTF-8
        raise ConfigError(f"{os.path.abspath(TOML_NAME)} is no TOML that can be read: {error}") from error
