"""The processes that the transport's own subjects need, and who reads from which."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace

from bench.core.control import ControlledProcess
from bench.core.memory_copy import OwnMemory, run_memory_copy_reader
from bench.core.ring_source import SourceSettings, run_ring_source
from bench.core.rounds import Lane, ProcessSource
from bench.core.subjects import COPY_SUBJECTS, MEMCPY, SHM_SUBJECTS, TCP_SUBJECTS, VIEW_SUBJECTS
from bench.core.transport_reader import run_transport_reader, run_transport_reader_async

__all__ = ["transport_lanes"]


def transport_lanes(stack: ExitStack, settings: SourceSettings) -> list[Lane]:
    """Start the processes and line up the subjects: local view and copy, UCX over TCP and shared memory, and memcpy.

    Args:
        stack: ends the processes when it is closed.
        settings: of both servers, but for `shm_lanes`; reads in place take place in the ring of the first.
    """
    start = stack.enter_context
    plain = ProcessSource(start(ControlledProcess("ring, TCP", run_ring_source, replace(settings, shm_lanes=False))))
    lanes = ProcessSource(
        start(ControlledProcess("ring, shm lanes", run_ring_source, replace(settings, shm_lanes=True)))
    )
    readers = {
        "async": start(ControlledProcess("async client", run_transport_reader_async)),
        "sync": start(ControlledProcess("sync client", run_transport_reader)),
    }
    memory_copy = Lane(MEMCPY, OwnMemory(), start(ControlledProcess("memcpy", run_memory_copy_reader)))
    own = [
        Lane(subject, lanes if subject.shm_lanes else plain, readers[subject.client])
        for subject in (*VIEW_SUBJECTS, *COPY_SUBJECTS, *SHM_SUBJECTS, *TCP_SUBJECTS)
    ]
    return [*own, memory_copy]
