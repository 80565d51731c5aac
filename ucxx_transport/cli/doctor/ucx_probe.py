"""Run as a program of its own: print as JSON what UCX says of itself here.

A process of its own, since a UCX that cannot start may end its process, and a doctor should survive that.
"""

from __future__ import annotations

import json
import re
import sys

_RESOURCE = re.compile(r"resource\s+\d+\s*:\s*md\s+\d+\s+dev\s+\d+\s+flags\s+\S+\s+(\S+)/(\S+)")


def describe_ucx() -> dict[str, object]:
    """The version of UCX and its resources, such as `["tcp", "eth0"]`, from a context as the link makes one."""
    from importlib import import_module

    ucx = import_module("ucxx._lib.libucxx")
    context = ucx.UCXContext(feature_flags=(ucx.Feature.TAG, ucx.Feature.WAKEUP))
    return {
        "version": ".".join(str(part) for part in ucx.get_ucx_version()),
        "resources": _RESOURCE.findall(context.info),
        "cuda": bool(context.cuda_support),
    }


if __name__ == "__main__":
    json.dump(describe_ucx(), sys.stdout)
