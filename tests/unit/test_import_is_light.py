"""`import ucxx_transport` works, and is cheap, where neither UCX nor an accelerator's libraries are installed."""

from __future__ import annotations

import subprocess
import sys

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


def test_importing_the_package_loads_at_most_four_modules() -> None:
    code = "import sys; before = set(sys.modules); import ucxx_transport; print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert len(done.stdout.split()) <= 4, done.stdout


def test_making_settings_loads_nothing_but_the_standard_library() -> None:
    loaded = modules_after("from ucxx_transport.config import ServerConfig; ServerConfig(idle_timeout_s='5s')")
    assert loaded - set(sys.stdlib_module_names) == {"ucxx_transport"}
    assert loaded.isdisjoint(["asyncio", "json", "tomllib", "difflib", "socket"])


def test_naming_the_version_loads_no_part_of_the_transport() -> None:
    loaded = modules_after("from ucxx_transport.__main__ import main\ntry: main(['version'])\nexcept SystemExit: pass")
    assert loaded.isdisjoint([*HEAVY, "numpy", "anyio", "structlog"])


def test_every_public_name_is_to_be_had_where_the_optional_libraries_are_missing() -> None:
    names = ("ucxx", "torch", "cupy", "http.client", "rich", "typer", "psutil")
    missing = f"import sys; sys.modules.update(dict.fromkeys({names}))"
    use = "import ucxx_transport; print(len([getattr(ucxx_transport, name) for name in ucxx_transport.__all__]))"
    done = subprocess.run([sys.executable, "-c", f"{missing}; {use}"], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 40
