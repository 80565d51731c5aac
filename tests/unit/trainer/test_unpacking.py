from __future__ import annotations

import sys

import pytest

from ucxx_transport import ConfigError
from ucxx_transport.trainer.unpacking import map_leaves, unpacker_for


def test_every_leaf_of_a_tree_is_mapped_in_its_place() -> None:
    assert map_leaves(lambda leaf: -leaf, {"a": [1, {"b": 2}], "c": 3}) == {"a": [-1, {"b": -2}], "c": -3}


@pytest.mark.parametrize("device", ["tpu", "cpu:x:y", "", "numpyy", 3])
def test_an_unknown_device_is_refused(device: object) -> None:
    with pytest.raises(ConfigError, match="device must be None, 'numpy', 'cpu', 'cuda'") as caught:
        unpacker_for(device)
    assert caught.value.facts["field"] == "device"


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_without_torch_its_devices_say_what_to_install(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ConfigError, match=r"ucxx_transport\[torch\]"):
        unpacker_for(device)
