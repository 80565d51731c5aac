"""The verb itself: collects the findings, moves payloads once, and says whether the transport can work here."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from statistics import median
from typing import Annotated, Final

import typer

from ucxx_transport.cli.doctor.machine import Finding, Verdict, host_findings, software_findings
from ucxx_transport.cli.doctor.ucx import ucx_findings
from ucxx_transport.cli.output import AsJson, console, logs_to_stderr, print_json
from ucxx_transport.client import SyncUCXXClient
from ucxx_transport.config import ClientConfig, RingConfig, ServerConfig
from ucxx_transport.errors import TransportError
from ucxx_transport.ring import SharedRingBuffer
from ucxx_transport.server import UCXXServer
from ucxx_transport.units import format_bytes, format_duration

_PAYLOAD_BYTES = 1 << 20
_READS = 32
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
    sources: list[Iterable[Finding]] = [software_findings(), ucx_findings(), host_findings()]
    if loopback:
        sources.append(_loopback_findings())
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


def _loopback_findings() -> Iterator[Finding]:
    """Read payloads in place and, where ucxx is installed, over UCX; bytes are compared."""
    try:
        # What is set for this machine's own rings, such as a name or a token for one side, is not what is tried here.
        with SharedRingBuffer.create(
            RingConfig(slots=4, slot_bytes=_PAYLOAD_BYTES, name=None, readers=1, checksum=True)
        ) as ring:
            yield _reads(ring, ClientConfig(local="view", token=None), "in place")
            if find_spec("ucxx") is None:
                return
            with UCXXServer(
                ring,
                ServerConfig(ports=1, base_port=None, host="127.0.0.1", mode="process", token=None, shm_lanes=False),
            ):
                yield _reads(ring, ClientConfig(local="off", token=None, shm_lanes=False, deadline_s=10.0), "over UCX")
    except TransportError as error:
        yield Finding(topic="loopback", name="ring and server", value=str(error), verdict="failure")


def _reads(ring: SharedRingBuffer, settings: ClientConfig, name: str) -> Finding:
    took_s = []
    with SyncUCXXClient(settings) as client:
        for _ in range(_READS):
            sent = os.urandom(_PAYLOAD_BYTES)
            ref = ring.write_raw(sent)
            start = time.perf_counter()
            try:
                with client.read(ref) as payload:
                    took_s.append(time.perf_counter() - start)
                    intact = bytes(payload.buffer) == sent
            except TransportError as error:
                return Finding(topic="loopback", name=name, value=str(error), verdict="failure")
            if not intact:
                return Finding(
                    topic="loopback", name=name, value="other bytes came than were written", verdict="failure"
                )
        lanes = [lane for lane in client.statistics().transports if lane != "unknown"]
    typical = median(took_s)
    through = f" through {', '.join(lanes)}" if lanes else ""
    speed = f"{_PAYLOAD_BYTES / typical / 1e9:.1f} GB/s" if name != "in place" else "nothing copied"
    size = format_bytes(_PAYLOAD_BYTES)
    return Finding(
        topic="loopback",
        name=name,
        value=f"{_READS} × {size} intact, {format_duration(typical)} each, {speed}{through}",
    )
