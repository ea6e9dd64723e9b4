"""A packed row by hand, its parts under context parallelism, and the loss summed over them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from prorl_nemo.megatron.cpu import enable_cpu

enable_cpu()

from prorl_nemo.megatron.flex_row import _sees  # noqa: E402
from prorl_nemo.megatron.packing import PackedRow, Tree, build_row, context_share  # noqa: E402
from prorl_nemo.megatron.packing_plan import TrainingItem  # noqa: E402
from prorl_nemo.megatron.row_loss import row_loss  # noqa: E402
from prorl_nemo.recipe import Algorithm  # noqa: E402
from prorl_nemo.training.batch import StepSettings, TrainingBatch  # noqa: E402

# Two sequences, so that they can be shared by context-parallel ranks: 1 2 3 4 5 | 6 7 8.
BATCH = TrainingBatch(
    prompts=[[1, 2], [6]],
    groups=[[0], [1]],
    responses=[np.array([3, 4, 5]), np.array([7, 8])],
    # exp(old - engine) is 1.1, 0.4 (outside of IcePop's bounds), 6 (outside), 0.6 and 1.
    engine_logprobs=[
        np.log(np.array([0.5 / 1.1, 0.2 / 0.4, 0.3 / 6], dtype=np.float32)),
        np.log(np.array([0.4 / 0.6, 0.7], dtype=np.float32)),
    ],
    advantages=[1.5, -0.5],
    temperature=1.0,
    old_logprobs=[
        np.log(np.array([0.5, 0.2, 0.3], dtype=np.float32)),
        np.log(np.array([0.4, 0.7], dtype=np.float32)),
    ],
    reference_logprobs=[
        np.log(np.array([0.3, 0.3, 0.3], dtype=np.float32)),
        np.log(np.array([0.5, 0.9], dtype=np.float32)),
    ],
)
# New over old: 1.4 (cut at 1.28), 1, 0.5; 0.5 (cut at 0.8), 1.2.
NOW = torch.tensor([0.7, 0.2, 0.15, 0.2, 0.84]).log()
ENTROPY = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
SETTINGS = StepSettings(1e-6, clip_low=0.2, clip_high=0.28, minibatches=1)
BETA = 0.1


def algorithm(**importance: Any) -> Algorithm:
    return Algorithm.model_validate({"kl": {"coefficient": BETA}, "importance": importance})


def test_a_row_by_hand() -> None:
    """A shared prompt with two responses, a plain sequence, and a token of padding."""
    items = [
        TrainingItem([5, 6], [[7, 8], [9]], [2, 0]),
        TrainingItem([3], [[4]], [1]),
    ]
    row = build_row(items, temperature=1.2, multiple_of=4)
    assert row.input_ids.tolist() == [[5, 6, 7, 8, 9, 3, 4, 0]]
    # Each response goes on where the prompt ends.
    assert row.position_ids.tolist() == [0, 1, 2, 3, 2, 0, 1, 0]
    assert row.targets.tolist() == [7, 8, 9, 4]
    # The prompt's last token predicts the first token of both responses.
    assert row.hidden_index.tolist() == [1, 2, 1, 5]
    assert row.target_index.tolist() == [0, 1, 2, 3]
    assert row.trees == (Tree(0, 2, (2, 1)), Tree(5, 1, (1,)), Tree(7, 1, ()))
    assert (row.sample_ids, row.sample_lengths) == ((2, 0, 1), (2, 1, 1))
    assert (row.tokens, row.pieces, row.temperature) == (8, ((0, 8),), 1.2)


def test_who_sees_whom_by_hand() -> None:
    """The row above for FlexAttention: prompt 0 1 with responses 2 3 and 4; 5 with 6; padding 7."""
    row = build_row([TrainingItem([5, 6], [[7, 8], [9]], [2, 0]), TrainingItem([3], [[4]], [1])],
                    multiple_of=4)  # fmt: skip
    i, j = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    seen = _sees(row, torch.device("cpu"))(None, None, i, j)
    assert [torch.nonzero(line).flatten().tolist() for line in seen] == [
        [0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 4], [5], [5, 6], [7],
    ]  # fmt: skip


def test_a_row_of_nothing_is_padding() -> None:
    row = build_row([], multiple_of=4)
    assert (row.tokens, row.sample_ids, row.targets.tolist()) == (4, (), [])


def test_a_token_is_needed_everywhere() -> None:
    for prompt, response in (([], [1]), ([1], [])):
        with pytest.raises(ValueError, match="at least one token"):
            build_row([TrainingItem(prompt, [response], [0])])


def test_shares_of_a_row_by_hand() -> None:
    """Two ranks, pieces of two tokens: the ends for one, the middle for the other."""
    row = build_row(BATCH.items(range(2), shared_prompts=False))
    assert row.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]]
    ends, middle = (context_share(row, rank, 2) for rank in range(2))
    assert ends.pieces == ((0, 2), (6, 8)) and middle.pieces == ((2, 4), (4, 6))
    assert ends.input_ids.tolist() == [[1, 2, 7, 8]]
    assert ends.position_ids.tolist() == [0, 1, 1, 2]
    assert middle.input_ids.tolist() == [[3, 4, 5, 6]]
    # A target belongs to the rank that holds the token before it.
    assert (ends.targets.tolist(), ends.target_index.tolist()) == ([3, 8], [0, 4])
    assert (middle.targets.tolist(), middle.target_index.tolist()) == ([4, 5, 7], [1, 2, 3])
    assert ends.hidden_index.tolist() == [1, 2]
    assert middle.hidden_index.tolist() == [0, 1, 3]
    assert context_share(row, 0, 1) is row


def test_rows_that_cannot_be_shared() -> None:
    with pytest.raises(ValueError, match="plain sequences, padded to 2 x ranks"):
        context_share(build_row([TrainingItem([1], [[2], [3]], [0, 1])], multiple_of=4), 0, 2)
    with pytest.raises(ValueError, match="plain sequences, padded to 2 x ranks"):
        context_share(build_row([TrainingItem([1], [[2]], [0])]), 0, 2)


def loss_of(row: PackedRow, rule: Algorithm) -> tuple[float, int, dict[str, float]]:
    held = row.target_index
    output = torch.stack((NOW[held], ENTROPY[held])).requires_grad_()
    loss, tokens, figures = row_loss(rule, BATCH, SETTINGS, row, output)
    loss.backward()
    assert output.grad is not None and not output.grad[1].any()  # none through the entropy
    return loss.item(), int(tokens), {name: float(value) for name, value in figures.items()}


def token_loss(now: float, old: float, reference: float, advantage: float, weight: float) -> float:
    ratio = now / old
    clipped = min(max(ratio, 0.8), 1.28)
    policy = max(-advantage * ratio, -advantage * clipped)
    return weight * policy + BETA * math.log(now / reference) ** 2 / 2


# The weight of each token: IcePop's, and seq-mask-tis', for which the geometric means of the
# responses are (1.1 x 0.4 x 6) ** (1 / 3) = 1.38 and 0.6 ** (1 / 2) = 0.77.
ICEPOP = (algorithm(method="icepop"), (1.1, 0.0, 0.0, 0.6, 1.0))
MASKED = (algorithm(method="seq-mask-tis", low=1.0, high=2.0), (1.1, 0.4, 6.0, 0.0, 0.0))


@pytest.mark.parametrize(("rule", "weights"), [ICEPOP, MASKED], ids=["icepop", "seq-mask-tis"])
def test_loss_by_hand_and_over_two_ranks(rule: Algorithm, weights: tuple[float, ...]) -> None:
    old, reference = (0.5, 0.2, 0.3, 0.4, 0.7), (0.3, 0.3, 0.3, 0.5, 0.9)
    now, advantages = NOW.exp().tolist(), (1.5, 1.5, 1.5, -0.5, -0.5)
    expected = sum(map(token_loss, now, old, reference, advantages, weights))
    row = build_row(BATCH.items(range(2), shared_prompts=False))
    loss, tokens, figures = loss_of(row, rule)
    # fp32 logarithms and their differences.
    assert loss == pytest.approx(expected, rel=1e-5)
    assert tokens == 5
    divergence = sum(math.log(n / r) ** 2 / 2 for n, r in zip(now, reference, strict=True))
    assert figures == pytest.approx(
        {
            "tokens": 5,
            "loss_sum": expected,
            "kl_sum": divergence,
            "entropy_sum": 15.0,
            "clipped_low_sum": 1,
            "clipped_high_sum": 1,
            "ratio_sum": 1.4 + 1.0 + 0.5 + 0.5 + 1.2,
        },
        rel=1e-5,
    )
    # A response that two ranks hold is masked by all of its tokens, not by those of one rank.
    shares = [loss_of(context_share(row, rank, 2), rule) for rank in range(2)]
    assert sum(share[0] for share in shares) == pytest.approx(expected, rel=1e-5)
    assert [share[1] for share in shares] == [2, 3]
