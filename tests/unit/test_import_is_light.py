"""`import ucxx_transport` works, and is cheap, where neither UCX nor an accelerator's libraries are installed."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ["ucxx", "torch", "cupy", "matplotlib", "gymnasium", "cuda", "rmm"]


def modules_after(statement: str) -> set[str]:
    """What the statement imports, beyond what a bare interpreter of this environment starts with."""
    code = f"import sys\nbefore = set(sys.modules)\n{statement}\nprint('imported:', *set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in done.stdout.rpartition("imported:")[2].split()}


def test_importing_the_package_imports_nothing_heavy() -> None:
    assert modules_after(
        "import ucxx_transport; [getattr(ucxx_transport, name) for name in ucxx_transport.__all__]"
    ).isdisjoint(HEAVY)


def test_importing_settings_leaves_the_loop_and_the_terminal_alone() -> None:
    assert modules_after("import ucxx_transport.config").isdisjoint([*HEAVY, "rich", "typer", "numpy"])


def test_naming_the_version_loads_no_part_of_the_transport() -> None:
    loaded = modules_after("from ucxx_transport.__main__ import main\ntry: main(['version'])\nexcept SystemExit: pass")
    assert loaded.isdisjoint([*HEAVY, "numpy", "anyio", "structlog"])


@pytest.mark.parametrize("blocked", ["ucxx", "torch", "cupy"])
def test_the_package_imports_where_a_library_is_missing(blocked: str) -> None:
    code = f"import sys; sys.modules[{blocked!r}] = None; import ucxx_transport; print(len(ucxx_transport.__all__))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 10
