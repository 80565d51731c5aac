"""Output of the verbs: one JSON document a line for programs, tables for people, complaints on stderr."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, one document a line.")]
"""The option that every verb has."""


def print_json(document: object) -> None:
    """Write `document` to stdout as one line of JSON; bytes go as hex, dataclasses as objects."""
    sys.stdout.write(json.dumps(document, default=_plain) + "\n")
    sys.stdout.flush()


def say(document: object, *shown: object, as_json: bool, wrong: Sequence[str] = ()) -> None:
    """Print a verb's answer: the document for programs, or lines and tables for people. What is `wrong` ends it with 1.

    Lines are printed as they are: what looks like mark-up in a name is a name.
    """
    if as_json:
        print_json(document)
    else:
        for one in shown:
            if isinstance(one, str):
                typer.echo(one)
            else:
                console().print(one)
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
