"""kill -9 at random moments of writers, servers and clients that are all busy; for longer: `scripts/soak`."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import structlog

from tests.soak.kill_soak import VICTIMS, KillSoak
from tests.soak.port_pause import port_pauses
from tests.soak.summary import SoakSettings, Summary
from tests.support.exhaustive import exhaustive

log = structlog.get_logger(__name__)


@pytest.mark.parametrize(
    ("cycles", "lanes"),
    [pytest.param(8, "tcp", id="tcp"), exhaustive(24, "tcp", id="tcp for longer"), exhaustive(8, "shm", id="shm")],
)
def test_others_go_on_after_any_kill_and_every_payload_is_accounted_for(
    cycles: int,
    lanes: str,
    tmp_path: Path,
) -> None:
    shm_lanes = lanes == "shm"
    seed = random.SystemRandom().randrange(1 << 32)
    log.info("soak", seed=seed, repeat=f"scripts/soak --cycles {cycles} --seed {seed}{' --shm-lanes' * shm_lanes}")
    summary = KillSoak(SoakSettings(cycles=cycles, seed=seed, shm_lanes=shm_lanes), tmp_path).run()
    log.info("soak done", **summary.to_dict())
    assert_everyone_was_killed_and_served(summary, cycles)


def test_a_client_with_two_ports_reads_on_while_either_is_killed() -> None:
    pauses_s = port_pauses(2, random.Random(7))
    log.info("ports killed", pauses_s=pauses_s)
    assert len(pauses_s) == 2  # every payload came, and both ports are back


def assert_everyone_was_killed_and_served(summary: Summary, cycles: int) -> None:
    assert summary.cycles == cycles
    assert summary.kills.total() >= cycles
    assert set(summary.kills) == set(VICTIMS)
    assert set(summary.transports) >= {"ucx"}
    payloads = summary.payloads
    assert payloads["corrupt"] == 0
    assert payloads["delivered"] > 10 * cycles
    assert payloads["taken"] > cycles
