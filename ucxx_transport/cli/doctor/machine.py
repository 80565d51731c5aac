"""Findings about this machine: its software, and what the transport needs of the host."""

from __future__ import annotations

import os
import platform
import resource
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

from ucxx_transport import __version__
from ucxx_transport.cli.version import installed_version
from ucxx_transport.config import ClientConfig, ServerConfig
from ucxx_transport.errors import ConfigError
from ucxx_transport.link.address import choose_address, list_interfaces
from ucxx_transport.link.settings import rdma_devices
from ucxx_transport.ring.memory_limit import MemoryLimit, memory_limit
from ucxx_transport.ring.orphans import SegmentInfo, list_segments
from ucxx_transport.ring.owner import host_id, pid_namespace, segment_folder
from ucxx_transport.units import format_bytes

Verdict = Literal["ok", "note", "warning", "failure"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        topic: software, ucx, network, host or loopback.
        name: what was looked at.
        value: what was found, in words.
        verdict: `failure`: the transport cannot work; `warning`: something will hurt; `note`: good to know.
        remedy: what to do about it; "" when nothing is to be done.
    """

    topic: str
    name: str
    value: str
    verdict: Verdict = "ok"
    remedy: str = ""


_OPTIONAL = (
    ("cupy", ("cupy-cuda12x", "cupy-cuda13x", "cupy"), "arrays on a GPU: pip install 'ucxx_transport[cu12]' (or cu13)"),
    ("torch", ("torch",), "tensors of torch: pip install 'ucxx_transport[torch]'"),
    ("gymnasium", ("gymnasium",), "the demo: pip install 'ucxx_transport[examples]'"),
)


def software_findings() -> Iterator[Finding]:
    """What is installed; nothing of it is imported."""
    yield Finding(topic="software", name="ucxx_transport", value=__version__)
    yield Finding(topic="software", name="python", value=f"{platform.python_version()} at {sys.executable}")
    if sys.platform != "linux":
        yield Finding(
            topic="software",
            name="system",
            value=sys.platform,
            verdict="failure",
            remedy="ucxx_transport runs on Linux only",
        )
    ucxx = installed_version("ucxx-cu12", "ucxx-cu13", "ucxx")
    if find_spec("ucxx") is None:
        yield Finding(
            topic="software",
            name="ucxx",
            value="not installed",
            verdict="warning",
            remedy="only this host's rings can be read; else: pip install 'ucxx_transport[cpu]' (GPU: cu12, cu13)",
        )
    else:
        both = installed_version("ucxx-cu12") and installed_version("ucxx-cu13")
        yield Finding(
            topic="software",
            name="ucxx",
            value=ucxx or "installed, of unknown version",
            verdict="warning" if both else "ok",
            remedy="ucxx-cu12 and ucxx-cu13 overwrite each other: uninstall both, install one" if both else "",
        )
    for module, distributions, purpose in _OPTIONAL:
        found = installed_version(*distributions)
        yield Finding(
            topic="software",
            name=module,
            value=found or "not installed",
            verdict="ok" if found else "note",
            remedy="" if found else purpose,
        )


_SMALL_SHARED_MEMORY_BYTES = 1 << 30
"""Docker's default is 64 MiB; a ring of a few large episodes needs more."""

_FEW_DESCRIPTORS = 4096
"""1500 idle connections exhaust the usual 1024 and deny everyone (measured)."""


def host_findings() -> Iterator[Finding]:
    """What the transport needs of this host."""
    yield from _network_findings()
    yield _shared_memory()
    yield memory_limit_finding(memory_limit())
    yield segments_finding(list_segments())
    yield _descriptors()
    yield _locked_memory()
    yield Finding(topic="host", name="cores", value=str(len(os.sched_getaffinity(0))))
    yield Finding(
        topic="host",
        name="host id",
        value=f"{host_id()} (pid namespace {pid_namespace()})",
        remedy="containers that show the same one read each other's rings in place: share the folder and pids",
    )


def _network_findings() -> Iterator[Finding]:
    listed = [
        f"{one.name} {one.address}{f' ({one.rdma_device})' if one.rdma_device else ''}{'' if one.up else ' down'}"
        for one in list_interfaces()
    ]
    yield Finding(topic="network", name="interfaces", value=", ".join(listed) or "none")
    try:
        chosen = choose_address(None)
    except ConfigError as error:
        yield Finding(topic="network", name="published address", value=error.message, verdict="failure")
        return
    yield _ports()
    alone = chosen.startswith("127.")
    yield Finding(
        topic="network",
        name="published address",
        value=f"{chosen} (listening is on all interfaces)",
        verdict="warning" if alone else "ok",
        remedy="only this host reaches it; another: server.host or UCXX_TRANSPORT_SERVER__HOST" if alone else "",
    )


def _ports() -> Finding:
    """Which ports a firewall has to open, by the settings; UCX over TCP connects in both directions."""
    try:
        server, client = ServerConfig(), ClientConfig()
    except ConfigError as error:
        return Finding(topic="network", name="ports", value=error.message, verdict="failure")
    pinned = os.environ.get("UCX_TCP_PORT_RANGE")
    serving, reading = (
        pinned or ("any free" if one.data_ports is None else "-".join(map(str, one.data_ports)))
        for one in (server, client)
    )
    listening = ", ".join(map(str, () if isinstance(server.ports, int) else server.ports)) or (
        f"{server.ports} any free" if server.base_port is None else f"{server.ports} from {server.base_port} on"
    )
    return Finding(
        topic="network",
        name="ports",
        value=f"worker: listens on {listening}, data on {serving}; trainer: data on {reading}",
        verdict="note",
        remedy="UCX connects both ways. Behind a firewall set server.base_port and data_ports of both sides, and open: "
        "trainer to worker, listening and data ports; worker to trainer, data ports",
    )


def _shared_memory() -> Finding:
    folder = segment_folder()
    size = os.statvfs(folder)
    total, free = size.f_blocks * size.f_frsize, size.f_bavail * size.f_frsize
    small = 0 < free < _SMALL_SHARED_MEMORY_BYTES
    writable = os.access(folder, os.W_OK)
    verdict: Verdict = "failure" if not writable else "warning" if small else "ok"
    return Finding(
        topic="host",
        name=str(folder),
        value=f"{format_bytes(free)} free of {format_bytes(total)}" + ("" if writable else ", not writable"),
        verdict=verdict,
        remedy="" if verdict == "ok" else f"docker: --shm-size=8g; else: mount -o remount,size=8g {folder}",
    )


def memory_limit_finding(limit: MemoryLimit | None) -> Finding:
    """What the cgroup leaves for rings, which count as its memory wherever they lie in /dev/shm.

    Args:
        limit: of the group that leaves the least; None without a limit.
    """
    if limit is None:
        return Finding(topic="host", name="memory limit", value="none")
    small = limit.room_bytes < _SMALL_SHARED_MEMORY_BYTES
    return Finding(
        topic="host",
        name="memory limit",
        value=f"{format_bytes(limit.room_bytes)} left of {format_bytes(limit.limit_bytes)} ({limit.folder})",
        verdict="warning" if small else "ok",
        remedy="a ring is memory of its worker: raise it (docker: --memory; Kubernetes: resources.limits.memory)"
        if small
        else "",
    )


def segments_finding(segments: Sequence[SegmentInfo]) -> Finding:
    """How many rings there are, and what dead processes left.

    Args:
        segments: those of this host.
    """
    orphans = [info for info in segments if not info.creator_alive]
    held = format_bytes(sum(info.nbytes for info in orphans))
    return Finding(
        topic="host",
        name="rings",
        value=f"{len(segments) - len(orphans)} in use, {len(orphans)} left by dead processes",
        verdict="warning" if orphans else "ok",
        remedy=f"ucxx-transport clean frees {held}; so does the next ring made here" if orphans else "",
    )


def _descriptors() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = soft != resource.RLIM_INFINITY and soft < _FEW_DESCRIPTORS
    return Finding(
        topic="host",
        name="open files",
        value=f"{_limit(soft)} (at most {_limit(hard)})",
        verdict="note" if few else "ok",
        remedy="each connection takes one: ulimit -n 65536 for a server of many trainers" if few else "",
    )


def _locked_memory() -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    matters = bool(rdma_devices()) and soft != resource.RLIM_INFINITY
    return Finding(
        topic="host",
        name="locked memory",
        value="unlimited" if soft == resource.RLIM_INFINITY else format_bytes(soft),
        verdict="warning" if matters else "ok",
        remedy="RDMA locks the memory it sends from: ulimit -l unlimited" if matters else "",
    )


def _limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else str(value)
