"""How many connections a process has descriptors for."""

from __future__ import annotations

import os
import resource
import subprocess
import sys

from tests.support.rows import row
from ucxx_transport.link.base import connection_budget, descriptors_in_use


def test_the_budget_leaves_descriptors_for_everything_else() -> None:
    rows = [
        # limit, in use, asked, budget
        (1024, 24, None, 312),
        (1024, 24, 256, 256),
        (256, 24, 256, 56),
        (256, 24, 8, 8),
        (64, 60, 256, 1),
        (1 << 20, 100, 1000, 1000),
    ]
    for limit, in_use, asked, budget in rows:
        with row(limit=limit, in_use=in_use, asked=asked):
            assert connection_budget(limit=limit, in_use=in_use, asked=asked) == budget


def test_open_descriptors_are_counted() -> None:
    before = descriptors_in_use()
    pipe = os.pipe()
    assert descriptors_in_use() == before + 2
    for descriptor in pipe:
        os.close(descriptor)


def test_the_limit_is_raised_as_far_as_it_goes() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    bound = 500 if hard == resource.RLIM_INFINITY else min(500, hard)
    program = (
        "import resource\n"
        "from ucxx_transport.link.base import raised_limit\n"
        f"resource.setrlimit(resource.RLIMIT_NOFILE, (100, {bound}))\n"
        "print(raised_limit(), resource.getrlimit(resource.RLIMIT_NOFILE)[0])"
    )
    run = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert run.stdout.split() == [str(bound)] * 2


def test_a_process_without_a_descriptor_to_look_with_has_its_limit_in_use() -> None:
    program = (
        "import os, resource\n"
        "from ucxx_transport.link.base import descriptors_in_use\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))\n"
        "print(descriptors_in_use())"
    )
    run = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert run.stdout.split() == ["3"]
