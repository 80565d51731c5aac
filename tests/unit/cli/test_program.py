"""The program round the verbs: which there are, and the exit code of each way to go wrong."""

from __future__ import annotations

import inspect
import json
import os
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from tests.support.command_line import COMMAND, call
from tests.support.rows import row
from ucxx_transport.cli.program import EXTRA_OF, VERBS
from ucxx_transport.errors import PeerLostError

Capture = pytest.CaptureFixture[str]


def test_the_verbs_are_these() -> None:
    assert set(VERBS) == {
        *("demo", "serve", "doctor", "inspect", "top", "bench", "clean", "config", "version", "registry"),
    }


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself_and_speaks_json(verb: str, capsys: Capture) -> None:
    answer = call(capsys, verb, "--help")
    assert answer.code == 0
    assert "--json" in answer.out
    module, _, function = VERBS[verb].partition(":")
    assert (inspect.getdoc(getattr(import_module(module), function)) or "").splitlines()[0].rstrip(".")[
        :40
    ] in answer.out


def test_help_names_every_verb(capsys: Capture) -> None:
    answer = call(capsys, "--help")
    assert answer.code == 0
    assert all(verb in answer.out for verb in VERBS)


@pytest.mark.parametrize(
    "words", [["nonsense"], ["version", "--nonsense"], ["serve", "--slots", "0"], ["serve", "--slot-bytes", "1XB"], []]
)
def test_wrong_use_ends_with_2(words: list[str], capsys: Capture) -> None:
    assert call(capsys, *words).code == 2


def test_a_failure_ends_with_1_and_says_why(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCXX_TRANSPORT_SERVER__PRTS", "4")
    answer = call(capsys, "config")
    assert (answer.code, answer.out) == (1, "")
    assert "did you mean 'ports'" in answer.err


def test_a_failure_is_json_where_json_was_asked_for(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCXX_TRANSPORT_SERVER__PRTS", "4")
    answer = call(capsys, "config", "--json")
    assert answer.code == 1
    assert answer.document["error"]["kind"] == "ConfigError"
    assert answer.document["error"]["facts"]["field"] == "prts"


def replace_version_verb(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def version() -> None:
        raise error

    monkeypatch.setattr("ucxx_transport.cli.program.version", version)


def test_an_interrupt_ends_with_130(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_version_verb(monkeypatch, KeyboardInterrupt())
    assert call(capsys, "version").code == 130


def test_a_transport_error_is_a_message_not_a_traceback(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_version_verb(monkeypatch, PeerLostError("gone", port=5001))
    answer = call(capsys, "version")
    assert (answer.code, answer.err) == (1, "error: gone\n  port = 5001\n")


@pytest.mark.parametrize(("module", "extra"), EXTRA_OF.items())
def test_a_missing_module_is_named_with_the_extra_that_brings_it(
    module: str, extra: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_version_verb(monkeypatch, ModuleNotFoundError(f"No module named {module!r}", name=f"{module}.part"))
    answer = call(capsys, "version")
    assert answer.code == 1
    assert f"ucxx_transport[{extra}]" in answer.err


def test_an_error_of_ours_is_not_hidden(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_version_verb(
        monkeypatch, ModuleNotFoundError("No module named 'ucxx_transport.nonsense'", name="ucxx_transport.nonsense")
    )
    with pytest.raises(ModuleNotFoundError):
        call(capsys, "version")


def test_a_verb_whose_extra_is_missing_hides_no_other() -> None:
    without = "import sys; sys.modules['gymnasium'] = None; sys.modules['matplotlib'] = None\n"
    code = without + "from ucxx_transport.cli.program import main; main(['--help'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(verb in done.stdout for verb in VERBS)


def run_without(module: str, *words: str) -> subprocess.CompletedProcess[str]:
    code = f"import sys; sys.modules[{module!r}] = None; from ucxx_transport.__main__ import main; main(sys.argv[1:])"
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)


def test_without_its_extra_the_command_says_in_one_line_what_to_install() -> None:
    done = run_without("typer", "doctor")
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert "pip install 'ucxx_transport[cli]'" in line


def test_without_its_extra_the_command_says_so_in_json_where_json_was_asked_for() -> None:
    for module, verb in [("typer", "doctor"), ("gymnasium", "demo")]:
        done = run_without(module, verb, "--json")
        assert done.returncode == 1, module
        error = json.loads(done.stdout)["error"]
        assert (error["kind"], error["facts"]["module"]) == ("ModuleNotFoundError", module)
        assert f"ucxx_transport[{error['facts']['extra']}]" in error["message"]


def test_a_table_without_rich_says_what_to_install(tmp_path: Path) -> None:
    done = run_without("rich", "config")
    assert done.returncode == 1
    assert "pip install 'ucxx_transport[cli]'" in done.stderr
    for verb in (
        ["config"],
        ["top", "--once"],
        ["inspect"],
        ["registry", "ls", "--store", f"local://{tmp_path}/store"],
    ):
        with row(verb=verb):
            done = run_without("rich", *verb, "--json")
            assert done.returncode == 0, done.stderr


def test_a_reader_that_goes_away_is_no_traceback() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as out:
        done = subprocess.run([*COMMAND, "config"], stdout=out, stderr=subprocess.PIPE, text=True, check=False)
    assert "Traceback" not in done.stderr
    assert done.returncode in {1, 120, -signal.SIGPIPE}
