"""What happens where ucxx is missing or another one."""

from __future__ import annotations

import subprocess
import sys

import pytest


def run(code: str) -> str:
    """What a fresh interpreter prints."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("missing", ["ucxx", "ucxx._lib", "ucxx._lib.libucxx"])
def test_missing_ucxx_is_a_configuration_error_that_says_what_to_install(missing: str) -> None:
    said = run(
        "import sys\n"
        f"sys.modules[{missing!r}] = None\n"
        "from ucxx_transport import ConfigError\n"
        "from ucxx_transport.link.reactor import Reactor\n"
        "from ucxx_transport.link.ucx import UCXXLink\n"
        "try:\n"
        "    Reactor(UCXXLink).link\n"
        "except ConfigError as exc:\n"
        "    print(exc)\n"
    )
    assert 'pip install "ucxx_transport[cpu]"' in said
    assert "[cu13]" in said


def test_ucxx_of_another_shape_is_told_by_what_it_lacks() -> None:
    said = run(
        "import ucxx._lib.libucxx as lib\n"
        "del lib.UCXRejectedError\n"
        "from ucxx_transport import ConfigError\n"
        "from ucxx_transport.link.ucx_api import load_binding\n"
        "try:\n"
        "    load_binding()\n"
        "except ConfigError as exc:\n"
        "    print(exc.facts['missing'], exc.facts['ucxx'])\n"
    )
    assert said.startswith("UCXRejectedError 0.")


def test_importing_ucxx_leaves_no_setting_behind_for_children() -> None:
    said = run(
        "import os\n"
        "before = dict(os.environ)\n"
        "from ucxx_transport.link.ucx_api import load_binding\n"
        "load_binding()\n"
        "print(dict(os.environ) == before)\n"
    )
    assert said == "True\n"


def test_link_package_is_importable_without_ucxx() -> None:
    said = run(
        "import sys\n"
        "sys.modules['ucxx'] = None\n"
        "import ucxx_transport.link.ucx, ucxx_transport.testing.memory_link, ucxx_transport.link.address\n"
        "print('fine')\n"
    )
    assert said == "fine\n"
