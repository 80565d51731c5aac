"""`ucxx-transport doctor`: whether this machine can run the transport, and what to change if not."""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import Annotated, Any, Final

import typer

from ucxx_transport import __version__
from ucxx_transport.cli.program import AsJson, installed_version, logs_to_stderr, say
from ucxx_transport.client import SyncUCXXClient
from ucxx_transport.config import ClientConfig, RingConfig, ServerConfig
from ucxx_transport.errors import ConfigError, TransportError
from ucxx_transport.link.address import choose_address, list_interfaces, rdma_devices
from ucxx_transport.link.base import PER_CONNECTION, connection_budget
from ucxx_transport.link.ucx import limits_in_words, networks_of, resources_of
from ucxx_transport.link.ucx_api import PREFER_SYSTEM, library_in_use, load_binding
from ucxx_transport.machine import Finding, MemoryLimit, Verdict, has_proc, memory_limit, parts, pid_namespace
from ucxx_transport.ring import SharedRingBuffer
from ucxx_transport.ring.segment import SegmentInfo, host_id, list_segments, segment_folder
from ucxx_transport.server import UCXXServer
from ucxx_transport.units import format_bytes, format_duration

_UNLIMITED: Final = "unlimited"
_PAYLOAD_BYTES: Final = 1 << 20
_READS: Final = 32
_PROBE_LIMIT_S: Final = 30.0
_PROBE: Final = "from ucxx_transport.cli import doctor, program; program.print_json(doctor.describe_ucx())"
_RDMA: Final = frozenset({"rc_verbs", "rc_mlx5", "dc_mlx5", "ud_verbs", "ud_mlx5", "gga_mlx5", "srd"})
_SMALL_SHARED_MEMORY_BYTES: Final = 1 << 30  # Docker's default is 64 MiB; a ring of a few large episodes needs more
_FEW_CONNECTIONS: Final = 1024
_COLOURS: Final[dict[Verdict, str]] = {"ok": "green", "note": "blue", "warning": "yellow", "failure": "red"}


def doctor(
    *,
    loopback: Annotated[bool, typer.Option(help="Also move payloads through a ring, a server and a client.")] = True,
    as_json: AsJson = False,
) -> None:
    """Look at Python, UCX, network, shared memory and limits, and try the whole way once on this machine."""
    logs_to_stderr("error")
    looks: dict[str, Callable[[], Iterable[Finding]]]
    looks = {"software": _software, "machine": parts, "ucx": _ucx, "network": _network, "host": _host}
    looks |= {"loopback": _loopback} if loopback else {}
    findings: list[dict[str, object]] = []
    for topic, look in looks.items():
        for finding in look():
            findings.append({"topic": topic, **finding._asdict()})
            if not as_json:
                _print(topic, finding)
    failed = sum(finding["verdict"] == "failure" for finding in findings)
    verdict = f"{failed} of {len(findings)} failed." if failed else "The transport can work here."
    say({"ok": not failed, "findings": findings}, verdict, as_json=as_json)
    if failed:
        raise typer.Exit(1)


def _print(topic: str, finding: Finding) -> None:
    sign = typer.style(f"{finding.verdict:7}", fg=_COLOURS[finding.verdict])
    typer.echo(f"{sign} {f'{topic} {finding.name}':28} {finding.value}")
    if finding.remedy:
        typer.echo(f"{'':37}{typer.style(finding.remedy, dim=True)}")


def _software() -> Iterator[Finding]:
    """What is installed; nothing of it is imported."""
    yield Finding("ucxx_transport", __version__)
    yield Finding("python", f"{platform.python_version()} at {sys.executable}")
    if sys.platform != "linux":
        yield Finding("system", sys.platform, "failure", "ucxx_transport runs on Linux only")
    if find_spec("ucxx") is None:
        remedy = "only this host's rings can be read; else: pip install 'ucxx_transport[cpu]' (GPU: cu12, cu13)"
        yield Finding("ucxx", "not installed", "warning", remedy)
    else:
        found = installed_version("ucxx-cu12", "ucxx-cu13", "ucxx") or "installed, of unknown version"
        both = installed_version("ucxx-cu12") and installed_version("ucxx-cu13")
        remedy = "ucxx-cu12 and ucxx-cu13 overwrite each other: uninstall both, install one" if both else ""
        yield Finding.judged("ucxx", found, "warning", remedy)


