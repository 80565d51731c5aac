"""Fetches a batch of episodes: what can be had of it, in rounds, under one deadline."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from ucxx_transport.client.retry import attempt_budget_s
from ucxx_transport.errors import ConfigError
from ucxx_transport.trainer.triage import AskedFor, Loss, Wanted, loss_of, sort_out

if TYPE_CHECKING:
    from ucxx_transport.client import Payload
    from ucxx_transport.errors import TransportError
    from ucxx_transport.schema import SlotRef

__all__ = ["Batch", "BatchReader", "Loss", "fetch_batch"]

DEFAULT_FETCH_ROUNDS: Final = 3

ROUND_PAUSE_S: Final = 0.1
"""Between two rounds: a server process that died takes a second or two to be back."""


class BatchReader(Protocol):
    """What a fetch needs of a client; `UCXXClient` is one."""

    async def read_many(
        self, refs: Sequence[SlotRef], *, deadline_s: float | None = None
    ) -> list[Payload | TransportError]:
        """See `UCXXClient.read_many`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What became of a batch: every episode asked for is in one of the two.

    Attributes:
        payloads: by the episode's place in what was asked for, in that order.
        losses: the others, in that order, each with its reason.
        rounds: how many it took. retried: episodes asked for again, once for each round after the first.
        took_s: seconds.
    """

    payloads: dict[int, Payload]
    losses: tuple[Loss, ...]
    rounds: int
    retried: int
    took_s: float

    def release(self) -> None:
        """Release all payloads."""
        for payload in self.payloads.values():
            payload.release()


async def fetch_batch(
    client: BatchReader,
    records: Sequence[AskedFor],
    *,
    deadline_s: float,
    max_fetch_rounds: int = DEFAULT_FETCH_ROUNDS,
    policy_version: int | None = None,
    max_staleness: int | None = None,
) -> Batch:
    """Fetch a batch; an episode that cannot be had costs the others nothing.

    Args:
        client: reads; `UCXXClient`.
        records: the episodes, as their workers described them; an error stands for a record that could not be read.
        deadline_s: seconds for the whole batch.
        max_fetch_rounds: how often an episode is asked for while its error is retryable, at least 1.
        policy_version: of the trainer's weights now; needed for `max_staleness`.
        max_staleness: versions that an episode's weights may be behind; None: any.

    Returns:
        What was fetched and what was lost. The caller releases the payloads (`Batch.release`), and discards what may
        still lie in its slot (`triage.unwanted_of`).

    Raises:
        ConfigError: an argument is out of its bounds.
    """
    check_limits(deadline_s, max_fetch_rounds)
    clock = asyncio.get_running_loop().time
    began_s = clock()
    until_s = began_s + deadline_s
    wanted, losses = sort_out(records, policy_version=policy_version, max_staleness=max_staleness)
    payloads: dict[int, Payload] = {}
    rounds = retried = 0
    try:
        while wanted:
            rounds += 1
            rounds_left = max_fetch_rounds - rounds + 1
            limit_s = attempt_budget_s(max(0.0, until_s - clock()), rounds_left)
            outcomes = await client.read_many([entry.ref for entry in wanted], deadline_s=limit_s)
            may_follow = rounds_left > 1 and until_s - clock() > ROUND_PAUSE_S
            again: list[Wanted] = []
            for entry, outcome in zip(wanted, outcomes, strict=True):
                if not isinstance(outcome, Exception):
                    payloads[entry.index] = outcome
                elif (loss := loss_of(entry, outcome, again=may_follow)) is not None:
                    losses.append(loss)
                else:
                    again.append(entry)
            wanted = again
            if wanted:
                retried += len(wanted)
                await asyncio.sleep(ROUND_PAUSE_S)
    except BaseException:
        for payload in payloads.values():  # the traceback would hold them, and they their slots
            payload.release()
        raise
    return Batch(
        payloads=dict(sorted(payloads.items())),
        losses=tuple(sorted(losses, key=lambda loss: loss.index)),
        rounds=rounds,
        retried=retried,
        took_s=clock() - began_s,
    )


def check_limits(deadline_s: float, max_fetch_rounds: int) -> None:
    """Refuse limits under which nothing could be fetched.

    Raises:
        ConfigError: one is out of its bounds.
    """
    if max_fetch_rounds < 1:
        raise ConfigError(f"max_fetch_rounds must be at least 1, not {max_fetch_rounds}", field="max_fetch_rounds")
    if not deadline_s > 0:
        raise ConfigError(f"deadline_s must be positive, not {deadline_s}", field="deadline_s")
