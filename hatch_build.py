"""The build hook: compiles the sources of `ucxx_transport/native/` into the wheel, or in place if it is editable."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

ZIGLANG = "ziglang>=0.13,<0.18"
NATIVE = Path(__file__).resolve().parent / "ucxx_transport" / "native"


def _build() -> ModuleType:
    # by path: the package's own imports are not there while it is being built
    spec = importlib.util.spec_from_file_location("native_build", NATIVE / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class NativeBuildHook(BuildHookInterface):  # type: ignore[misc,type-arg]  # hatchling is there while building only
    """See the module."""

    PLUGIN_NAME = "custom"

    def dependencies(self) -> list[str]:
        """ziglang, where no compiler makes the library: 100 MB to download, so only there.

        One may be there without a C library's headers, or a linker; the sources are the trial. A `$CC` has no stand-in.
        """
        build = _build()
        with TemporaryDirectory() as folder:
            try:
                build.compile_library(Path(folder, "trial.so"))
            except build.CompilationError:
                if os.environ.get("CC"):
                    raise
                return [ZIGLANG]
        return []

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002 - hatchling's signature
        """Compile, and say which platform the wheel is for."""
        if self.target_name != "wheel":
            return
        build = _build()
        compiler = build.compile_library(build.LIBRARY)
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{compiler.platform_tag}"
        build_data["artifacts"].append("/ucxx_transport/native/libnative.so")
