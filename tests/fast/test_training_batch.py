"""From graded groups to what the trainer computes on: by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from rollouts import STAGE, batch_of, group, recipe

from prorl_nemo.algorithms.reward_shaping import CosineLength
from prorl_nemo.megatron.packing_plan import TrainingItem, items_of_group
from prorl_nemo.rollout.filling import RolloutBatch
from prorl_nemo.training.rollout_batch import advantages_of, training_batch
from prorl_nemo.training.step_metrics import train_row

# ---- advantages of a rollout, and the batch made of it


def test_advantages_by_hand() -> None:
    """The vector of docs/algorithm.md, through records and recipe."""
    groups = [group(1, [1, 0, 0, 0], [2, 3, 4, 3]), group(2, [1, 1, 1, 0], [1, 2, 2, 5])]
    outcome = advantages_of(groups, recipe(), STAGE, cosine=None)
    expected = [2.0520, -0.2052, -0.2052, -0.2052, 0.9234, 0.9234, 0.9234, -1.3338]
    assert outcome.advantages.tolist() == pytest.approx(expected, abs=5e-5)  # As printed there.
    by_response = recipe(algorithm={"statistics": "sequence"})
    outcome = advantages_of(groups, by_response, STAGE, cosine=None)
    expected = [math.sqrt(3), *[-1 / math.sqrt(3)] * 3, *[1 / math.sqrt(3)] * 3, -math.sqrt(3)]
    assert outcome.advantages.tolist() == pytest.approx(expected, rel=1e-6)
    outcome = advantages_of(groups, recipe(algorithm={"advantage": "grpo"}), STAGE, None)
    # Group of one right in four: mean 1/4, deviation with N - 1 is 1/2.
    expected = [1.5, -0.5, -0.5, -0.5, 0.5, 0.5, 0.5, -1.5]
    assert outcome.advantages.tolist() == pytest.approx(expected, rel=1e-5)  # eps of 1e-6 over 1/2


def test_shaping_follows_the_recipe_and_the_stage() -> None:
    groups = [group(1, [1, 1, 0], [4, 8, 2], cut=(1,))]
    stage = replace(STAGE, truncated_factor=0.25)
    # Half of the stage's limit of 8: eta is 1/2. The truncated one keeps a quarter, without bonus.
    on = advantages_of(groups, recipe(), stage, CosineLength(0.1, 0.0, 1.0, True))
    assert on.shaped.tolist() == pytest.approx([1 + 0.1 * 0.5, 0.25, 0.0], rel=1e-12)
    off = advantages_of(groups, recipe(), stage, cosine=None)
    assert off.shaped.tolist() == [1.0, 0.25, 0.0]
    overlong = recipe(shaping={"cosine": None, "overlong": {"buffer_tokens": 4, "weight": 0.4}})
    # 8 of 8 tokens: all of the buffer of 4; 4 and 2 are before it.
    shaped = advantages_of(groups, overlong, STAGE, cosine=None).shaped
    assert shaped.tolist() == pytest.approx([1.0, -0.4, 0.0], rel=1e-12)


def test_a_group_that_shaping_flattened_is_left_out_and_the_rest_renumbered() -> None:
    groups = [
        group(1, [1, 0], [2, 1]),
        group(2, [1, 0], [8, 3], cut=(0,)),  # Its only right answer is cut off: all 0.
        group(3, [0.5, 1], [1, 2]),
    ]
    outcome = advantages_of(groups, recipe(), STAGE, cosine=None)
    assert outcome.kept.tolist() == [True, True, False, False, True, True]
    assert outcome.dropped_groups == 1
    batch = training_batch(groups, outcome, temperature=1.2)
    assert batch.prompts == [[1, 0], [3, 0]]
    assert batch.groups == [[0, 1], [2, 3]]
    assert [r.tolist() for r in batch.responses] == [[100, 101], [110], [300], [310, 311]]
    assert [r.dtype for r in batch.responses] == [np.int64] * 4
    assert [p.dtype for p in batch.engine_logprobs] == [np.float32] * 4
    assert [len(p) for p in batch.engine_logprobs] == [2, 1, 1, 2]
    kept = outcome.advantages[outcome.kept].tolist()
    assert batch.advantages == kept
    assert batch.response_tokens == 6
    assert batch.temperature == 1.2


def test_a_rollout_may_leave_nothing_to_train_on() -> None:
    groups = [group(1, [1, 0], [8, 3], cut=(0,))]
    outcome = advantages_of(groups, recipe(), STAGE, cosine=None)
    batch = training_batch(groups, outcome, 1.0)
    assert (batch.groups, batch.responses, batch.response_tokens) == ([], [], 0)
    row = train_row(recipe(), 4, STAGE, RolloutBatch(groups), outcome, batch, [])
    assert row["shaping/dropped_groups"] == 1
    assert row["rollout/trained_tokens"] == 0
    assert not any(key.startswith(("policy/", "mismatch/")) for key in row)


def test_ungraded_samples_are_a_bug() -> None:
    unfinished = group(1, [1, 0], [2, 2])
    unfinished.samples[1].score = None
    with pytest.raises(ValueError, match="no score yet"):
        advantages_of([unfinished], recipe(), STAGE, cosine=None)


# ---- items and minibatches


def test_items_of_a_group() -> None:
    shared = items_of_group([7, 8], [[1], [2, 3]], [4, 5], shared_prompt=True)
    assert shared == [TrainingItem([7, 8], [[1], [2, 3]], [4, 5])]
    assert shared[0].tokens == 5
    single = items_of_group([7, 8], [[1], [2, 3]], [4, 5], shared_prompt=False)
    assert single == [TrainingItem([7, 8], [[1]], [4]), TrainingItem([7, 8], [[2, 3]], [5])]
    assert sum(item.tokens for item in single) == 7


def test_items_of_a_minibatch_carry_the_numbers_of_their_samples() -> None:
    batch = batch_of(3)
    shared = batch.items(range(1, 3), shared_prompts=True)
    assert [list(item.sample_ids) for item in shared] == [[2, 3], [4, 5]]
    assert list(shared[0].prompt_ids) == [2, 0]
    assert [list(response) for response in shared[0].responses] == [[200, 201], [210, 211]]
    single = batch.items(range(1, 3), shared_prompts=False)
    assert [list(item.sample_ids) for item in single] == [[2], [3], [4], [5]]


@pytest.mark.parametrize(
    ("groups", "count", "sizes"),
    [
        (8, 4, [2, 2, 2, 2]),
        (8, 1, [8]),
        (8, 8, [1] * 8),
        # Shaping dropped some: fewer updates rather than empty ones.
        (7, 4, [2, 2, 2, 1]),
        (5, 4, [2, 2, 1]),
        (1, 4, [1]),
    ],
)
def test_minibatches(groups: int, count: int, sizes: list[int]) -> None:
    parts = batch_of(groups).minibatches(count)
    assert [len(part) for part in parts] == sizes
    assert [g for part in parts for g in part] == list(range(groups))
