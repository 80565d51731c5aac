"""Results for machines: one JSON document that says what was measured, in which units, where and how."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final

from bench.core.host import host_facts
from bench.core.reader import ReaderSettings
from bench.core.results import Result
from bench.core.ring_source import SourceSettings, server_config
from bench.core.rounds import Plan
from bench.core.subjects import Subject
from bench.core.transport_reader import client_config

__all__ = ["as_document"]

FORMAT: Final = "ucxx_transport.bench/1"
UNITS: Final = {
    "gb_per_s": "payload bytes / 1e9 / second, from the first read of a batch to the end of its last",
    "p50_us": "microseconds, median of single reads: call, bytes held, bytes given back",
    "p99_us": "microseconds, 99th percentile of the same",
    "reader_cpu_s_per_gb": "user + system seconds of the reading process / 1e9 payload bytes",
    "source_cpu_s_per_gb": "user + system seconds of the worker and its server process / 1e9 payload bytes",
    "reader_cpu_us_per_read": "user + system microseconds / read",
    "source_cpu_us_per_read": "user + system microseconds / read",
    "foreign_cores": "cores used meanwhile by processes that are not the benchmark's, steal included",
}
METHOD: Final = (
    "Rounds of alternating subjects. A turn opens its client, warms up by reading every slot once and comparing every "
    "byte, then times batches of one read a slot; refilling the slots lies outside the timed part. Local views touch "
    "no byte unless their label says so; all others hold the bytes in memory of their own."
)


def as_document(
    results: Sequence[Result], subjects: Sequence[Subject], plan: Plan, source_settings: SourceSettings
) -> dict[str, Any]:
    """The whole of a measurement as plain values."""
    sizes = sorted({result.size_bytes for result in results})
    return {
        "format": FORMAT,
        "host": host_facts(),
        "units": UNITS,
        "method": METHOD,
        "sizes_bytes": sizes,
        "slots": {str(size_bytes): plan.slots(size_bytes) for size_bytes in sizes},
        "plan": asdict(plan),
        "settings": _settings(source_settings, plan),
        "subjects": [asdict(subject) for subject in subjects],
        "results": [result.to_dict() for result in results],
    }


def _settings(source_settings: SourceSettings, plan: Plan) -> dict[str, Any]:
    reader_settings = ReaderSettings(size_bytes=1, slots=1, in_flight=plan.in_flight)
    return {
        "server": _plain(asdict(server_config(source_settings))),
        "client": _plain(asdict(client_config(reader_settings))),
        "varied": "`local` and `shm_lanes`: see subjects",
    }


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Without the shared secret, which a document is no place for."""
    return {key: value for key, value in settings.items() if key != "token"}
