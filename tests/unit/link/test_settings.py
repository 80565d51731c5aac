"""Which UCX settings a context gets: ours, the configuration's, the user's."""

from __future__ import annotations

import socket

import pytest

from tests.support.rows import row
from ucxx_transport.errors import BusyError, ConfigError
from ucxx_transport.link.ucx import (
    SHM_LANES,
    TUNED,
    WITHOUT_LANES,
    WITHOUT_RDMA,
    context_settings,
    no_way_to,
    require_free_port,
    require_network,
)


def test_tuned_settings_apply_where_nobody_says_otherwise() -> None:
    assert context_settings(rdma=True, shm_lanes=False, ucx={}, environment={"PATH": "/bin"}) == {
        **TUNED,
        **WITHOUT_LANES,
    }


def test_shared_memory_lanes_are_asked_for_only_on_request() -> None:
    assert not set(SHM_LANES) & set(context_settings(rdma=True, shm_lanes=False, ucx={}, environment={}))
    with_lanes = context_settings(rdma=True, shm_lanes=True, ucx={}, environment={})
    assert SHM_LANES.items() <= with_lanes.items()
    assert not set(WITHOUT_LANES) & set(with_lanes), "their queues are in use then"


def test_configuration_beats_ours() -> None:
    settings = context_settings(rdma=True, shm_lanes=False, ucx={"TCP_TX_SEG_SIZE": "64K"}, environment={})
    assert settings["TCP_TX_SEG_SIZE"] == "64K"


def test_environment_beats_both() -> None:
    settings = context_settings(
        shm_lanes=False,
        rdma=True,
        ucx={"TLS": "tcp", "TCP_TX_SEG_SIZE": "64K"},
        environment={"UCX_TLS": "all", "UCX_TCP_TX_SEG_SIZE": "32K"},
    )
    assert "TLS" not in settings
    assert "TCP_TX_SEG_SIZE" not in settings
    assert settings["TCP_RX_SEG_SIZE"] == TUNED["TCP_RX_SEG_SIZE"]


@pytest.mark.parametrize(
    ("wider", "left_to_it"),
    [
        ("UCX_MM_FIFO_SIZE", {"POSIX_FIFO_SIZE", "SYSV_FIFO_SIZE"}),
        ("UCX_MM_ERROR_HANDLING", {"POSIX_ERROR_HANDLING", "SYSV_ERROR_HANDLING"}),
        ("UCX_CM_REUSEADDR", {"TCP_CM_REUSEADDR"}),
    ],
)
def test_wider_setting_of_the_user_counts_for_those_it_is_the_default_of(wider: str, left_to_it: set[str]) -> None:
    for shm_lanes in (True, False):
        settings = context_settings(rdma=True, shm_lanes=shm_lanes, ucx={}, environment={wider: "n"})
        assert not left_to_it & set(settings)


def test_rendezvous_threshold_is_ours_only_where_there_is_no_rdma() -> None:
    assert "RNDV_THRESH" not in context_settings(shm_lanes=True, rdma=True, ucx={}, environment={})
    assert WITHOUT_RDMA.items() <= context_settings(shm_lanes=True, rdma=False, ucx={}, environment={}).items()
    assert (
        context_settings(shm_lanes=False, rdma=False, ucx={"RNDV_THRESH": "8K"}, environment={})["RNDV_THRESH"] == "8K"
    )
    assert "RNDV_THRESH" not in context_settings(
        shm_lanes=False, rdma=False, ucx={}, environment={"UCX_RNDV_THRESH": "8K"}
    )


def test_callers_settings_are_not_changed() -> None:
    ucx = {"TLS": "tcp"}
    context_settings(rdma=True, shm_lanes=True, ucx=ucx, environment={})
    assert ucx == {"TLS": "tcp"}


def info(*resources: str) -> str:
    """What UCX says of a context with these, as `ucp_context_print_info` of UCX 1.21 words it."""
    lines = [
        f"#      resource {number}  :  md 0  dev {number}  flags -- {name}" for number, name in enumerate(resources)
    ]
    return "\n".join(["#", "# UCP context", "#", "#     component 1  :  tcp", *lines, "#"])


def test_context_that_reaches_no_other_process_is_refused_by_the_name_of_what_limits_it() -> None:
    inside = info("self/memory", "posix/memory", "sysv/memory", "cma/memory", "cuda_copy/cuda", "cuda_ipc/cuda")
    rows: list[tuple[dict[str, str], dict[str, str], str]] = [
        ({}, {"UCX_TLS": "self,sm"}, "UCX_TLS=self,sm (environment)"),
        ({"NET_DEVICES": "eth9"}, {}, "NET_DEVICES=eth9 (ucx=)"),
        ({}, {"UCX_TLS": "ib", "UCX_NET_DEVICES": "mlx5_0:1"}, "UCX_TLS=ib (environment), UCX_NET_DEVICES=mlx5_0:1"),
        ({}, {}, "this host"),
    ]
    for given, environment, named in rows:
        with row(given=given, environment=environment), pytest.raises(ConfigError) as caught:
            require_network(inside, given, environment)
        assert caught.value.message.startswith(named)


def test_any_network_will_do() -> None:
    for network in ("tcp/eth0", "rc_mlx5/mlx5_0:1", "ud_verbs/mlx5_0:1", "srd/efa_0"):
        with row(network=network):
            require_network(info("self/memory", network), {}, {"UCX_TLS": "whatever"})
    require_network("other words than today's", {}, {})


def test_loopback_alone_is_told_from_an_interface() -> None:
    limits = {"NET_DEVICES": "lo"}
    rows = [
        (("self/memory", "tcp/lo"), limits, "10.0.0.1", True),
        (("tcp/lo", "tcp/eth0"), limits, "10.0.0.1", False),
        (("tcp/lo",), limits, "127.0.0.1", False),
        (("tcp/lo",), {}, "10.0.0.1", False),
    ]
    for resources, given, host, is_refused in rows:
        with row(resources=resources, given=given, host=host):
            assert (no_way_to(host, info(*resources), given, {}) is not None) is is_refused


def test_range_of_ports_that_are_all_in_use_is_refused_since_ucx_would_look_for_ever() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(BusyError) as caught:
            require_free_port(f"{port}-{port}", ["127.0.0.1"])
        assert caught.value.facts["data_ports"] == f"{port}-{port}"
        require_free_port(f"{port - 20}-{port}", ["127.0.0.1"])
        require_free_port("0", ["127.0.0.1"])
