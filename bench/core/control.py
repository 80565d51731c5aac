"""Orders from the measuring process to its sources and readers: msgpack over a pipe, one answer an order.

| order    | `{"verb": …, "arguments": {…}}`                              |
| answer   | `{"answer": …}`, or `{"failure": traceback text}` and the end |

The process ends when the pipe does, so it cannot outlive the process that gives the orders.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import traceback
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final

import msgpack

from bench.core.cpu_time import process_tree, tree_cpu_s, tree_sleeps
from ucxx_transport.cli.program import logs_to_stderr
from ucxx_transport.errors import TransportError

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

__all__ = ["BenchError", "ControlledProcess", "serve_orders", "serve_orders_async"]

ORDER_TIMEOUT_S: Final = 300.0
STOP_TIMEOUT_S: Final = 20.0


class BenchError(TransportError):
    """A measurement could not be made; the message says which process failed and how."""


def serve_orders(
    connection: Connection,
    handler: Callable[[str], Callable[..., object]],
    before_order: Callable[[Connection], None] | None = None,
) -> None:
    """Carry out orders until the pipe closes.

    Args:
        connection: the process's end of the pipe.
        handler: what a verb calls, with the order's arguments as keywords; the result is the answer.
        before_order: runs before each order is waited for, on this thread.
    """
    while True:
        if before_order is not None:
            before_order(connection)
        order = _receive(connection)
        if order is None:
            return
        with _answering(connection) as answer:
            answer(handler(order["verb"])(**order["arguments"]))


async def serve_orders_async(
    connection: Connection, handler: Callable[[str], Callable[..., Awaitable[object]]]
) -> None:
    """The same for coroutines; the event loop stays free while an order is waited for."""
    while (order := await asyncio.to_thread(_receive, connection)) is not None:
        with _answering(connection) as answer:
            answer(await handler(order["verb"])(**order["arguments"]))


@contextmanager
def _answering(connection: Connection) -> Iterator[Callable[[object], None]]:
    try:
        yield lambda value: _answer(connection, {"answer": value})
    except Exception:
        _answer(connection, {"failure": traceback.format_exc()})
        raise


def _receive(connection: Connection) -> dict[str, Any] | None:
    try:
        order: dict[str, Any] = msgpack.unpackb(connection.recv_bytes())
    except (EOFError, ConnectionResetError):
        return None
    return order


def _answer(connection: Connection, answer: Mapping[str, object]) -> None:
    try:
        connection.send_bytes(msgpack.packb(answer))
    except (BrokenPipeError, ConnectionResetError):
        return  # no process is left to hear it; the next receive ends this one


def _run(main: Callable[..., None], *arguments: object) -> None:
    os.dup2(2, 1)  # UCX writes its warnings to standard output, which is for the answer
    logs_to_stderr()
    main(*arguments)


class ControlledProcess:
    """A process that takes orders: spawned fresh (UCX does not survive a fork), gone when this object is closed.

    Args:
        name: what failures call it.
        main: a module-level function; gets its end of the pipe, then `arguments`.
        arguments: further arguments of `main`.
    """

    def __init__(self, name: str, main: Callable[..., None], *arguments: object) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = name
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_run, args=(main, theirs, *arguments), name=name)
        self._process.start()
        theirs.close()
        self._tree: tuple[int, ...] = ()

    def call(self, verb: str, **arguments: object) -> Any:
        """Give an order and return its answer (plain values; `Any` because each verb has its own).

        Raises:
            BenchError: the process failed, ended, or did not answer in time.
        """
        self.order(verb, **arguments)
        return self.answer(verb)

    def order(self, verb: str, **arguments: object) -> None:
        """Give an order; `answer` is to be called before the next."""
        try:
            self._connection.send_bytes(msgpack.packb({"verb": verb, "arguments": arguments}))
        except BrokenPipeError:
            return  # `answer` says what became of it

    def answer(self, verb: str) -> Any:
        """The answer to the order that was given: see `call`."""
        try:
            if not self._connection.poll(ORDER_TIMEOUT_S):
                raise BenchError(f"{self.name} did not answer `{verb}` within {ORDER_TIMEOUT_S:g} s")
            reply = msgpack.unpackb(self._connection.recv_bytes())
        except (EOFError, ConnectionResetError) as error:
            self._process.join(STOP_TIMEOUT_S)
            raise BenchError(f"{self.name} ended during `{verb}`, exit code {self._process.exitcode}") from error
        if "failure" in reply:
            raise BenchError(f"{self.name} failed at `{verb}`:\n{reply['failure']}")
        return reply["answer"]

    def watch_cpu(self) -> None:
        """Take note of the processes under this one, whose CPU time counts as its own from now on."""
        assert self._process.pid is not None, "started in __init__"
        self._tree = process_tree(self._process.pid)

    @property
    def pids(self) -> tuple[int, ...]:
        """This process and all under it."""
        assert self._process.pid is not None, "started in __init__"
        return process_tree(self._process.pid)

    @property
    def cpu_s(self) -> float:
        """CPU seconds used so far by the processes seen at the last `watch_cpu()`."""
        return tree_cpu_s(self._tree)

    @property
    def sleeps(self) -> dict[str, int]:
        """How often each of their threads has gone to sleep so far."""
        return tree_sleeps(self._tree)

    def pause(self) -> None:
        """Stop the process, threads and all, so that one which polls takes nothing from others; `resume` undoes it."""
        assert self._process.pid is not None, "started in __init__"
        os.kill(self._process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Let the process run."""
        assert self._process.pid is not None, "started in __init__"
        with suppress(ProcessLookupError):
            os.kill(self._process.pid, signal.SIGCONT)

    def close(self) -> None:
        """End the process: by its pipe, and by force where that is not enough."""
        self.resume()
        self._connection.close()
        self._process.join(STOP_TIMEOUT_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