def _ucx() -> Iterator[Finding]:
    """What UCX says of itself, in a process of its own: one that cannot start may end its process."""
    if find_spec("ucxx") is None or not has_proc():
        return
    probe = [sys.executable, "-c", _PROBE]
    how: dict[str, Any] = {"encoding": "utf-8", "errors": "replace", "env": {**os.environ, "UCX_LOG_FILE": "stderr"}}
    try:
        done = subprocess.run(probe, capture_output=True, timeout=_PROBE_LIMIT_S, check=True, **how)
    except subprocess.SubprocessError as error:
        lines = error.stderr.strip().splitlines() if isinstance(error, subprocess.CalledProcessError) else []
        remedy = "UCX itself does not start: try without your UCX_* settings, or UCX_LOG_LEVEL=info"
        yield Finding("start", lines[-1] if lines else str(error), "failure", remedy)
    else:
        facts = json.loads(done.stdout.strip().splitlines()[-1])
        yield Finding("version", f"{facts['version']} at {facts['library']}")
        yield from transport_findings(facts, rdma_devices=rdma_devices(), environment=os.environ)
    for name, value in sorted(os.environ.items()):
        if name.startswith(("UCX_", "UCXPY_", "RAPIDS_LIBUCX_")):
            yield Finding(name, value, "note", "set by you; it wins over the transport's own")


def describe_ucx() -> dict[str, object]:
    """The version of UCX and its resources, such as `["tcp", "eth0"]`, from a context as the link makes one."""
    ucx = load_binding().lib
    context = ucx.UCXContext(feature_flags=(ucx.Feature.TAG, ucx.Feature.WAKEUP))
    return {
        "version": ".".join(str(part) for part in ucx.get_ucx_version()),
        "library": str(library_in_use()),
        "resources": resources_of(context.info),
    }


def transport_findings(
    facts: Mapping[str, Any], *, rdma_devices: list[str], environment: Mapping[str, str]
) -> Iterator[Finding]:
    """Which ways UCX has by `describe_ucx`, and whether RDMA is among them where this host has hardware for it."""
    ways = sorted({f"{transport}/{device}" for transport, device in facts["resources"]})
    limits = limits_in_words({}, environment) or "this host"
    remedy = "" if networks_of(facts["resources"]) else f"{limits} leaves no network transport: remove it, or add tcp"
    yield Finding.judged("transports", ", ".join(ways) or "none", "failure", remedy)
    if _RDMA & {transport for transport, _ in facts["resources"]}:
        yield Finding("rdma", "available")
        return
    devices = f"{', '.join(rdma_devices)} in this host, but not usable by this UCX" if rdma_devices else ""
    is_asked_for = environment.get(PREFER_SYSTEM, "").lower() == "true"
    remedy = (
        "the UCX of the wheel has no verbs: where there is RDMA install a UCX that has, and set "
        f"{PREFER_SYSTEM}=true{' (it is set; is there such a UCX?)' if is_asked_for else ''}"
    )
    yield Finding("rdma", devices or "no device here", "warning" if devices else "note", remedy)


def _network() -> Iterator[Finding]:
    listed = [
        f"{one.name} {one.address}{f' ({one.rdma_device})' if one.rdma_device else ''}{'' if one.up else ' down'}"
        for one in list_interfaces()
    ]
    yield Finding("interfaces", ", ".join(listed) or "none")
    try:
        chosen = choose_address(None)
    except ConfigError as error:
        yield Finding("published address", error.message, "failure")
        return
    yield _ports()
    is_local = chosen.startswith("127.")
    remedy = "only this host reaches it; another: server.host or UCXX_TRANSPORT_SERVER__HOST" if is_local else ""
    value = f"{chosen} (listening is on all interfaces)"
    yield Finding.judged("published address", value, "warning", remedy)


def _ports() -> Finding:
    """Which ports a firewall has to open, by the settings; UCX over TCP connects in both directions."""
    try:
        server, client = ServerConfig(), ClientConfig()
    except ConfigError as error:
        return Finding("ports", error.message, "failure")
    pinned = os.environ.get("UCX_TCP_PORT_RANGE")
    serving, reading = (pinned or one.link_settings.get("TCP_PORT_RANGE", "any free") for one in (server, client))
    free = "any free" if server.base_port is None else f"from {server.base_port} on"
    listening = f"{server.ports} {free}" if isinstance(server.ports, int) else ", ".join(map(str, server.ports))
    value = f"worker: listens on {listening}, data on {serving}; trainer: data on {reading}"
    remedy = (
        "UCX connects both ways. Behind a firewall set server.base_port and data_ports of both sides, and open: "
        "trainer to worker, listening and data ports; worker to trainer, data ports"
    )
    return Finding("ports", value, "note", remedy)


def _host() -> Iterator[Finding]:
    yield _shared_memory()
    yield memory_limit_finding(memory_limit())
    yield segments_finding(list_segments())
    yield open_files_finding(*resource.getrlimit(resource.RLIMIT_NOFILE))
    locked = _limit(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0], format_bytes)
    matters = rdma_devices() and locked != _UNLIMITED
    remedy = "RDMA locks the memory it sends from: ulimit -l unlimited" if matters else ""
    yield Finding.judged("locked memory", locked, "warning", remedy)
    yield Finding("cores", str(len(os.sched_getaffinity(0))))
    if not has_proc():
        return
    remedy = "containers that show the same one read each other's rings in place: share the folder and pids"
    yield Finding("host id", f"{host_id()} (pid namespace {pid_namespace()})", remedy=remedy)


