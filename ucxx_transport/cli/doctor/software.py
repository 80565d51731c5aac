"""Python and the packages: what is installed, and what a missing one would be for."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from importlib.util import find_spec

from ucxx_transport import __version__
from ucxx_transport.cli.doctor.finding import Finding
from ucxx_transport.cli.version import installed_version

__all__ = ["software_findings"]

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
