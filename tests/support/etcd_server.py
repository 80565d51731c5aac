"""A real etcd of one member, on free ports of the loopback, with a data folder of its own."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from tests.support.ports import free_ports
from tests.support.stopping import stop_process
from tests.support.waiting import wait_until

__all__ = ["EtcdServer", "find_etcd"]

HOST = "127.0.0.1"


def find_etcd() -> str | None:
    """The etcd to run: of PATH, or the one that `scripts/test` keeps in the environment's folder."""
    kept = Path(sys.prefix) / "etcd" / "usr" / "bin" / "etcd"
    return shutil.which("etcd") or (str(kept) if kept.exists() else None)


class EtcdServer:
    """Starts and ends an etcd; `with` ends it for good.

    Attributes:
        ports: that clients may use, all of them alike.
        log: what it writes to stdout and stderr.
    """

    def __init__(self, folder: Path, *, clients: int = 1, options: Sequence[str] = (), scheme: str = "http") -> None:
        """Choose the ports.

        Args:
            folder: for the data and the log.
            clients: how many client ports it has.
            options: of the command line, more than it has anyway.
            scheme: that clients speak: "https" needs options that name the files.
        """
        found = find_etcd()
        assert found, "there is no etcd: see find_etcd"
        self.ports = free_ports(clients)
        self.log = folder / "etcd.log"
        self._data = folder / "data"
        (peer,) = free_ports(1)
        urls = ",".join(f"{scheme}://{HOST}:{port}" for port in self.ports)
        self._command = [
            *(found, "--data-dir", str(self._data), "--unsafe-no-fsync", "--log-level", "warn"),
            *("--listen-client-urls", urls, "--advertise-client-urls", urls),
            *("--listen-peer-urls", f"http://{HOST}:{peer}", "--initial-advertise-peer-urls", f"http://{HOST}:{peer}"),
            *("--initial-cluster", f"default=http://{HOST}:{peer}", *options),
        ]
        self._process: subprocess.Popen[bytes] | None = None
        self._scheme = scheme

    @property
    def url(self) -> str:
        """Opens a store in it, without TLS."""
        return "etcd://" + ",".join(f"{HOST}:{port}" for port in self.ports)

    def start(self) -> None:
        """Run it, and wait until it serves."""
        assert self._process is None
        quiet = {name: value for name, value in os.environ.items() if not name.startswith("ETCD_")}
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log, env=quiet)
        wait_until(self._serves, 30, what="etcd serves")

    def kill(self) -> None:
        """SIGKILL."""
        self._ended(signal.SIGKILL)

    def stop(self) -> None:
        """SIGTERM, and wait."""
        self._ended(signal.SIGTERM)

    def wipe(self) -> None:
        """Kill it and remove its data; `start` makes an empty one at the same ports."""
        self.kill()
        shutil.rmtree(self._data)

    def pause(self) -> None:
        """SIGSTOP: it neither answers nor refuses."""
        assert self._process is not None
        stop_process(self._process.pid)

    def resume(self) -> None:
        """SIGCONT."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def ask(self, path: str, body: Mapping[str, Any], *, token: str = "") -> dict[str, Any]:
        """The answer to `/v3/<path>`, by the standard library alone."""
        request = urllib.request.Request(
            f"http://{HOST}:{self.ports[0]}/v3/{path}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json", **({"Authorization": token} if token else {})},
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=10) as response:
            answer = json.load(response)
        assert isinstance(answer, dict)
        return answer

    def compact(self) -> None:
        """Forget all revisions but the last."""
        header = self.ask("kv/range", {"key": base64.b64encode(b"x").decode()})["header"]
        self.ask("kv/compaction", {"revision": header["revision"], "physical": True})

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_error: object) -> None:
        if self._process is not None:
            self.kill()

    def _serves(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, f"etcd has ended:\n{self.log.read_text()[-2000:]}"
        if self._scheme == "https":
            with socket.socket() as probe:
                return probe.connect_ex((HOST, self.ports[0])) == 0
        try:
            return "leader" in self.ask("maintenance/status", {})
        except OSError:
            return False

    def _ended(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)
        self._process.wait(timeout=30)
        self._process = None
