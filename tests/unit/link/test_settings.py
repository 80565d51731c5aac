"""Which UCX settings a context gets: ours, the configuration's, the user's."""

from __future__ import annotations

import pytest

from ucxx_transport.errors import ConfigError
from ucxx_transport.link.settings import SHM_LANES, TUNED, WITHOUT_RDMA, context_settings


def test_tuned_settings_apply_where_nobody_says_otherwise() -> None:
    assert context_settings(rdma=True, shm_lanes=False, ucx={}, environment={"PATH": "/bin"}) == dict(TUNED)


def test_shared_memory_lanes_are_asked_for_only_on_request() -> None:
    assert not set(SHM_LANES) & set(context_settings(rdma=True, shm_lanes=False, ucx={}, environment={}))
    assert SHM_LANES.items() <= context_settings(rdma=True, shm_lanes=True, ucx={}, environment={}).items()


@pytest.mark.parametrize("name", ["TCP_TX_SEG_SIZE", "UCX_TCP_TX_SEG_SIZE"])
def test_configuration_beats_ours(name: str) -> None:
    assert context_settings(rdma=True, shm_lanes=False, ucx={name: "64K"}, environment={})["TCP_TX_SEG_SIZE"] == "64K"


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
        ("UCX_MM_ERROR_HANDLING", {"POSIX_ERROR_HANDLING", "SYSV_ERROR_HANDLING"}),
        ("UCX_CM_REUSEADDR", {"TCP_CM_REUSEADDR"}),
    ],
)
def test_wider_setting_of_the_user_counts_for_those_it_is_the_default_of(wider: str, left_to_it: set[str]) -> None:
    settings = context_settings(rdma=True, shm_lanes=True, ucx={}, environment={wider: "n"})
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
    ucx = {"UCX_TLS": "tcp"}
    context_settings(rdma=True, shm_lanes=True, ucx=ucx, environment={})
    assert ucx == {"UCX_TLS": "tcp"}


def test_value_that_is_no_string_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        context_settings(rdma=True, shm_lanes=False, ucx={"TCP_MAX_POLL": 5}, environment={})
    assert caught.value.facts["name"] == "TCP_MAX_POLL"
