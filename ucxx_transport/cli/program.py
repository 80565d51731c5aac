"""The program: its verbs, how what goes wrong ends it, what verbs print; and the verbs `version` and `config`.

A verb prints one JSON document a line for programs, or lines and tables for people; complaints go to stderr. It exits
with 0 when it is done (`serve`: ended by SIGTERM), 1 when it has failed (why: on stderr, or as JSON on stdout), 2 after
wrong use (unknown verb, option or value), 130 when it was interrupted.

Only the verb that is called is imported, so that `version` costs no more than it must.

Two verbs are programs that are no part of the library, the demo and the benchmarks: beside the package in a clone, in
its folder `_programs` in an installed wheel, which pyproject.toml fills.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from importlib import import_module, metadata
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Final, NamedTuple, NoReturn

import typer

import ucxx_transport
from ucxx_transport.errors import ConfigError, TransportError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

VERBS: Final[Mapping[str, str]] = {
    "demo": "cartpole.command:demo",
    "serve": "ucxx_transport.cli.verbs:serve",
    "doctor": "ucxx_transport.cli.doctor:doctor",
    "inspect": "ucxx_transport.cli.verbs:inspect",
    "top": "ucxx_transport.cli.verbs:top",
    "bench": "bench.core.command:bench",
    "registry": "ucxx_transport.cli.verbs:registry",
    "clean": "ucxx_transport.cli.verbs:clean",
    "config": "ucxx_transport.cli.program:config",
    "version": "ucxx_transport.cli.program:version",
}
"""Module and function of each verb; a module outside of the package is that of a program."""

EXTRA_OF: Final[Mapping[str, str]] = {
    "ucxx": "cpu",
    "rich": "cli",
    "zmq": "bench",
    "gymnasium": "examples",
    "matplotlib": "examples",
    "ale_py": "atari",
    "cupy": "cu12",
    "torch": "torch",
}
"""Which extra brings a module that a verb may find missing."""

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, one document a line.")]
"""The option that every verb has."""

_IN_CLONE: Final[Mapping[str, str]] = {"cartpole": "examples/cartpole", "bench": "bench"}
_INTERRUPTED: Final = 130


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command, with `arguments` behind its name or this process's own, and exit."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    if words[:1] == ["--version"]:
        words[0] = "version"
    called = [words[0]] if words and words[0] in VERBS else list(VERBS)
    try:
        _program(called)(args=words, prog_name="ucxx-transport")
    except KeyboardInterrupt:
        sys.exit(_INTERRUPTED)
    except (TransportError, ModuleNotFoundError) as error:
        message, facts = _explained(error)
        if "--json" in words:
            print_json({"error": {"kind": type(error).__name__, "message": message, "facts": facts}})
        else:
            print_error(message, facts)
        sys.exit(1)
    except OSError as error:
        print_error("this machine refuses what the command needs", {"reason": str(error)})
        # a full disk refuses what is flushed at exit, too
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    sys.exit(0)


def _explained(error: TransportError | ModuleNotFoundError) -> tuple[str, Mapping[str, object]]:
    """What went wrong, and its facts; a module that no extra brings is raised as it is."""
    if isinstance(error, TransportError):
        return error.message, error.facts
    extra = EXTRA_OF.get((error.name or "").partition(".")[0])
    if extra is None:
        raise error
    remedy = f"{error.name} is not installed: pip install 'ucxx_transport[{extra}]'"
    return remedy, {"module": error.name, "extra": extra}


def _program(verbs: Iterable[str]) -> typer.Typer:
    help_options = {"help_option_names": ["-h", "--help"]}
    program = typer.Typer(
        add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, context_settings=help_options
    )
    program.callback()(_all_verbs)  # without it a single verb would be the whole program
    for verb in verbs:
        command, takes = _load(verb)
        program.command(verb, context_settings=takes)(command)
    return program


def _all_verbs() -> None:
    """RL trajectories from rollout workers' shared memory to trainers, over UCX."""


def _load(verb: str) -> tuple[Callable[..., object], dict[str, bool]]:
    """A verb's function, and how its words are read. `--help` lists one that cannot be imported too: a stand-in."""
    module, _, function = VERBS[verb].partition(":")
    load = import_module if module.startswith("ucxx_transport.") else import_program
    try:
        return getattr(load(module), function), {}
    except (ConfigError, ModuleNotFoundError) as error:
        cause = error

    def fail() -> None:
        raise cause

    fail.__doc__, _ = _explained(cause)
    return fail, {"allow_extra_args": True, "ignore_unknown_options": True}


def program_folder(name: str, package: Path | None = None) -> Path:
    """The folder of a program, by its row of the table; a ConfigError where `package` and its clone have none."""
    package = package or Path(ucxx_transport.__file__).parent
    installed, cloned = package / "_programs" / name, package.parent / _IN_CLONE[name]
    if installed.is_dir():
        return installed
    # Beside an installed package lie other packages: a folder of that name counts only in a clone.
    if cloned.is_dir() and (package.parent / "pyproject.toml").is_file():
        return cloned
    raise ConfigError(
        f"the program {name!r} is not in this installation: install the wheel, or clone the repository",
        installed=str(installed),
        cloned=str(cloned),
    )


