"""`ucxx-transport serve`: a ring and its server, to try the way from another process or host."""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ucxx_transport.cli.output import AsJson, logs_to_stderr, print_json
from ucxx_transport.teardown import exit_on_sigterm
from ucxx_transport.units import format_bytes, parse_bytes

if TYPE_CHECKING:
    from ucxx_transport.ring import SharedRingBuffer
    from ucxx_transport.schema import SlotRef
    from ucxx_transport.server import UCXXServer


def _size(text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def serve(
    *,
    slots: Annotated[int | None, typer.Option(min=1, max=65536, help="Slots of the ring; 16 unless set.")] = None,
    slot_bytes: Annotated[
        int | None,
        typer.Option(parser=_size, metavar="SIZE", help="Largest payload, such as 64KiB; 1MiB unless set."),
    ] = None,
    ports: Annotated[int | None, typer.Option(min=1, max=64, help="Ports of the server.")] = None,
    base_port: Annotated[int | None, typer.Option(min=1, max=65535, help="First port to try.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to publish; without it the best one of this host.")] = None,
    mode: Annotated[
        Literal["process", "thread"] | None, typer.Option(help="Server in a process of its own, or in this one.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the ring; without it a random one.")] = None,
    fill: Annotated[int, typer.Option(min=0, help="Payloads of random bytes to write, one slot each.")] = 0,
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], typer.Option(help="Of what goes to stderr.")
    ] = "info",
    as_json: AsJson = False,
) -> None:
    """Make a ring, serve it until SIGTERM or Ctrl-C, and leave nothing behind.

    What is not given comes from UCXX_TRANSPORT_* and ./ucxx_transport.toml. With --json the first line holds the
    references of the payloads written: SlotRef.from_dict(refs[0]) is what a client reads.
    """
    from ucxx_transport.config import RingConfig, ServerConfig
    from ucxx_transport.ring import SharedRingBuffer
    from ucxx_transport.server import UCXXServer
    from ucxx_transport.settings import gather

    logs_to_stderr(log_level)
    exit_on_sigterm(code=0)
    outside = gather("ring", {})
    defaults = {field: value for field, value in (("slots", 16), ("slot_bytes", "1MiB")) if field not in outside}
    ring_options: dict[str, Any] = defaults | _given(slots=slots, slot_bytes=slot_bytes, name=name)
    server_options: dict[str, Any] = _given(ports=ports, base_port=base_port, host=host, mode=mode)
    settings = RingConfig(**ring_options)
    with SharedRingBuffer.create(settings) as ring, UCXXServer(ring, ServerConfig(**server_options)) as server:
        try:
            refs = [ring.write_raw(os.urandom(ring.slot_bytes)) for _ in range(min(fill, ring.slots))]
            _announce(ring, server, refs, as_json=as_json)
            while True:
                time.sleep(3600)
        finally:
            _report(ring, server, as_json=as_json)


def _given(**options: object) -> dict[str, object]:
    return {name: value for name, value in options.items() if value is not None}


def _announce(ring: SharedRingBuffer, server: UCXXServer, refs: list[SlotRef], *, as_json: bool) -> None:
    document: dict[str, Any] = {
        "event": "serving",
        "ring": ring.name,
        "slots": ring.slots,
        "slot_bytes": ring.slot_bytes,
        "host": server.address,
        "ports": list(server.ports),
        "pid": os.getpid(),
        "server_pids": server.statistics().pids,
        "refs": [ref.to_dict() for ref in refs],
    }
    if as_json:
        print_json(document)
        return
    typer.echo(f"ring     {ring.name}: {ring.slots} slots of {format_bytes(ring.slot_bytes)}, {len(refs)} filled")
    typer.echo(f"serving  {server.address} ports {', '.join(map(str, server.ports))}; Ctrl-C ends it")
    sys.stdout.flush()


def _report(ring: SharedRingBuffer, server: UCXXServer, *, as_json: bool) -> None:
    counts = server.statistics()
    if as_json:
        print_json({"event": "stopping", "server": counts, "ring": ring.statistics()})
    else:
        delivered, sent = counts.total("delivered"), format_bytes(counts.total("bytes_sent"))
        typer.echo(f"stopping: {delivered} payloads delivered, {sent}; {counts.restarts} restarts of its ports")
