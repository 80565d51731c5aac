"""The verb itself: collects what was found, and says whether the transport can work here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Annotated, Final

import typer

from ucxx_transport.cli.doctor.finding import Finding, Verdict
from ucxx_transport.cli.output import AsJson, console, logs_to_stderr, print_json

__all__ = ["doctor"]

_SIGNS: Final[dict[Verdict, str]] = {
    "ok": "[green]ok[/green]",
    "note": "[blue]note[/blue]",
    "warning": "[yellow]warning[/yellow]",
    "failure": "[bold red]failure[/bold red]",
}


def doctor(
    *,
    loopback: Annotated[bool, typer.Option(help="Also move payloads through a ring, a server and a client.")] = True,
    as_json: AsJson = False,
) -> None:
    """Look at Python, UCX, network, shared memory and limits, and try the whole way once on this machine."""
    logs_to_stderr("error")
    findings = []
    for finding in _findings(loopback=loopback):
        findings.append(finding)
        if not as_json:
            _print(finding)
    failures = [finding for finding in findings if finding.verdict == "failure"]
    if as_json:
        print_json({"ok": not failures, "findings": findings})
    elif not failures:
        console().print("[green]The transport can work here.[/green]")
    else:
        console().print(f"[bold red]{len(failures)} of {len(findings)} failed.[/bold red]")
    if failures:
        raise typer.Exit(1)


def _findings(*, loopback: bool) -> Iterator[Finding]:
    from ucxx_transport.cli.doctor.host import host_findings
    from ucxx_transport.cli.doctor.software import software_findings
    from ucxx_transport.cli.doctor.ucx import ucx_findings

    sources: list[Iterable[Finding]] = [software_findings(), ucx_findings(), host_findings()]
    if loopback:
        from ucxx_transport.cli.doctor.loopback import loopback_findings

        sources.append(loopback_findings())
    for source in sources:
        yield from source


def _print(finding: Finding) -> None:
    from rich.markup import escape

    sign = _SIGNS[finding.verdict]
    padding = " " * (8 - len(finding.verdict))
    terminal = console()
    terminal.print(f"{sign}{padding}{finding.topic + ' ' + finding.name:28} {escape(finding.value)}", soft_wrap=True)
    if finding.remedy:
        terminal.print(f"{'':37}[dim]{escape(finding.remedy)}[/dim]", soft_wrap=True)