def open_files_finding(soft: int, hard: int) -> Finding:
    """The limits of descriptors: what a client or a port has of them, since it raises the first to the second."""
    room = connection_budget(limit=sys.maxsize if hard == resource.RLIM_INFINITY else hard, in_use=0, asked=None)
    few = (
        f"room for {room} connections, {PER_CONNECTION} descriptors each; this host's rings take none: ulimit -Hn 65536"
    )
    value = f"{_limit(soft, str)}, raised to {_limit(hard, str)} where needed"
    return Finding.judged("open files", value, "note", few if room < _FEW_CONNECTIONS else "")


def _limit(value: int, words: Callable[[int], str]) -> str:
    return _UNLIMITED if value == resource.RLIM_INFINITY else words(value)


def _shared_memory() -> Finding:
    folder = segment_folder()
    size = os.statvfs(folder)
    total, free = size.f_blocks * size.f_frsize, size.f_bavail * size.f_frsize
    value = f"{format_bytes(free)} free of {format_bytes(total)}"
    remedy = f"docker: --shm-size=8g; else: mount -o remount,size=8g {folder}"
    if not os.access(folder, os.W_OK):
        return Finding(str(folder), f"{value}, not writable", "failure", remedy)
    is_small = 0 < free < _SMALL_SHARED_MEMORY_BYTES
    return Finding.judged(str(folder), value, "warning", remedy if is_small else "")


def memory_limit_finding(limit: MemoryLimit | None) -> Finding:
    """What the cgroup leaves for rings, which count as its memory wherever they lie in /dev/shm."""
    if limit is None:
        return Finding("memory limit", "none")
    value = f"{format_bytes(limit.room_bytes)} left of {format_bytes(limit.limit_bytes)} ({limit.folder})"
    remedy = "a ring is memory of its worker: raise it (docker: --memory; Kubernetes: resources.limits.memory)"
    is_small = limit.room_bytes < _SMALL_SHARED_MEMORY_BYTES
    return Finding.judged("memory limit", value, "warning", remedy if is_small else "")


def segments_finding(segments: Sequence[SegmentInfo]) -> Finding:
    """How many rings there are on this host, and what dead processes left."""
    orphans = [info for info in segments if not info.creator_alive]
    value = f"{len(segments) - len(orphans)} in use, {len(orphans)} left by dead processes"
    held = format_bytes(sum(info.nbytes for info in orphans))
    remedy = f"ucxx-transport clean frees {held}; so does the next ring made here" if orphans else ""
    return Finding.judged("rings", value, "warning", remedy)


def _loopback() -> Iterator[Finding]:
    """Read payloads in place and, where ucxx is installed, over UCX; bytes are compared."""
    # What is set for this machine's own rings, such as a name or a token for one side, is not what is tried here.
    ring_config = RingConfig(slots=4, slot_bytes=_PAYLOAD_BYTES, name=None, readers=1, checksum=True)
    server_config = ServerConfig(ports=1, base_port=None, host="127.0.0.1", mode="process", token=None, shm_lanes=False)
    try:
        with SharedRingBuffer.create(ring_config) as ring:
            yield _reads(ring, ClientConfig(local="view", token=None), "in place")
            if find_spec("ucxx") is not None:
                with UCXXServer(ring, server_config):
                    over_ucx = ClientConfig(local="off", token=None, shm_lanes=False, deadline_s=10.0)
                    yield _reads(ring, over_ucx, "over UCX")
    except TransportError as error:
        yield Finding("ring, server and client", str(error), "failure")


def _reads(ring: SharedRingBuffer, settings: ClientConfig, name: str) -> Finding:
    took_s = []
    with SyncUCXXClient(settings) as client:
        for _ in range(_READS):
            sent = os.urandom(_PAYLOAD_BYTES)
            ref = ring.write_raw(sent)
            start = time.perf_counter()
            with client.read(ref) as payload:
                took_s.append(time.perf_counter() - start)
                if bytes(payload.buffer) != sent:
                    return Finding(name, "other bytes came than were written", "failure")
        lanes = [lane for lane in client.statistics().transports if lane != "unknown"]
    typical = sorted(took_s)[_READS // 2]
    through = f" through {', '.join(lanes)}" if lanes else ""
    speed = f"{_PAYLOAD_BYTES / typical / 1e9:.1f} GB/s" if name != "in place" else "nothing copied"
    size = format_bytes(_PAYLOAD_BYTES)
    return Finding(name, f"{_READS} × {size} intact, {format_duration(typical)} each, {speed}{through}")
