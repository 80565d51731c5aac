"""Keyword arguments over UCXX_TRANSPORT_* over ./ucxx_transport.toml; an unknown name is an error in all of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from ucxx_transport.config import ClientConfig, RingConfig, ServerConfig
from ucxx_transport.errors import ConfigError

Toml = Callable[[str], Path]


@pytest.fixture
def toml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Toml:
    monkeypatch.chdir(tmp_path)

    def write(text: str) -> Path:
        path = tmp_path / "ucxx_transport.toml"
        path.write_text(text)
        return path

    return write


@pytest.fixture
def env(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def set_all(**values: str) -> None:
        for name, value in values.items():
            monkeypatch.setenv(f"UCXX_TRANSPORT_{name}", value)

    return set_all


Env = Callable[..., None]


def test_an_argument_beats_the_environment_and_that_beats_the_file(toml: Toml, env: Env) -> None:
    toml("[client]\ndeadline_s = '1s'\nread_attempts = 1\nmax_connections = 1\n")
    env(CLIENT__DEADLINE_S="2s", CLIENT__READ_ATTEMPTS="2")
    config = ClientConfig(deadline_s=3.0)
    assert (config.deadline_s, config.read_attempts, config.max_connections) == (3.0, 2, 1)


def test_each_section_takes_its_own(toml: Toml, env: Env) -> None:
    toml("[ring]\nslots = 8\nslot_bytes = '1MiB'\n[server]\nports = [5001, 5002]\nmode = 'thread'\n")
    env(CLIENT__LOCAL="off", RING__PREFAULT="false")
    ring, server = RingConfig(), ServerConfig()
    assert (ring.slots, ring.slot_bytes, ring.prefault) == (8, 1 << 20, False)
    assert (server.ports, server.mode) == ((5001, 5002), "thread")
    assert ClientConfig().local == "off"


def test_an_explicit_none_is_a_value(env: Env) -> None:
    env(SERVER__TOKEN="secret", SERVER__HOST="10.0.0.1")
    assert ServerConfig().token_bytes == b"secret"
    config = ServerConfig(token=None, host=None)
    assert (config.token, config.host) == (None, None)


def test_a_schema_in_code_replaces_a_slot_size_from_outside(env: Env) -> None:
    from ucxx_transport.schema import Schema, TensorSpec

    env(RING__SLOT_BYTES="1MiB")
    schema = Schema([TensorSpec(name="x", shape=(4,), dtype="float32")])
    assert RingConfig(schema=schema).slot_bytes is None
    with pytest.raises(ConfigError, match="both"):
        RingConfig(schema=schema, slot_bytes=4096)


def test_settings_of_ucx_are_merged_by_name(toml: Toml, env: Env) -> None:
    toml("[server.ucx]\nTLS = 'all'\nRNDV_THRESH = 1024\n")
    env(SERVER__UCX__TLS="tcp", SERVER__UCX__LOG_LEVEL="warn")
    assert ServerConfig(ucx={"NET_DEVICES": "lo"}).ucx == {
        "TLS": "tcp",
        "RNDV_THRESH": "1024",
        "LOG_LEVEL": "warn",
        "NET_DEVICES": "lo",
    }


def test_the_stronger_source_wins_however_each_writes_a_name_of_ucx(toml: Toml, env: Env) -> None:
    toml("[server.ucx]\nUCX_TLS = 'all'\n")
    env(SERVER__UCX__TLS="self")
    assert ServerConfig().ucx == {"TLS": "self"}
    assert ServerConfig(ucx={"UCX_TLS": "tcp"}).ucx == {"TLS": "tcp"}


@pytest.mark.parametrize("build", [RingConfig, ServerConfig, ClientConfig])
def test_an_unknown_variable_is_an_error_wherever_it_stands(env: Env, build: Callable[[], object]) -> None:
    env(CLIENT__DEADLIN_S="1s")
    with pytest.raises(ConfigError, match="did you mean 'deadline_s'") as caught:
        build()
    assert "UCXX_TRANSPORT_CLIENT__DEADLIN_S" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("SERVR__PORTS", "did you mean 'server'"),
        ("SERVER", "setting"),
        ("SERVER_PORTS", "did you mean 'server'"),
        ("SERVER__PORTS__FIRST", "has no parts"),
        ("RING__SCHEMA", "schema"),
    ],
)
def test_a_variable_that_names_no_setting_is_an_error(env: Env, name: str, said: str) -> None:
    env(**{name: "1"})
    with pytest.raises(ConfigError, match=said):
        ServerConfig()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[server]\nprots = 4\n", "did you mean 'ports'"),
        ("[servers]\nports = 4\n", "did you mean 'server'"),
        ("ports = 4\n", "outside a section"),
        ("[server\n", "is no TOML that can be read"),
        ("[server]\nports = 99\n", "ucxx_transport.toml"),
    ],
)
def test_a_file_that_is_wrong_is_an_error_that_names_it(toml: Toml, text: str, said: str) -> None:
    toml(text)
    with pytest.raises(ConfigError, match=said):
        ServerConfig()


def test_a_file_that_cannot_be_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ucxx_transport.toml").mkdir()
    with pytest.raises(ConfigError, match="can be read"):
        ServerConfig()


def test_a_folder_that_may_not_be_entered_has_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a job's user is another than the one whose folder it was started in."""
    (folder := tmp_path / "of another").mkdir()
    monkeypatch.chdir(folder)
    folder.chmod(0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        assert ServerConfig().ports == 2
    finally:
        os.seteuid(user)
        folder.chmod(0o700)


def test_a_changed_file_is_read_again(toml: Toml) -> None:
    path = toml("[server]\nports = 6\n")
    assert ServerConfig().ports == 6
    path.write_text("[server]\nports = 3\n")
    os.utime(path, ns=(1, 1))
    assert ServerConfig().ports == 3
    path.unlink()
    assert ServerConfig().ports == 2


def test_a_bad_value_says_where_it_came_from(env: Env) -> None:
    env(SERVER__IDLE_TIMEOUT_S="soon")
    with pytest.raises(ConfigError, match="environment UCXX_TRANSPORT_SERVER__IDLE_TIMEOUT_S") as caught:
        ServerConfig()
    assert caught.value.facts["field"] == "idle_timeout_s"


def test_a_bad_token_from_outside_is_not_repeated(toml: Toml) -> None:
    toml("[server]\ntoken = ['correct horse']\n")
    with pytest.raises(ConfigError) as caught:
        ServerConfig()
    assert "horse" not in str(caught.value)


def test_an_empty_variable_is_not_taken_for_unset(env: Env) -> None:
    env(SERVER__TOKEN="")
    with pytest.raises(ConfigError, match="empty token"):
        ServerConfig()


def test_settings_of_ucx_are_named_one_by_one(env: Env) -> None:
    env(SERVER__UCX="TLS=tcp")
    with pytest.raises(ConfigError, match="names to values") as caught:
        ServerConfig()
    assert caught.value.facts["source"] == "environment UCXX_TRANSPORT_SERVER__UCX"
