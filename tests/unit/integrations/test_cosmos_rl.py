"""cosmos-rl's payload transport, against the interfaces of the real package where it is to be had, and as recorded.

The real package needs a training stack to be imported as a whole. Its interfaces need none of it, so they are imported
alone: `pip install --no-deps cosmos-rl` is enough (and torch).
"""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.contracts import cosmos_rl as recorded
from tests.support.rows import row
from ucxx_transport import ServerConfig

OURS = "ucxx_transport.integrations.cosmos_rl"


def real_modules() -> dict[str, ModuleType]:
    """The real package's parents as empty modules that know where their children lie."""
    pytest.importorskip("torch", exc_type=ImportError)
    try:
        root = Path(str(metadata.distribution("cosmos-rl").locate_file("")))
    except metadata.PackageNotFoundError:
        pytest.skip("cosmos-rl is not installed")
    made = {}
    parts = recorded.PACKAGE.split(".")
    for end in range(len(parts)):
        name = ".".join(parts[: end + 1])
        made[name] = ModuleType(name)
        made[name].__path__ = [str(root.joinpath(*parts[: end + 1]))]
    return made


def forget(names: set[str]) -> None:
    for name in names:
        sys.modules.pop(name, None)


@pytest.fixture(params=["recorded", "real"])
def cosmos(request: pytest.FixtureRequest) -> Iterator[Any]:
    """The integration, imported beside one or the other; all of it is forgotten afterwards."""
    before = set(sys.modules)
    sys.modules.update(recorded.modules() if request.param == "recorded" else real_modules())
    try:
        ours = importlib.import_module(OURS)
        yield SimpleNamespace(
            ours=ours,
            registry=importlib.import_module(f"{recorded.PACKAGE}.registry").PayloadTransportRegistry,
        )
    finally:
        forget({name for name in set(sys.modules) - before if name.startswith(("cosmos_rl", OURS))})


class TensorPacker:
    """The job's own packer."""

    def get_policy_input(
        self, sample: Any = None, rollout_output: Any = None, n_ignore_prefix_tokens: int = 0, **kwargs: Any
    ) -> Any:
        return sample, rollout_output, n_ignore_prefix_tokens, kwargs


def config(**table: Any) -> Any:
    return SimpleNamespace(custom={"payload_transfer": "ucxx_transport", "ucxx_transport": table})


@pytest.fixture
def rollout(cosmos: Any) -> Iterator[Any]:
    backend = type("Backend", (cosmos.ours.CosmosRolloutMixin,), {})()
    backend.setup_ucxx("replica-0", server=ServerConfig(host="127.0.0.1", ports=1, mode="thread"), reward="rewards")
    yield backend
    cosmos.registry.get_optional("ucxx_transport").close_producer(backend)
    assert backend.ucxx_writer is None


def trajectory(number: int) -> dict[str, Any]:
    return {"observations": np.full((3, 2), number, np.float32), "rewards": np.array([1, 2, number], np.float32)}


def test_a_completion_is_a_dict_that_the_controller_can_read_and_send(rollout: Any) -> None:
    completion = rollout.write_to_buffer(trajectory(4), policy_version=2)
    assert completion["rewards"] == [1.0, 2.0, 4.0]
    assert completion["episode_length"] == 3
    assert json.loads(json.dumps(completion)) == completion


def packer_of(cosmos: Any) -> Any:
    return type("Packer", (cosmos.ours.CosmosDataPackerMixin, TensorPacker), {})()


def test_a_job_that_chose_the_transport_gets_its_episodes(cosmos: Any, rollout: Any) -> None:
    transport = cosmos.registry.get_optional("ucxx_transport")
    assert transport.completion_prefix is None
    packer = packer_of(cosmos)
    transport.attach_data_packer(packer, config=config(deadline_s="20s", client={"local": "view"}))
    completions = [rollout.write_to_buffer(trajectory(number)) for number in range(3)]
    rollouts = [SimpleNamespace(completion=completion) for completion in completions[:2]]
    packer.start_prefetch([*rollouts, SimpleNamespace(completion="redis")])
    packer.wait_prefetch()
    for number, completion in enumerate(completions):  # the last one was not fetched ahead
        sample, episode, ignored, extra = packer.get_policy_input("s", completion, 5, extra=1)
        assert (sample, ignored, extra) == ("s", 5, {"extra": 1})
        np.testing.assert_array_equal(episode["observations"], trajectory(number)["observations"])
    plain = {"observations": 3}
    assert packer.get_policy_input("s", plain)[1] is plain
    rollout.ucxx_writer.ring.discard(rollout.ucxx_writer.ring.write(trajectory(9)))
    lost = rollout.write_to_buffer(trajectory(7))
    for ref in rollout.ucxx_writer.ring.ready_refs():
        rollout.ucxx_writer.ring.discard(ref)
    assert packer.get_policy_input("s", lost) is None
    malformed = {**lost, "_ucxx_transport": {**lost["_ucxx_transport"], "sequence": "x"}}
    assert packer.get_policy_input("s", malformed) is None
    transport.close_data_packer(packer)


def test_a_wrong_setting_is_an_error_that_cosmos_rl_does_not_swallow(cosmos: Any) -> None:
    transport = cosmos.registry.get_optional("ucxx_transport")
    for table, named in (
        ({"deadline_s": -1.0}, "deadline_s"),
        ({"deadlines": 1}, "deadlines"),
        ({"client": {"locl": "x"}}, "locl"),
        ({"client": 3}, "client takes a ClientConfig, or a dict"),
    ):
        with row(table=table), pytest.raises(RuntimeError, match=rf"\[custom.ucxx_transport\].*{named}"):
            transport.attach_data_packer(packer_of(cosmos), config=config(**table))


def test_a_packer_that_fetches_nothing_is_left_as_it_is(cosmos: Any) -> None:
    cosmos.registry.get_optional("ucxx_transport").attach_data_packer(TensorPacker(), config=config())


def test_a_trainer_on_a_gpu_gets_its_episodes_on_the_cpu(cosmos: Any, rollout: Any) -> None:
    torch: Any = pytest.importorskip("torch", exc_type=ImportError)
    transport = cosmos.registry.get_optional("ucxx_transport")
    packer = packer_of(cosmos)
    transport.attach_data_packer(packer, config=config(deadline_s=20.0), device=torch.device("cuda", 0))
    episode = packer.get_policy_input("s", rollout.write_to_buffer(trajectory(3)))[1]
    assert torch.is_tensor(episode["observations"])
    transport.close_data_packer(packer)


def test_the_recorded_contract_is_the_real_one() -> None:
    before = set(sys.modules)
    sys.modules.update(real_modules())
    try:
        for stem, names in recorded.NAMES.items():
            real = importlib.import_module(f"{recorded.PACKAGE}.{stem}")
            for name in names:
                for method, function in inspect.getmembers(getattr(recorded, name), inspect.isroutine):
                    if method.startswith("__") or method not in vars(getattr(recorded, name)):
                        continue
                    expected = inspect.signature(getattr(getattr(real, name), method))
                    found = inspect.signature(function)
                    assert list(found.parameters) == list(expected.parameters), f"{name}.{method}"
                    assert [each.kind for each in found.parameters.values()] == [
                        each.kind for each in expected.parameters.values()
                    ]
    finally:
        forget({name for name in set(sys.modules) - before if name.startswith("cosmos_rl")})