def import_program(module: str) -> ModuleType:
    """Import a program's module, for example "cartpole.command"; errors as `program_folder`."""
    around = str(program_folder(module.partition(".")[0]).parent)
    if sys.path[:1] != [around]:  # which multiprocessing hands to spawned children
        sys.path.insert(0, around)
    return import_module(module)


def print_json(document: object) -> None:
    """Write `document` to stdout as one line of JSON; bytes go as hex, dataclasses as objects."""
    sys.stdout.write(json.dumps(document, default=_plain) + "\n")
    sys.stdout.flush()


class Rows(NamedTuple):
    """A table for people. What looks like mark-up in a cell is a name."""

    columns: Sequence[str]
    rows: Iterable[Sequence[object]]
    numbers: Sequence[str] = ()

    def table(self) -> Table:
        """For the console; the columns of `numbers` are set right."""
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False)
        for name in self.columns:
            table.add_column(name, justify="right" if name in self.numbers else "left")
        for row in self.rows:
            table.add_row(*(Text(str(cell)) for cell in row))
        return table


def say(document: object, *shown: str | Rows, as_json: bool, wrong: Sequence[str] = ()) -> None:
    """Print a verb's answer: the document for programs, or what is shown to people. What is `wrong` ends it with 1."""
    if as_json:
        print_json(document)
    else:
        for one in shown:
            if isinstance(one, str):
                typer.echo(one)
            else:
                console().print(one.table())
    for line in wrong:
        typer.echo(line, err=True)
    if wrong:
        raise typer.Exit(1)


def print_error(message: str, facts: Mapping[str, object]) -> None:
    """Write what went wrong to stderr, its facts indented below."""
    lines = [f"error: {message}", *(f"  {name} = {value}" for name, value in facts.items())]
    sys.stderr.write("\n".join(lines) + "\n")


def console(*, stderr: bool = False) -> Console:
    """A terminal, or plain text with unbroken rows where stdout is none."""
    from rich.console import Console

    terminal = Console(stderr=stderr, highlight=False)
    return terminal if terminal.is_terminal else Console(stderr=stderr, highlight=False, width=max(terminal.width, 320))


def logs_to_stderr(level: str = "warning") -> None:
    """Send this program's log events of `level` and above to stderr; the library itself configures no logging."""
    import logging

    import structlog

    std, dev = structlog.stdlib, structlog.dev
    shown = dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=dev.plain_traceback)
    time = structlog.processors.TimeStamper(fmt="iso", utc=False)
    handler = logging.StreamHandler(sys.stderr)
    formatter = std.ProcessorFormatter(shown, foreign_pre_chain=[std.add_log_level, std.ExtraAdder(), time])
    handler.setFormatter(formatter)
    logger = logging.getLogger("ucxx_transport")
    logger.addHandler(handler)
    logger.setLevel(level.upper())


def _plain(value: object) -> object:
    if isinstance(value, bytes | Path):
        return value.hex() if isinstance(value, bytes) else str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


def version(*, as_json: AsJson = False) -> None:
    """Show the version of this package, of Python, ucxx and UCX."""
    found = {
        "ucxx_transport": ucxx_transport.__version__,
        "python": platform.python_version(),
        "ucxx": installed_version("ucxx-cu12", "ucxx-cu13", "ucxx"),
        "libucx": installed_version("libucx-cu12", "libucx-cu13", "libucx"),
    }
    say(found, *(f"{name:15} {value or 'not installed'}" for name, value in found.items()), as_json=as_json)


def installed_version(*distributions: str) -> str | None:
    """The version of the first of these distributions that is installed, or None; nothing is loaded."""
    for name in distributions:
        with suppress(metadata.PackageNotFoundError):
            return metadata.version(name)
    return None


def config(*, as_json: AsJson = False) -> None:
    """Show every setting, its value and its source; what is wrong with them is an error here too."""
    from ucxx_transport.config import ClientConfig, PublisherConfig, ServerConfig, StoreConfig
    from ucxx_transport.settings import ENV_PREFIX, SECTIONS, TOML_NAME, effective
    from ucxx_transport.units import Secret

    for checked in (ServerConfig, ClientConfig, StoreConfig, PublisherConfig):
        checked()  # a ring's is often complete in code alone
    settings: dict[str, dict[str, dict[str, object]]] = {name: {} for name in SECTIONS}
    rows: list[Sequence[object]] = []
    for name, rules in SECTIONS.items():
        for field, given in effective(name).items():
            value = "(set, hidden)" if isinstance(given.value, Secret) else given.value
            settings[name][field] = {"value": value, "source": given.source, "description": rules[field].description}
            rows.append((f"{name}.{field}", *settings[name][field].values()))
    file = os.path.abspath(TOML_NAME) if os.path.exists(TOML_NAME) else None
    title = f"{ENV_PREFIX}*  over  {file or f'./{TOML_NAME} (none here)'}"
    shown = Rows(("setting", "value", "source", "meaning"), rows)
    say({"file": file, **settings}, title, shown, as_json=as_json)
