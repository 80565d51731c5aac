"""`ucxx-transport version`: what is installed, without loading it."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of

import typer

from ucxx_transport import __version__
from ucxx_transport.cli.output import AsJson, print_json


def version(*, as_json: AsJson = False) -> None:
    """Show the version of this package, of Python, ucxx and UCX."""
    found = {
        "ucxx_transport": __version__,
        "python": platform.python_version(),
        "ucxx": installed_version("ucxx-cu12", "ucxx-cu13", "ucxx"),
        "libucx": installed_version("libucx-cu12", "libucx-cu13", "libucx"),
    }
    if as_json:
        print_json(found)
        return
    for name, value in found.items():
        typer.echo(f"{name:15} {value or 'not installed'}")


def installed_version(*distributions: str) -> str | None:
    """The version of the first of these distributions that is installed, or None."""
    for name in distributions:
        try:
            return version_of(name)
        except PackageNotFoundError:
            continue
    return None
