"""Wrong use of `ucxx-transport demo`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.command_line import call


def test_wrong_use_ends_with_2_and_a_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "UCX_LOG_FILE"):
        monkeypatch.setenv(name, "")  # the command sets them for itself and its processes
    (tmp_path / "file").write_text("")
    for words, reason in (
        (["--env", "Pendulum-v1"], "discrete actions"),
        (["--env", "NoSuchThing-v0"], "Gymnasium cannot make this environment"),
        (["--slot-bytes", "many"], "--slot-bytes"),
        (["--slot-bytes", "64"], "an episode of one step takes"),
        (["--goal", "much"], "a number, 'none' or 'auto'"),
        (["--store", "nonsense://"], "store"),
        (["--out", str(tmp_path / "file/curve.png")], "the folder cannot be made"),
    ):
        answer = call(capsys, "demo", "--json", "--out", str(tmp_path / "curve.png"), *words)
        assert answer.code == 2, words
        assert reason in answer.err, words
        assert json.loads(answer.out)["error"]["kind"] == "ConfigError", words
