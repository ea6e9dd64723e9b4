"""Which GPUs Ray gives to ranks and engines. Ray counts GPUs that are only said to be there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from prorl_nemo.cluster.placement import reserve
from prorl_nemo.recipe import parse_recipe


@pytest.fixture(autouse=True)
def four_gpus() -> Iterator[None]:
    ray.shutdown()  # The one of other tests.
    ray.init(num_cpus=2, num_gpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@ray.remote
class Visible:
    def devices(self) -> list[str]:
        return os.environ["CUDA_VISIBLE_DEVICES"].split(",")


def seen(options: dict[str, Any]) -> Any:
    """An actor that stays, as ranks and engines do."""
    variables = options.pop("environment", {})
    return Visible.options(**options, runtime_env={"env_vars": variables}).remote()


def test_an_engine_sees_the_gpus_it_shares_with_ranks(tmp_path: Path) -> None:
    recipe = parse_recipe(
        {
            "name": "split",
            "runs_dir": str(tmp_path),
            "model": "somewhere",
            "data": {"sources": [{"task": "coin_flip"}]},
            "policy": {"data_parallel": 3},
            "rollout": {"engines": 2, "tensor_parallel": 2},
            "stages": [{"steps": 1}],
        }
    )
    for _ in range(2):  # What is given back can be had again.
        with reserve(recipe, tmp_path) as placement:
            ranks = [seen(placement.rank_options(rank)) for rank in range(3)]
            engines = [seen(options) for options in placement.engine_options()]
            beside = ray.get([rank.devices.remote() for rank in ranks], timeout=100)
            found = ray.get([engine.devices.remote() for engine in engines], timeout=100)
            assert [len(devices) for devices in beside] == [1, 1, 1]
            assert found[0] == beside[0] + beside[1]
            assert found[1][0] == beside[2][0]
            assert sorted(found[0] + found[1]) == ["0", "1", "2", "3"]
            # An engine that is replaced gets the same.
            again = seen(placement.engine_options()[1])
            assert ray.get(again.devices.remote(), timeout=100) == found[1]
