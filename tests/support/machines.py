"""State machines that run for a number of steps, of which a rule may take several."""

from __future__ import annotations

from typing import ClassVar

from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

__all__ = ["CountedMachine", "run_steps"]


class CountedMachine(RuleBasedStateMachine):
    """A machine whose rules count what they do.

    Attributes:
        rules_an_example, steps_an_example: how many rules an example has, and about how many steps they take.
        steps: taken in this run, by all examples.
    """

    rules_an_example: ClassVar[int]
    steps_an_example: ClassVar[int]
    steps: ClassVar[int] = 0

    @staticmethod
    def count_steps(number: int = 1) -> None:
        CountedMachine.steps += number


def run_steps(machine: type[CountedMachine], steps: int) -> None:
    """Run examples until so many steps have been taken."""
    CountedMachine.steps = 0
    while CountedMachine.steps < steps:
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=-(-(steps - CountedMachine.steps) // machine.steps_an_example),
                stateful_step_count=machine.rules_an_example,
                deadline=None,
                database=None,
                print_blob=True,
                suppress_health_check=list(HealthCheck),
            ),
        )
