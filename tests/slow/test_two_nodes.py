"""Trainer ranks over a Ray cluster of two nodes, one of which dies. Both are on this machine."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import ray
from ray.cluster_utils import Cluster
from rich.console import Console

from prorl_nemo.cluster.check import check_cluster
from prorl_nemo.cluster.placement import ClusterError, NodeLost, reserve
from prorl_nemo.cluster.policy_group import PolicyError, PolicyGroup
from prorl_nemo.recipe import Recipe, parse_recipe
from prorl_nemo.tiny_model import tiny_model
from prorl_nemo.training.batch import TrainingBatch


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two nodes with one made-up GPU each."""
    ray.shutdown()  # The one of other tests.
    with pytest.MonkeyPatch.context() as patch:
        # By the address that it leaves in /tmp/ray every run of this machine would join it.
        patch.setattr(ray._private.utils, "write_ray_address", lambda address: None)
        made = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 2, "num_gpus": 1, "include_dashboard": False},
        )
    made.add_node(num_cpus=2, num_gpus=1)
    ray.init(address=made.address, log_to_driver=False)
    yield made
    ray.shutdown()
    made.shutdown()


def recipe_of(folder: Path, model: Path, ranks: int) -> Recipe:
    return parse_recipe(
        {
            "name": "two-nodes",
            "model": str(model),
            "runs_dir": str(folder / "runs"),
            "policy": {"precision": "fp32", "data_parallel": ranks, "threads": 1},
            "rollout": {"prompts_per_step": 8, "engines": 2},
            "algorithm": {"minibatches": 1},
            "data": {"sources": [{"task": "chain_sum"}]},
            "faults": {"silent_seconds": 60.0},
            "stages": [{"steps": 1}],
        }
    )


def batch() -> TrainingBatch:
    draw = np.random.default_rng(0)
    responses = [draw.integers(3, 290, 9) for _ in range(4)]
    return TrainingBatch(
        prompts=[[5, 6, 7], [8, 9]],
        groups=[[0, 1], [2, 3]],
        responses=responses,
        engine_logprobs=[np.zeros(9, dtype=np.float32)] * 4,
        advantages=[1.0, -1.0, 1.0, -1.0],
        temperature=1.0,
    )


def test_every_node_is_looked_at(cluster: Cluster, tmp_path: Path) -> None:
    """`prorl check --cluster`: the GPUs are made up, and missed; the network is there."""
    recipe = recipe_of(tmp_path, tmp_path, 2)
    console = Console(record=True, width=120, file=io.StringIO())
    assert not check_cluster(recipe, console)
    text = console.export_text()
    assert text.count("0 GPUs are visible, 1 are needed") == 2
    assert text.count("GB/s") == 3 and "bus bandwidth" in text  # There, back, all-reduce.
    assert not list((tmp_path / "runs").glob(".seen_*"))
    split = recipe.model_copy(
        update={"rollout": recipe.rollout.model_copy(update={"tensor_parallel": 2})}
    )
    with pytest.raises(ClusterError, match=r"rollout\.tensor_parallel"):
        check_cluster(split, console)


def test_ranks_on_both_nodes_and_a_node_that_dies(cluster: Cluster, tmp_path: Path) -> None:
    model = tiny_model("llama", tmp_path / "model")
    with (
        pytest.raises(ClusterError, match=r"3 trainer ranks .* need 3 GPUs"),
        reserve(recipe_of(tmp_path, model, 3), model),
    ):
        pass
    recipe = recipe_of(tmp_path, model, 2)
    alone = PolicyGroup(recipe_of(tmp_path, model, 1), model)
    wanted, _ = alone.logprobs(batch())
    alone.shutdown()
    with reserve(recipe, model) as placement:
        assert len(set(placement.assignment.bundles)) == 2
        assert [options["num_gpus"] for options in placement.engine_options()] == [0.5, 0.5]
        placement.check()
        policy = PolicyGroup(recipe, model, placement)
        found, _ = policy.logprobs(batch())
        # fp32, and each sequence is computed by one rank in the same order of sums.
        assert max(np.abs(a - b).max() for a, b in zip(found, wanted, strict=True)) < 1e-5
        (other,) = cluster.worker_nodes
        cluster.remove_node(other, allow_graceful=False)
        died = time.monotonic()
        with pytest.raises(PolicyError):
            policy.logprobs(batch())
        with pytest.raises(NodeLost, match="lost node"):
            placement.check()
        assert time.monotonic() - died < 60
        policy.shutdown()
    # The next start sees what is left, and refuses at once.
    with pytest.raises(ClusterError, match="need 2 GPUs"), reserve(recipe, model):
        pass
