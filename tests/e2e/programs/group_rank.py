"""A rank of a group: `python -m tests.e2e.programs.group_rank STORE_URL RANK INTERVAL_S ACK_TIMEOUT_S`.

It works from the start, in a loop that a thread of it turns, and never waits for another rank.

| asked                  | does and answers                                                                   |
|------------------------|------------------------------------------------------------------------------------|
| `{"join": timeout_s}`  | `join_group`; `{"epoch": …, "active": …, "addresses": …}` or `{"error": …, "facts": …}` |
| `{"state": true}`      | `{"state": …, "epoch": …, "active": …, "turns": …, "statistics": …}`               |
| `{"peer": rank}`       | `{"peer": …}`, that rank's state                                                   |
| `{"stick": true}`      | from now on no view is acknowledged: its callback does not return; `{}`            |
| `{"unstick": true}`    | it does; `{}`                                                                      |
| `{"hold": s}`          | holds the interpreter for s seconds; `{}`                                          |
| `{"leave": true}`      | `leave`; `{}`                                                                      |
"""

from __future__ import annotations

import sys
import threading
from dataclasses import asdict
from typing import Any

from tests.e2e.programs.holding import hold_interpreter
from tests.e2e.programs.request_lines import answer, log_to_stderr, requests
from ucxx_transport import PublisherConfig, RankGroup, TransportError, open_store


class Rank:
    """Answers what it is asked."""

    def __init__(self, group: RankGroup) -> None:
        self.group = group
        self.turns = 0
        self.ends = threading.Event()
        self.unstuck = threading.Event()
        self.unstuck.set()
        self.stuck = threading.Event()
        group.on_view(self.applied)
        self.work = threading.Thread(target=self.turn, daemon=True)
        self.work.start()

    def turn(self) -> None:
        while not self.ends.wait(0.001):
            self.turns += 1

    def applied(self, _: object) -> None:
        if not self.unstuck.is_set():
            self.stuck.set()
            self.unstuck.wait()

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        if "join" in request:
            return self.join(request["join"])
        if "peer" in request:
            return {"peer": self.group.get_peer_state(request["peer"]).value}
        if "stick" in request:
            self.unstuck.clear()
        if "unstick" in request:
            self.unstuck.set()
        if "hold" in request:
            hold_interpreter(request["hold"])
        if "leave" in request:
            self.group.leave()
        if "state" in request:
            state = self.group.state
            return {
                "state": state.state.value,
                "epoch": state.epoch,
                "active": list(state.active_ranks),
                "turns": self.turns,
                "stuck": self.stuck.is_set(),
                "statistics": asdict(state.statistics),
            }
        return {}

    def join(self, timeout_s: float) -> dict[str, Any]:
        try:
            state = self.group.join_group(timeout_s)
        except TransportError as error:
            return {"error": type(error).__name__, "facts": {name: str(fact) for name, fact in error.facts.items()}}
        addresses = {member.rank: member.address for member in state.members.values()}
        return {"epoch": state.epoch, "active": list(state.active_ranks), "addresses": addresses}


def main(url: str, rank: str, interval_s: str, ack_timeout_s: str) -> None:
    log_to_stderr()
    config = PublisherConfig(interval_s=float(interval_s), backoff_s=0.05, max_backoff_s=0.2)
    with open_store(url) as store:
        group = RankGroup(
            store,
            "trainers",
            int(rank),
            address=f"host-{rank}",
            config=config,
            ack_timeout_s=float(ack_timeout_s),
        )
        with group:
            served = Rank(group)
            answer({"turns": served.turns})
            for request in requests():
                answer(served.answer(request))
            served.ends.set()
            served.unstuck.set()


if __name__ == "__main__":
    main(*sys.argv[1:])
