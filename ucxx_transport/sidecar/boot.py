"""The first lines of a sidecar: `python -P boot.py SOCKET ERRORS ROLE`, started by `launch` and by nothing else.

Its standard input holds the `sys.path` of its worker, which it takes over before it imports anything of this package: a
sidecar sees the modules that its worker sees, and no others.
"""

from __future__ import annotations

import json
import os
import sys
import traceback

LONGEST = 4096  # characters of the reason: a report is read whole


if __name__ == "__main__":
    worker, errors = map(int, sys.argv[1:3])
    sys.path[:] = json.load(sys.stdin)
    try:
        from ucxx_transport.sidecar.main import main

        status = main(worker, errors, sys.argv[3])
    except BaseException as error:  # noqa: BLE001 - the edge of a process: its worker is to hear of it
        traceback.print_exc()
        os.write(worker, json.dumps({"died": f"{type(error).__name__}: {error}"[:LONGEST]}).encode())
        status = 1
    sys.exit(status)
