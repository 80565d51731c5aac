"""The first lines of a sidecar: `python -P boot.py REPORT_FD ERRORS_FD ROLE`, started by `launch` and by nothing else.

It takes over the `sys.path` of its worker, with the order on its standard input, before it imports anything of this
package: a sidecar sees the modules that its worker sees, and no others.
"""

from __future__ import annotations

import json
import os
import sys
import traceback


def boot() -> int:
    """Read the order and carry it out; returns the exit status."""
    with os.fdopen(0, "rb", buffering=0, closefd=False) as pipe:  # unbuffered: what follows stays in the pipe
        line = pipe.readline()
    if not line:
        return 1  # the worker died before its order
    order = json.loads(line)
    sys.path[:] = order["sys_path"]
    report_fd, errors_fd = map(int, sys.argv[1:3])
    try:
        from ucxx_transport.sidecar.main import main

        return main(order, report_fd=report_fd, errors_fd=errors_fd, role=sys.argv[3])
    except BaseException as error:  # noqa: BLE001 - the edge of a process: its worker is to hear of it
        traceback.print_exc()
        os.write(report_fd, json.dumps({"died": f"{type(error).__name__}: {error}"}).encode() + b"\n")
        return 1


if __name__ == "__main__":
    sys.exit(boot())
