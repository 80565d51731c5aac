"""Log events: what each kind of formatter sees of them, and what nobody sees."""

from __future__ import annotations

import ast
import json
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

import pytest
import structlog

from ucxx_transport.logs import effective_level, get_logger

ROOT = Path(__file__).resolve().parents[2]
LOGGER = "ucxx_transport.logs_under_test"
TOKEN = "correct-horse"

log = get_logger(LOGGER)


@pytest.fixture
def handler() -> Iterator[logging.StreamHandler[StringIO]]:
    """A handler that keeps text, on the logger under test."""
    handler = logging.StreamHandler(StringIO())
    logger = logging.getLogger(LOGGER)
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(logging.NOTSET)


Handler = logging.StreamHandler[StringIO]


def with_structlog(handler: Handler, renderer: structlog.typing.Processor) -> None:
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.add_log_level, structlog.stdlib.ExtraAdder()],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )


def fail_with_a_token_in_the_frame() -> None:
    token = bytes(reversed(b"esroh-tcerroc")).decode()  # in no source line, which a traceback may show
    assert token == TOKEN
    raise RuntimeError("the call failed")


def log_the_failure() -> None:
    try:
        fail_with_a_token_in_the_frame()
    except RuntimeError:
        log.exception("call_failed", lease=7)


def ran(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60, check=False
    )


def test_a_plain_formatter_sees_the_event_and_its_keys(handler: Handler) -> None:
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s %(funcName)s %(message)s"))
    log.warning("lease_lost", lease=7, reason="50% gone", name="w")
    assert handler.stream.getvalue() == (
        f"WARNING {LOGGER} test_a_plain_formatter_sees_the_event_and_its_keys "
        "lease_lost lease=7 reason='50% gone' name='w'\n"
    )


def test_the_keys_are_attributes_of_the_record(log_events: list[dict[str, object]]) -> None:
    log.info("slot_freed", slot=3, name="w", event_kind="x")
    (record,) = log_events
    assert (record["event"], record["slot"], record["name_"], record["name"]) == ("slot_freed", 3, "w", LOGGER)


def test_structlog_sees_the_event_alone_and_its_keys(handler: Handler) -> None:
    with_structlog(handler, structlog.processors.JSONRenderer())
    log.warning("lease_lost", lease=7, reason="gone")
    assert json.loads(handler.stream.getvalue()) == {
        "event": "lease_lost",
        "level": "warning",
        "lease": 7,
        "reason": "gone",
    }


def test_each_method_logs_at_its_level_and_nothing_below_the_logger_s(handler: Handler) -> None:
    handler.setFormatter(logging.Formatter("%(levelname)s"))
    logging.getLogger(LOGGER).setLevel(logging.INFO)
    for method in (log.debug, log.info, log.warning, log.error):
        method("event")
    assert handler.stream.getvalue().split() == ["INFO", "WARNING", "ERROR"]


def test_an_exception_is_logged_with_its_traceback_by_every_formatter(handler: Handler) -> None:
    for use_structlog in (False, True):
        if use_structlog:
            with_structlog(handler, structlog.dev.ConsoleRenderer(colors=False))
        handler.stream.truncate(0)
        log_the_failure()
        text = handler.stream.getvalue()
        assert "call_failed" in text, use_structlog
        assert "in fail_with_a_token_in_the_frame" in text, use_structlog
        assert "RuntimeError: the call failed" in text, use_structlog


def test_no_formatter_shows_the_locals_of_a_logged_exception(handler: Handler) -> None:
    """Structlog's console shows them by default, where rich is installed."""
    with_structlog(handler, structlog.dev.ConsoleRenderer(colors=False))
    try:
        fail_with_a_token_in_the_frame()
    except RuntimeError:
        logging.getLogger(LOGGER).exception("as somebody else's library logs it")
    assert TOKEN in handler.stream.getvalue(), "else this test shows nothing"
    handler.stream.truncate(0)
    log_the_failure()
    assert TOKEN not in handler.stream.getvalue()


@pytest.mark.parametrize(
    "configured",
    [
        "from ucxx_transport.logs import log_to_stderr; log_to_stderr('ucxx server')",
        "from ucxx_transport.cli.program import logs_to_stderr; logs_to_stderr()",
    ],
    ids=["helper process", "command line"],
)
def test_neither_a_helper_nor_the_command_line_shows_the_locals_of_a_logged_exception(configured: str) -> None:
    done = ran(f"from tests.unit.test_logs import log_the_failure\n{configured}\nlog_the_failure()")
    assert "RuntimeError: the call failed" in done.stderr
    assert TOKEN not in done.stderr + done.stdout


def test_the_command_line_shows_no_locals_of_an_error_that_ends_it() -> None:
    done = ran(
        "import ucxx_transport.cli.program as verb\n"
        "from tests.unit.test_logs import fail_with_a_token_in_the_frame\n"
        "verb.version = lambda: fail_with_a_token_in_the_frame()\n"
        "from ucxx_transport.__main__ import main; main(['version'])"
    )
    assert done.returncode == 1
    assert "RuntimeError: the call failed" in done.stderr
    assert TOKEN not in done.stderr + done.stdout


def test_without_a_configuration_nothing_is_written() -> None:
    done = ran("from ucxx_transport.logs import get_logger; get_logger('ucxx_transport.x').error('event', key=1)")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_helper_process_logs_to_stderr_with_its_role_in_front() -> None:
    done = ran(
        "import logging; from ucxx_transport.logs import get_logger, log_to_stderr\n"
        "log_to_stderr('ucxx server', logging.WARNING)\n"
        "log = get_logger('ucxx_transport.x'); log.info('quiet'); log.warning('loud', port=5)"
    )
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.endswith("[ucxx server] WARNING loud port=5")


def test_the_effective_level_is_the_application_s() -> None:
    done = ran(
        "import logging; from ucxx_transport.logs import effective_level\n"
        "print(effective_level()); logging.basicConfig(level='DEBUG'); print(effective_level())\n"
        "logging.getLogger('ucxx_transport').setLevel('ERROR'); print(effective_level())"
    )
    assert done.stdout.split() == ["30", "10", "40"]
    assert effective_level() == logging.getLogger("ucxx_transport").getEffectiveLevel()


def test_the_library_loads_no_structlog() -> None:
    done = ran(
        "import sys, ucxx_transport\n"
        "for name in ucxx_transport.__all__: getattr(ucxx_transport, name)\n"
        "print('structlog' in sys.modules)"
    )
    assert done.stdout == "False\n", done.stderr


def test_every_event_is_a_name_and_never_a_sentence() -> None:
    events = {
        (str(path.relative_to(ROOT)), node.lineno): node.args[0] if node.args else None
        for path in sorted((ROOT / "ucxx_transport").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "_log"
    }
    assert len(events) > 20, "else this test looks in the wrong place"
    for where, event in events.items():
        assert isinstance(event, ast.Constant), where
        assert re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)+", str(event.value)), (where, event.value)
