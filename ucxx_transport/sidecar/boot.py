"""The first lines of a sidecar: `python -P boot.py REPORT_FD STDERR_FD ROLE`, started by `process` and by nothing else.

It takes over the `sys.path` of its worker, with the order on its standard input, before it imports anything of this
package: a sidecar sees the modules that its worker sees, and no others.
"""

from __future__ import annotations

import json
import os
import sys


def boot() -> int:
    """Read the order and carry it out; returns the exit status."""
    with os.fdopen(0, "rb", buffering=0, closefd=False) as pipe:  # unbuffered: what follows stays in the pipe
        line = pipe.readline()
    if not line:
        return 1  # the worker died before its order
    order = json.loads(line)
    sys.path[:] = order["sys_path"]
    from ucxx_transport.sidecar.main import main

    return main(order, report_fd=int(sys.argv[1]), stderr_fd=int(sys.argv[2]), role=sys.argv[3])


if __name__ == "__main__":
    sys.exit(boot())
