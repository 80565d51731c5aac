"""The trainer's side: this package's own clients as subjects."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING

from bench.core.reader import AsyncReading, ReaderSettings, Reading, run_async_reader, run_reader
from ucxx_transport import ClientConfig, SlotRef, SyncUCXXClient, UCXXClient

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

__all__ = ["client_config", "run_transport_reader", "run_transport_reader_async"]


def run_transport_reader(connection: Connection) -> None:
    """Be a reading process with `SyncUCXXClient` until the pipe closes."""
    run_reader(connection, _open)


def run_transport_reader_async(connection: Connection) -> None:
    """Be a reading process with `UCXXClient` until the pipe closes."""
    run_async_reader(connection, _open_async)


def client_config(settings: ReaderSettings) -> ClientConfig:
    """The client's settings: its defaults, but for the way of reading and a deadline that a busy machine can keep."""
    return ClientConfig(
        local=settings.local,
        shm_lanes=settings.shm_lanes,
        deadline_s=settings.deadline_s,
        max_concurrent_reads=max(4, settings.in_flight),
    )


@contextmanager
def _open(settings: ReaderSettings) -> Iterator[Reading]:
    with SyncUCXXClient(client_config(settings)) as client:
        yield Reading(resolve=SlotRef.from_dict, read=client.read)


@asynccontextmanager
async def _open_async(settings: ReaderSettings) -> AsyncIterator[AsyncReading]:
    async with UCXXClient(client_config(settings)) as client:
        yield AsyncReading(resolve=SlotRef.from_dict, read=client.read)
