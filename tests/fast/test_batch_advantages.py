"""The order from raw scores to advantages, each test failing if two steps were swapped."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch

from prorl_nemo.algorithms.advantages import grpo, reinforce_plus_plus_baseline
from prorl_nemo.algorithms.batch_advantages import AdvantageMethod, batch_advantages
from prorl_nemo.algorithms.reward_shaping import CosineLength
from prorl_nemo.recipe import Algorithm

SCORES = torch.tensor([1.0, 0, 1, 0, 1, 0, 0, 0], dtype=torch.float64)
GROUPS = torch.tensor([5, 5, 5, 5, 2, 2, 2, 2])
LENGTHS = torch.tensor([2, 4, 1, 3, 8, 3, 3, 3])
FINISHED = torch.zeros(8).bool()
FIRST_OF_SECOND_CUT = torch.tensor([0, 0, 0, 0, 1, 0, 0, 0]).bool()


def test_nothing_to_shape_is_the_plain_advantage() -> None:
    cases: list[tuple[AdvantageMethod, torch.Tensor]] = [
        ("reinforce_plus_plus_baseline", reinforce_plus_plus_baseline(SCORES, GROUPS, LENGTHS)),
        ("grpo", grpo(SCORES, GROUPS)),
    ]
    for method, expected in cases:
        found = batch_advantages(SCORES, GROUPS, LENGTHS, FINISHED, 8, method=method)
        assert torch.equal(found.advantages, expected)
        assert found.kept.all()
        assert found.dropped_groups == 0


def test_group_emptied_by_shaping_is_dropped_before_the_statistics() -> None:
    """The only right answer of group 2 is truncated, so all its rewards are 0.

    Had it stayed, its tokens would have pulled the batch mean, and it would have got -mean/std.
    """
    found = batch_advantages(SCORES, GROUPS, LENGTHS, FIRST_OF_SECOND_CUT, 8)
    assert found.shaped.tolist() == [1, 0, 1, 0, 0, 0, 0, 0]
    assert found.kept.tolist() == [True] * 4 + [False] * 4
    assert found.dropped_groups == 1
    # By hand: centred +-1/2 with 3 and 7 tokens; mean -1/5, variance 21/100.
    high, low = 0.7 / math.sqrt(0.21), -0.3 / math.sqrt(0.21)
    # float32 output.
    assert found.advantages[:4].tolist() == pytest.approx([high, low, high, low], rel=1e-6)
    assert found.advantages[4:].tolist() == [0.0] * 4


def test_raw_filter_comes_first() -> None:
    """All answers right, lengths different: a cosine reward would make signal out of length."""
    scores = SCORES.clone()
    scores[4:] = 1.0
    with pytest.raises(ValueError, match=r"groups \[2\]"):
        batch_advantages(scores, GROUPS, LENGTHS, FINISHED, 8, cosine=CosineLength(0.1))


def test_advantages_see_the_shaped_rewards() -> None:
    found = batch_advantages(SCORES, GROUPS, LENGTHS, FINISHED, 8, cosine=CosineLength(0.1))
    # Both right answers of group 5; the shorter one now earns more.
    assert found.advantages[2] > found.advantages[0] > 0
    eta = 0.5 * (1 + math.cos(math.pi * 2 / 8))
    assert found.shaped[0].item() == pytest.approx(1 + 0.1 * eta, abs=1e-15)
    expected = reinforce_plus_plus_baseline(found.shaped, GROUPS, LENGTHS)
    assert torch.equal(found.advantages, expected)


def test_nothing_left() -> None:
    found = batch_advantages(SCORES[4:], GROUPS[4:], LENGTHS[4:], FIRST_OF_SECOND_CUT[4:], 8)
    assert not found.kept.any()
    assert not found.advantages.any()
    assert found.dropped_groups == 1


def test_unknown_method() -> None:
    with pytest.raises(ValueError, match="method"):
        batch_advantages(SCORES, GROUPS, LENGTHS, FINISHED, 8, method="ppo")  # type: ignore[arg-type]


def test_the_recipe_offers_every_method() -> None:
    offered = Algorithm.model_fields["advantage"].annotation
    assert get_args(offered) == get_args(AdvantageMethod)
