"""UCX: whether it starts, which transports it has, and what the user's UCX_* settings are.

Run as a program it prints as JSON what UCX says of itself here: in a process of its own, since a UCX that cannot start
may end its process, and a doctor should survive that.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any

from ucxx_transport.cli.doctor.machine import Finding
from ucxx_transport.link.libraries import PREFER_SYSTEM, library_in_use
from ucxx_transport.link.settings import limits_in_words, networks_of, rdma_devices, resources_of

_PROBE_LIMIT_S = 30.0
_RDMA = frozenset({"rc_verbs", "rc_mlx5", "dc_mlx5", "ud_verbs", "ud_mlx5", "gga_mlx5", "srd"})


def ucx_findings() -> Iterator[Finding]:
    """What UCX says of itself, asked in a process of its own; nothing where ucxx is not installed."""
    if find_spec("ucxx") is None:
        return
    try:
        done = subprocess.run(
            [sys.executable, "-m", "ucxx_transport.cli.doctor.ucx"],
            capture_output=True,
            text=True,
            timeout=_PROBE_LIMIT_S,
            check=True,
        )
        facts = json.loads(done.stdout.strip().splitlines()[-1])
    except subprocess.TimeoutExpired:
        yield _does_not_start(f"no answer within {_PROBE_LIMIT_S:g} s")
    except subprocess.CalledProcessError as error:
        yield _does_not_start((error.stderr.strip().splitlines() or [f"exit code {error.returncode}"])[-1])
    except (ValueError, IndexError) as error:
        yield _does_not_start(f"its answer makes no sense: {error}")
    else:
        yield Finding(topic="ucx", name="version", value=f"{facts['version']} at {facts['library']}")
        yield from transport_findings(facts, rdma_devices=rdma_devices(), environment=os.environ)
    yield from _setting_findings(os.environ)


def transport_findings(
    facts: Mapping[str, Any], *, rdma_devices: list[str], environment: Mapping[str, str]
) -> Iterator[Finding]:
    """Which ways UCX has, and whether RDMA is among them where there is hardware for it.

    Args:
        facts: the probe's answer.
        rdma_devices: RDMA devices of this host, such as `mlx5_0`.
        environment: the process's environment.
    """
    ways = sorted({f"{transport}/{device}" for transport, device in facts["resources"]})
    networks = networks_of(facts["resources"])
    limits = limits_in_words({}, environment)
    yield Finding(
        topic="ucx",
        name="transports",
        value=", ".join(ways) or "none",
        verdict="ok" if networks else "failure",
        remedy="" if networks else f"{limits or 'this host'} leaves no network transport: remove it, or add tcp",
    )
    if _RDMA & {transport for transport, _ in facts["resources"]}:
        yield Finding(topic="ucx", name="rdma", value="available")
        return
    is_asked_for = environment.get(PREFER_SYSTEM, "").lower() == "true"
    yield Finding(
        topic="ucx",
        name="rdma",
        value=f"{', '.join(rdma_devices)} in this host, but not usable by this UCX"
        if rdma_devices
        else "no device here",
        verdict="warning" if rdma_devices else "note",
        remedy="the UCX of the wheel has no verbs: where there is RDMA install a UCX that has, and set "
        f"{PREFER_SYSTEM}=true{' (it is set; is there such a UCX?)' if is_asked_for else ''}",
    )


def _setting_findings(environment: Mapping[str, str]) -> Iterator[Finding]:
    own = {name: value for name, value in environment.items() if name.startswith(("UCX_", "UCXPY_", "RAPIDS_LIBUCX_"))}
    for name, value in sorted(own.items()):
        yield Finding(
            topic="ucx", name=name, value=value, verdict="note", remedy="set by you; it wins over the transport's own"
        )


def _does_not_start(reason: str) -> Finding:
    return Finding(
        topic="ucx",
        name="start",
        value=reason,
        verdict="failure",
        remedy="UCX itself does not start: try without your UCX_* settings, or UCX_LOG_LEVEL=info",
    )


def describe_ucx() -> dict[str, object]:
    """The version of UCX and its resources, such as `["tcp", "eth0"]`, from a context as the link makes one."""
    from ucxx_transport.link.ucx_api import load_binding

    ucx = load_binding().lib
    context = ucx.UCXContext(feature_flags=(ucx.Feature.TAG, ucx.Feature.WAKEUP))
    return {
        "version": ".".join(str(part) for part in ucx.get_ucx_version()),
        "library": str(library_in_use()),
        "resources": resources_of(context.info),
        "cuda": bool(context.cuda_support),
    }


if __name__ == "__main__":
    json.dump(describe_ucx(), sys.stdout)
