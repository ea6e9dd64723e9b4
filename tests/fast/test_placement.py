"""Who runs where: whole groups on a node, engines beside ranks, refusals that say why."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from prorl_nemo.cluster.placement import (
    Assignment,
    ClusterError,
    Node,
    assign,
    canary,
    check_transfer,
    listed,
)
from prorl_nemo.recipe import Policy


def nodes(*gpus: int) -> list[Node]:
    return [Node(f"id{i}", f"10.0.0.{i}", count) for i, count in enumerate(gpus)]


def policy(tensor: int = 1, context: int = 1, pipeline: int = 1, data: int = 1) -> Policy:
    return Policy(
        tensor_parallel=tensor,
        context_parallel=context,
        pipeline_parallel=pipeline,
        data_parallel=data,
        shared_prompts=context == 1,
    )


def test_by_hand_on_gpus() -> None:
    """Three GPUs a node leave one idle in each: a group of two may not straddle."""
    found = assign(nodes(3, 3, 3), policy(tensor=2, data=3), engines=3)
    assert found.bundles == ("id0", "id0", "id1", "id1", "id2", "id2")
    assert found.ranks == (0, 1, 2, 3, 4, 5)
    # An engine on every node, each beside the first rank of a group.
    assert found.engines == ((0,), (2,), (4,))
    assert [found.gpu_share(b) for b in range(6)] == [0.5, 1.0, 0.5, 1.0, 0.5, 1.0]


def test_more_engines_than_ranks_take_idle_gpus() -> None:
    found = assign(nodes(2, 2), policy(data=2), engines=4)
    assert found.bundles == ("id0", "id0", "id1", "id1")
    assert found.engines == ((0,), (1,), (2,), (3,)) and found.ranks == (0, 1)


def test_by_hand_on_cpus() -> None:
    found = assign(nodes(0, 0), policy(tensor=2, data=2), engines=3)
    assert not found.gpu and found.bundles == ("id0", "id1")
    assert found.ranks == (0, 0, 1, 1) and found.engines == ((0,), (0,), (1,))
    assert found.neighbours(found.ranks, 0) == 2 and found.gpu_share(0) == 0.0
    assert assign(nodes(0, 0), policy(), 1).ranks == (0,)


def test_memory_is_shared_by_what_runs_on_one_node() -> None:
    assert assign(nodes(8), policy(data=4), 4).one_machine
    assert not assign(nodes(2, 2), policy(data=4), 4).one_machine
    assert assign(nodes(0), policy(tensor=2), 2).one_machine
    assert not assign(nodes(0, 0), policy(tensor=2, data=2), 3).one_machine


def test_ways_of_the_weights_that_gpus_do_not_allow() -> None:
    alone = assign(nodes(1), policy(), 1)
    check_transfer(alone, policy(), "cuda_ipc")
    with pytest.raises(ClusterError, match="broadcast needs engines on other GPUs"):
        check_transfer(alone, policy(), "broadcast")
    pair = assign(nodes(2), policy(data=2), 2)
    with pytest.raises(ClusterError, match=r"cuda_ipc needs every engine .* here are 2 engines"):
        check_transfer(pair, policy(data=2), "cuda_ipc")
    # An engine over the GPUs of both stages maps what either sends.
    stages = policy(pipeline=2)
    check_transfer(assign(nodes(2), stages, 1, tensor_parallel=2), stages, "cuda_ipc")
    with pytest.raises(ClusterError, match="1 engines and 2 such"):
        check_transfer(assign(nodes(2), stages, 1), stages, "cuda_ipc")
    check_transfer(pair, policy(data=2), "host")
    check_transfer(assign(nodes(0), policy(), 2), policy(), "broadcast")


def test_login_node_without_gpus_gets_nothing() -> None:
    assert set(assign(nodes(0, 4), policy(data=4), 4).bundles) == {"id1"}


LAYOUTS = [
    (policy(tensor=t, context=c, pipeline=p, data=d), gpus, engines, split)
    for t, c, p, d in itertools.product((1, 2, 4), (1, 2), (1, 2), (1, 3))
    for gpus in ((8, 8, 8, 8), (4, 6, 3, 8, 5, 8), (2, 2, 16, 32), (48,))
    for engines in (1, 3, t * c * p * d, t * c * p * d + 2)
    for split in (1, 2, 3)
]


def _obeys(
    found: Assignment, layout: Policy, gpus: tuple[int, ...], engines: int, split: int
) -> None:
    assert len(found.ranks) == layout.ranks and len(found.engines) == engines
    used = [found.bundles.count(f"id{i}") for i in range(len(gpus))]
    assert all(n <= most for n, most in zip(used, gpus, strict=True))
    inner = layout.tensor_parallel * layout.context_parallel
    for first in range(0, layout.ranks, inner):
        group = {found.node(found.ranks[r]) for r in range(first, first + inner)}
        assert len(group) == 1
    for engine in found.engines:
        assert len(engine) == len(set(engine)) == split
        assert len({found.node(bundle) for bundle in engine}) == 1
    # No GPU is asked for more than the whole of itself, none has two engines, none is idle.
    taken = [bundle for engine in found.engines for bundle in engine]
    for bundle in range(len(found.bundles)):
        users = found.ranks.count(bundle) + taken.count(bundle)
        assert users * found.gpu_share(bundle) == pytest.approx(1.0)
        assert found.ranks.count(bundle) <= 1 and taken.count(bundle) <= 1
    # An engine without any rank beside it only where all the others have one.
    beside = [any(bundle in found.ranks for bundle in engine) for engine in found.engines]
    assert beside == sorted(beside, reverse=True)


def test_every_layout_obeys() -> None:
    """Assigned, or refused because greedy counting by hand finds too few GPUs."""
    refused = 0
    for layout, gpus, engines, split in LAYOUTS:
        inner = layout.tensor_parallel * layout.context_parallel
        room = sum(n // inner * inner for n in gpus)
        enough = room >= layout.ranks and sum(n // split for n in gpus) >= engines
        try:
            found = assign(nodes(*gpus), layout, engines, split)
        except ClusterError as error:
            assert not enough and "10.0.0.0" in str(error)
            refused += 1
        else:
            assert enough
            _obeys(found, layout, gpus, engines, split)
    assert 0 < refused < len(LAYOUTS) // 2


def test_engines_of_several_gpus_by_hand() -> None:
    """Ranks on the first three of four GPUs: one engine beside two of them, one beside the third
    and a GPU of its own; the third engine has the second node for itself."""
    found = assign(nodes(4, 2), policy(data=3), 3, tensor_parallel=2)
    assert found.bundles == ("id0", "id0", "id0", "id0", "id1", "id1")
    assert found.ranks == (0, 1, 2) and found.engines == ((0, 1), (2, 3), (4, 5))
    assert [found.gpu_share(b) for b in range(6)] == [0.5, 0.5, 0.5, 1.0, 1.0, 1.0]
    assert assign(nodes(0, 0), policy(), 2, tensor_parallel=2).engines == ((0,), (1,))
    with pytest.raises(ClusterError, match=r"rollout.tensor_parallel: the 4 .* largest has 2"):
        assign(nodes(2, 2), policy(), 1, tensor_parallel=4)
    with pytest.raises(ClusterError, match="2 engines of 2 on a node need 4 GPUs"):
        assign(nodes(3, 1), policy(), 2, tensor_parallel=2)


def test_a_group_larger_than_a_node_is_refused() -> None:
    with pytest.raises(ClusterError, match=r"policy.tensor_parallel: 4 ranks .* has 2 GPUs"):
        assign(nodes(2, 2), policy(tensor=4), 1)
    with pytest.raises(ClusterError, match="no node that answers"):
        assign([], policy(), 1)


def test_context_parallel_may_cross_nodes_where_it_must() -> None:
    found = assign(nodes(2, 2), policy(tensor=2, context=2), 1)
    assert found.bundles == ("id0", "id0", "id1", "id1")


def test_canary(tmp_path: Path) -> None:
    with canary(tmp_path / "new") as file:
        assert listed(file)
    assert not listed(file) and not listed(tmp_path / "absent" / "file")
