"""`ucxx._lib` is private: every symbol that is used is named, is used, and is there."""

from __future__ import annotations

import ast
import ctypes
import importlib
import inspect
import re
from pathlib import Path

import pytest

from tests.support.rows import row
from ucxx_transport.link import ucx_api
from ucxx_transport.link.flight import FUNCTIONS
from ucxx_transport.link.ucx_api import loaded_library

LINK = Path(ucx_api.__file__).parent
NATIVE_SYMBOLS = {
    "libucp.so": (
        *FUNCTIONS,
        *("ucp_conn_request_query", "ucp_ep_query", "ucp_get_version", "ucp_listener_create", "ucp_listener_destroy"),
    ),
    "libucs.so": ("ucs_status_string",),
    "libucxx.so": ("_ZN4ucxx25ucxx_log_component_configE",),
}


def symbols() -> list[tuple[str, str]]:
    return [(module, name) for module, names in ucx_api.SYMBOLS.items() for name in names]


def test_symbol_exists() -> None:
    for module, dotted in symbols():
        with row(module=module, dotted=dotted):
            ucx_api.load_binding()
            found: object = importlib.import_module(module)
            for part in dotted.split("."):
                found = getattr(found, part)
            assert found is not None


def test_signature_is_the_one_the_link_calls() -> None:
    rows: list[tuple[str, list[str]]] = [
        ("UCXContext", ["config_dict", "feature_flags"]),
        ("UCXWorker", ["context", "enable_delayed_submission", "enable_python_future"]),
        ("UCXEndpoint.create", ["worker", "ip_address", "port", "endpoint_error_handling"]),
        ("UCXEndpoint.set_close_callback", ["cb_func", "cb_args"]),
        ("UCXListener.create_endpoint_from_conn_request", ["conn_request", "endpoint_error_handling"]),
        ("UCXListener.create", ["worker", "port", "cb_func", "cb_args", "cb_kwargs", "deliver_endpoint"]),
    ]
    for dotted, parameters in rows:
        with row(dotted=dotted, parameters=parameters):
            ucx_api.load_binding()
            found = importlib.import_module("ucxx._lib.libucxx")
            for part in dotted.split("."):
                found = getattr(found, part)
            signature = (inspect.getdoc(found) or "").partition("(")[2].partition(") ->")[0]  # embedded by Cython
            names = [part.partition("=")[0].split()[-1] for part in re.sub(r"\(.*?\)", "", signature).split(",")]
            assert [name for name in names if name in parameters] == parameters, signature


@pytest.mark.parametrize(
    ("library", "symbol"), [(lib, name) for lib, names in NATIVE_SYMBOLS.items() for name in names]
)
def test_native_symbol_exists(library: str, symbol: str) -> None:
    ucx_api.load_binding()
    assert ctypes.c_char.in_dll(loaded_library(library), symbol) is not None


def test_every_symbol_in_use_is_named() -> None:
    """What the link's source takes from ucxx is in the list, and nothing else is."""
    listed = {name for names in ucx_api.SYMBOLS.values() for name in names}
    tops = {name.partition(".")[0] for name in listed}
    used = set()
    for source in LINK.glob("*.py"):
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.Attribute) and re.fullmatch(r"lib|arr|.*\.lib", ast.unparse(node.value)):
                used.add(node.attr)
    assert used <= tops, used - tops
    errors = {name for name in tops if name.endswith("Error")}  # a table names them, and no source
    assert tops <= used | errors
