"""Frozen settings: what they accept, what they refuse, and what the refusal says."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import numpy as np
import pytest

from tests.support.rows import row
from ucxx_transport.config import ClientConfig, PublisherConfig, RingConfig, ServerConfig, StoreConfig
from ucxx_transport.errors import ConfigError


class SomeSchema:
    nbytes = 1024
    fingerprint = 7

    def to_dict(self) -> dict[str, Any]:
        return {"fields": []}


def refusal(build: Any, **arguments: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        build(**arguments)
    return caught.value


def test_defaults_need_nothing_but_what_a_slot_holds() -> None:
    ring = RingConfig(slot_bytes="1MiB")
    assert (ring.slots, ring.slot_bytes, ring.on_full, ring.readers, ring.prefault) == (
        64,
        1 << 20,
        "overwrite",
        1,
        True,
    )
    assert (ServerConfig().ports, ServerConfig().mode, ServerConfig().token) == (2, "process", None)
    assert (ClientConfig().local, ClientConfig().deadline_s, ClientConfig().read_attempts) == ("auto", 5.0, 2)


def test_an_endpoint_is_retired_by_the_client_before_the_server_evicts_it() -> None:
    assert ClientConfig().pool_endpoint_max_age_s < ServerConfig().idle_timeout_s


def test_sizes_and_durations_may_be_text() -> None:
    config = ClientConfig(buffer_pool_bytes="256MiB", deadline_s="250ms", port_quarantine_s="2m")
    assert (config.buffer_pool_bytes, config.deadline_s, config.port_quarantine_s) == (256 << 20, 0.25, 120.0)


@pytest.mark.parametrize("config", [RingConfig(slot_bytes=1), ServerConfig(), ClientConfig()])
def test_settings_are_frozen(config: Any) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, dataclasses.fields(config)[0].name, 1)
    with pytest.raises((AttributeError, TypeError)):
        config.something_else = 1


def test_a_changed_copy_is_validated_again() -> None:
    config = ServerConfig(ports=2, token="secret")
    changed = dataclasses.replace(config, ports=3)
    assert (changed.ports, changed.token_bytes, config.ports) == (3, b"secret", 2)
    with pytest.raises(ConfigError):
        dataclasses.replace(config, ports=0)


def test_settings_survive_a_trip_to_another_process() -> None:
    config = ServerConfig(ports=[5001, 5002], token=b"\x00\xff", ucx={"TLS": "tcp"})
    assert pickle.loads(pickle.dumps(config)) == config  # noqa: S301 - bytes made in this very line


@pytest.mark.parametrize("restore", [lambda config: pickle.loads(pickle.dumps(config)), copy.copy, copy.deepcopy])  # noqa: S301 - as above
def test_a_restored_copy_reads_no_source_again(restore: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ServerConfig(token="t", ucx={"TLS": "tcp"}, base_port=5000)
    monkeypatch.setenv("UCXX_TRANSPORT_SERVER__UCX__TLS", "all")
    monkeypatch.setenv("UCXX_TRANSPORT_SERVER__NO_SUCH_SETTING", "1")
    assert restore(config) == config


def test_a_refusal_names_field_value_source_and_what_is_expected() -> None:
    for field, value, problem in [
        ("read_attempts", 101, "expected 1 to 100"),
        ("deadline_s", 0, "expected more than 0"),
        ("spin_s", "1s", "expected 0 to 0.1"),
        ("local", "remote", "expected one of 'auto', 'view', 'copy', 'off'"),
        ("max_payload_bytes", "1.5B", "expected a whole number of bytes, not '1.5B'"),
        ("verify_checksum", "maybe", "expected true or false"),
        ("ucx", "TLS=tcp", "expected names to values, such as {'TLS': 'tcp'}"),
        ("ucx", {"TLS": None}, "expected names to text, numbers or booleans, not 'TLS' to None"),
    ]:
        error = refusal(ClientConfig, **{field: value})
        assert error.message == f"client.{field} = {value!r} (keyword argument): {problem}"
        assert error.facts == {"field": field, "value": repr(value), "source": "keyword argument"}


def test_defaults_are_what_the_constructor_would_hold() -> None:
    rows: list[Any] = [RingConfig, ServerConfig, ClientConfig, StoreConfig, PublisherConfig]
    for config in rows:
        with row(config=config):
            parts = {"slot_bytes": 1} if config is RingConfig else {}
            made = config(**parts)
            assert dataclasses.replace(made) == made


def test_booleans_may_be_text_or_a_number() -> None:
    for given, held in [(True, True), ("yes", True), ("1", True), (1, True), ("Off", False), ("n", False), (0, False)]:
        assert ServerConfig(shm_lanes=given).shm_lanes is held, given  # type: ignore[arg-type]  # what the environment says


def test_a_token_is_never_shown() -> None:
    config = ClientConfig(token="correct horse")
    assert "correct horse" not in repr(config) + str(config) + str(dataclasses.asdict(config))
    assert config.token_bytes == b"correct horse"
    assert "horse" not in str(refusal(ClientConfig, token=["correct horse"]))


def test_a_token_is_bytes_or_text() -> None:
    for token in (5, ["a"], {"hex": "00"}, {"secret, as hex": "00"}):
        with row(token=token):
            assert "expected bytes or text" in str(refusal(ServerConfig, token=token))


@pytest.mark.parametrize("token", ["", b""])
def test_an_empty_token_is_refused_since_it_protects_nothing(token: str | bytes) -> None:
    assert "empty token" in str(refusal(ServerConfig, token=token))


class TestRing:
    def test_exactly_one_of_schema_and_slot_bytes(self) -> None:
        assert "neither" in str(refusal(RingConfig))
        assert "both" in str(refusal(RingConfig, schema=SomeSchema(), slot_bytes=1))
        assert RingConfig(schema=SomeSchema()).slot_bytes is None

    def test_a_schema_is_recognised_by_what_it_can_do(self) -> None:
        assert "schema" in str(refusal(RingConfig, schema={"fields": []}))

    def test_what_is_out_of_bounds_is_named(self) -> None:
        rows: list[tuple[str, object]] = [
            ("slots", 0),
            ("slots", 65537),
            ("slots", True),
            ("slots", 1.5),
            ("slots", np.array([1, 2])),
            ("readers", 0),
            ("readers", 65),
            ("slot_bytes", 0),
            ("slot_bytes", "1XB"),
            ("slot_bytes", -1),
            ("on_full", "drop"),
            ("name", "a/b"),
            ("name", ".hidden"),
            ("name", ""),
            ("name", "x" * 200),
            ("name", "trailing\n"),
            ("block_timeout_s", 0),
            ("block_timeout_s", "inf"),
            ("lock_timeout_s", float("inf")),
        ]
        for field, value in rows:
            with row(field=field, value=value):
                error = refusal(RingConfig, **{"slot_bytes": 4096, field: value})
                assert f"ring.{field}" in str(error)
                assert error.facts["field"] == field


class TestServer:
    def test_ports_are_a_count_or_a_list(self) -> None:
        rows: list[tuple[Any, object]] = [
            (1, 1),
            (64, 64),
            ("8", 8),
            ([5001], (5001,)),
            ((0, 0), (0, 0)),
            ("5001,5002", (5001, 5002)),
            ("[5001]", (5001,)),
        ]
        for given, held in rows:
            with row(given=given, held=held):
                assert ServerConfig(ports=given).ports == held

    def test_other_ports_are_refused(self) -> None:
        rows: list[Any] = [
            0,
            65,
            5001,
            [],
            [70000],
            [-1],
            [5001, 5001],
            True,
            "many",
            [True],
            list(range(1, 66)),
            None,
            1.5,
        ]
        for ports in rows:
            with row(ports=ports):
                assert refusal(ServerConfig, ports=ports).facts["field"] == "ports"

    def test_a_port_number_in_place_of_a_count_is_explained(self) -> None:
        assert "[7001]" in str(refusal(ServerConfig, ports=7001))

    def test_a_base_port_leaves_room_for_all_ports(self) -> None:
        assert ServerConfig(base_port=65532, ports=4).candidates(1) == [65533, 65534, 65535, 65532]
        assert "65535" in str(refusal(ServerConfig, base_port=65533, ports=4))
        assert "drop one" in str(refusal(ServerConfig, base_port=5000, ports=[5001]))

    def test_data_ports_are_a_range_that_becomes_ucx_s_own(self) -> None:
        rows: list[Any] = [(15100, 15131), [15100, 15131], "15100-15131", "15100,15131", "[15100, 15131]"]
        for given in rows:
            with row(given=given):
                for config in (ServerConfig(data_ports=given), ClientConfig(data_ports=given)):
                    assert config.data_ports == (15100, 15131)
                    assert config.link_settings == {"TCP_PORT_RANGE": "15100-15131"}
        assert ServerConfig(ucx={"TLS": "tcp"}).link_settings == {"TLS": "tcp"}

    def test_data_ports_that_cannot_work_are_refused(self) -> None:
        rows: list[tuple[dict[str, Any], str]] = [
            ({"data_ports": (15131, 15100)}, "first <= last"),
            ({"data_ports": (80, 90)}, "1024"),
            ({"data_ports": (65000, 65536)}, "65535"),
            ({"data_ports": 15100}, "first and the last"),
            ({"data_ports": (1, 2, 3)}, "first and the last"),
            ({"data_ports": "open"}, "first and the last"),
            ({"data_ports": (15100, 15102), "ports": 4}, "at least ports = 4"),
            ({"data_ports": (15100, 15131), "ports": [15001, 15120]}, "15120 is to be listened on"),
            ({"data_ports": (15001, 15131), "base_port": 15000}, "15001 is to be listened on"),
        ]
        for given, problem in rows:
            with row(given=given, problem=problem):
                error = refusal(ServerConfig, **given)
                assert error.facts["field"] == "data_ports"
                assert problem in str(error)

    def test_ucx_settings_lose_their_prefix_and_become_text(self) -> None:
        config = ServerConfig(ucx={"UCX_TLS": "tcp", "max_eager_lanes": 2, "WARN_UNUSED_ENV_VARS": False})
        assert config.ucx == {"TLS": "tcp", "MAX_EAGER_LANES": "2", "WARN_UNUSED_ENV_VARS": "n"}

    def test_a_callers_mapping_is_neither_kept_nor_changed(self) -> None:
        given = {"UCX_TLS": "tcp"}
        config = ServerConfig(ucx=given)
        given["UCX_TLS"] = "self"
        assert config.ucx == {"TLS": "tcp"}


def test_all_that_is_wrong_is_said_at_once() -> None:
    error = refusal(ClientConfig, local="remote", read_attempts=0)
    assert "client.local = 'remote'" in str(error)
    assert "client.read_attempts = 0" in str(error)


def test_a_misspelt_argument_gets_a_suggestion() -> None:
    assert "did you mean 'ports'?" in str(refusal(ServerConfig, prots=4))
    assert "known:" in str(refusal(ServerConfig, zzzzzz=4))


def test_every_setting_says_what_it_is_for() -> None:
    for config in (RingConfig, ServerConfig, ClientConfig, StoreConfig, PublisherConfig):
        for field in dataclasses.fields(config):
            assert field.metadata["rule"].description, f"{config.__name__}.{field.name}"
