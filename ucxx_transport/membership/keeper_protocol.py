"""What a worker and the process that keeps its lease say to each other: lines of JSON, no pickle.

| who    | line                              | meaning                                                  |
|--------|-----------------------------------|----------------------------------------------------------|
| worker | `{"url": …, "config": …, …}`      | the order: which store, whose lease; the first line      |
| worker | `{"lease_id": 7}`                 | keep this lease from now on; null: none                  |
| worker | `{"end": true}`                   | end; the lease is the worker's own affair                |
| worker | end of file without that          | the worker is dying: when it is dead, end its lease      |
| keeper | `{"lease_id": 7, "word": "kept"}` | renewed; the first time and then once after each failure |
| keeper | `… "word": "lost"`                | the store answered twice that there is no such lease     |
| keeper | `… "word": "unavailable"`         | the store did not answer, once for each row of failures  |
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields

from ucxx_transport.config import StoreConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class KeeperOrder:
    """Whose leases to keep, and where.

    Attributes:
        url: of the store. config: its settings, with the password: it travels here and nowhere else.
        worker_pid: the process whose death ends the lease. interval_s: how often it is renewed.
    """

    url: str
    config: StoreConfig
    worker_pid: int
    interval_s: float

    def to_line(self) -> bytes:
        """The order as one line of JSON."""
        settings = {spec.name: getattr(self.config, spec.name) for spec in fields(self.config)}
        settings["password"] = self.config.password_text
        order = {
            "url": self.url,
            "worker_pid": self.worker_pid,
            "interval_s": self.interval_s,
            "config": settings,
        }
        return json.dumps(order).encode() + b"\n"

    @staticmethod
    def from_line(line: bytes) -> KeeperOrder:
        """Rebuild the order in the keeper."""
        order = json.loads(line)
        return KeeperOrder(
            url=order["url"],
            worker_pid=order["worker_pid"],
            interval_s=order["interval_s"],
            config=StoreConfig(**order["config"]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class KeeperReport:
    """What became of a lease.

    Attributes:
        lease_id: which. word: "kept", "lost" or "unavailable". reason: why, for logs.
    """

    lease_id: int
    word: str
    reason: str = ""

    def to_line(self) -> bytes:
        """The report as one line of JSON."""
        return json.dumps({"lease_id": self.lease_id, "word": self.word, "reason": self.reason}).encode() + b"\n"

    @staticmethod
    def from_line(line: bytes) -> KeeperReport:
        """Rebuild the report in the worker."""
        return KeeperReport(**json.loads(line))


def lease_line(lease_id: int | None) -> bytes:
    """Tells a keeper which lease to keep."""
    return json.dumps({"lease_id": lease_id}).encode() + b"\n"


END_LINE = b'{"end": true}\n'
