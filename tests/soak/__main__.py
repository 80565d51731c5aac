"""The soak as a command: see `scripts/soak --help`."""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path

from tests.soak.kill_soak import KillSoak
from tests.soak.port_pause import port_pauses
from tests.soak.steady_soak import Look, SteadySoak
from tests.soak.summary import SoakSettings
from ucxx_transport.logs import log_to_stderr

PORT_KILLS = 30


def main() -> int:
    """Run, report, and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="scripts/soak",
        description="kill -9 of writers, servers and clients, in cycles; or many episodes, and what they take",
    )
    parser.add_argument("--episodes", type=int, default=None, help="run this many episodes, and kill nobody")
    parser.add_argument("--cycles", type=int, default=500, help="rounds of killing")
    parser.add_argument(
        "--seed", type=int, default=None, help="of the victims and moments; drawn and printed if left out"
    )
    parser.add_argument("--shm-lanes", action="store_true", help="let UCX use shared memory between the processes")
    parser.add_argument("--json", action="store_true", help="the summary as one JSON object on standard output")
    options = parser.parse_args()
    if options.episodes is not None:
        return run_steadily(options.episodes, as_json=options.json)
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(1 << 32)
    log_to_stderr("test")
    folder = Path(tempfile.mkdtemp(prefix="ucxx_transport-soak-"))
    say(f"seed {seed}, logs in {folder}")
    settings = SoakSettings(cycles=options.cycles, seed=seed, shm_lanes=options.shm_lanes)
    soak = KillSoak(
        settings, folder, on_cycle=lambda number, victims: say(f"{number}/{options.cycles} {', '.join(victims)}")
    )
    failure = ""
    try:
        soak.run()
        say("a client with two ports, and one of them killed, again and again")
        kills = max(2, min(PORT_KILLS, options.cycles // 10))
        soak.summary.port_pauses_s = port_pauses(kills, random.Random(seed), shm_lanes=options.shm_lanes)
    except AssertionError as error:
        failure = str(error)
        say(f"FAILED: {failure}")
    result = {"ok": not failure, "failure": failure.partition("\n")[0], **soak.summary.to_dict()}
    print(json.dumps(result, indent=None if options.json else 2))  # noqa: T201 - the command's answer
    return 1 if failure else 0


def run_steadily(episodes: int, *, as_json: bool) -> int:
    """Run the steady soak, report, and return the exit status."""

    def tell(look: Look) -> None:
        used = ", ".join(
            f"{name} {usage.rss_bytes / 1e6:.1f} MB {usage.descriptors} fds {usage.threads} threads"
            for name, usage in look.usage.items()
        )
        say(f"{look.episodes}/{episodes} {used}, /dev/shm {look.shm_bytes / 1e6:.1f} MB")

    soak = SteadySoak(episodes, on_look=tell)
    failure = ""
    began_s = time.monotonic()
    try:
        soak.run()
    except AssertionError as error:
        failure = str(error)
        say(f"FAILED: {failure}")
    result = {"ok": not failure, "failure": failure, "seconds": round(time.monotonic() - began_s, 1), **soak.to_dict()}
    print(json.dumps(result, indent=None if as_json else 2))  # noqa: T201 - the command's answer
    return 1 if failure else 0


def say(text: str) -> None:
    """Progress, beside the answer."""
    print(text, file=sys.stderr, flush=True)  # noqa: T201 - the command's own words


if __name__ == "__main__":
    sys.exit(main())
