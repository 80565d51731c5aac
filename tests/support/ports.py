"""TCP ports for what a test starts: each test process has a range of its own, also beside another clone's run.

The ranges lie below the kernel's ephemeral ports (32768-60999), so no outgoing connection takes one between two starts
of a server. The first port of a range is bound for as long as its process lives, which keeps the others out.
"""

from __future__ import annotations

import socket
from itertools import cycle
from typing import Final

__all__ = ["free_ports", "reserve_ports"]

_FIRST, _LAST, _SPAN = 20_000, 30_000, 100
_ANY_HOST: Final = "0.0.0.0"  # noqa: S104 - what UCX binds


class _Range:
    """The ports that one process may use.

    Args:
        guard: the port in front of them.
    """

    def __init__(self, guard: int) -> None:
        self._ports = range(guard + 1, guard + _SPAN)
        self._next = cycle(self._ports)

    def take(self, count: int) -> list[int]:
        taken: list[int] = []
        for _ in range(2 * len(self._ports)):
            port = next(self._next)
            in_a_row = not taken or port == taken[-1] + 1
            taken = ([*taken, port] if in_a_row else [port]) if _is_free(port) else []
            if len(taken) == count:
                return taken
        raise AssertionError(f"no {count} free ports in a row in {self._ports}")


_own: _Range | None = None


def reserve_ports() -> None:
    """Give this process its range.

    At the start of a session, so that no test is blamed for the socket that keeps the others out.
    """
    global _own  # noqa: PLW0603 - one range a process
    for port in range(_FIRST, _LAST, _SPAN):
        guard = socket.socket()
        try:
            guard.bind((_ANY_HOST, port))
        except OSError:
            guard.close()
            continue
        guard.detach()  # bound until the process ends
        _own = _Range(port)
        return
    raise AssertionError("every range of ports is in use")


def free_ports(count: int) -> list[int]:
    """Ports in a row that no socket is bound to; the next call begins behind them."""
    if _own is None:
        reserve_ports()
    assert _own is not None
    return _own.take(count)


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind((_ANY_HOST, port))
        except OSError:
            return False
        return True
