"""A step's row in the diary, the samples kept to read, validation: by hand."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
from rollouts import STAGE, batch_of, group, recipe

from prorl_nemo.rollout.filling import RolloutBatch, TaskTally
from prorl_nemo.training.rollout_batch import advantages_of, training_batch
from prorl_nemo.training.step_metrics import sample_rows, time_figures, train_row
from prorl_nemo.training.validation import standard_error, validation_row


def test_row_of_a_step_by_hand() -> None:
    groups = [group(1, [1, 0], [2, 3]), group(2, [0.5, 1], [8, 1], cut=(0,), task="chain_sum")]
    tallies = {
        # coin_flip: the kept group, and one of four samples that were all wrong.
        "coin_flip": TaskTally("logic", kept=1, rejected=1, score_sum=1.0, samples=6),
        "chain_sum": TaskTally("math", kept=1, rejected=0, score_sum=1.5, samples=2),
        "aime": TaskTally("math", kept=0, rejected=0),
    }
    happened = RolloutBatch(
        groups, rejected=1, tallies=tallies, generated_tokens=40, wasted_tokens=6
    )
    happened.passed_over = 3
    outcome = advantages_of(groups, recipe(), STAGE, cosine=None)
    batch = training_batch(groups, outcome, STAGE.temperature)
    # d = old - engine is log 2 for one token of 14, 0 for the others.
    batch.old_logprobs = [p.copy() for p in batch.engine_logprobs]
    batch.old_logprobs[0][0] += math.log(2)
    sums = {"clipped_low_sum": 0.0, "clipped_high_sum": 1.0, "ratio_sum": 10.0}
    records: list[dict[str, float]] = [
        {
            "tokens": 10.0,
            "loss_sum": 2.0,
            "kl_sum": 0.4,
            "entropy_sum": 5.0,
            "grad_norm": 1.0,
            "skipped": 0.0,
        }
        | sums,
        {
            "tokens": 4.0,
            "loss_sum": 0.8,
            "kl_sum": 0.3,
            "entropy_sum": 2.0,
            "grad_norm": 3.0,
            "skipped": 0.0,
        }
        | sums,
        {
            "tokens": 99.0,
            "loss_sum": math.nan,
            "kl_sum": 9.0,
            "entropy_sum": 9.0,
            "grad_norm": math.nan,
            "skipped": 1.0,
        }
        | sums,
    ]
    row = train_row(recipe(), 5, STAGE, happened, outcome, batch, records)
    expected = {
        "kind": "train",
        "step": 5,
        "stage": 1,
        "stage_name": "short",
        "reward/raw_mean": 2.5 / 8,
        "reward/kept_mean": 2.5 / 4,
        "reward/shaped_mean": (1 + 0 + 0 + 1) / 4,  # The half right answer was cut off.
        "reward/raw/coin_flip": 1 / 6,
        "reward/raw/chain_sum": 0.75,
        "rollout/kept/coin_flip": 0.5,
        "rollout/kept/chain_sum": 1.0,
        "reward/raw/aime": 0.0,
        "rollout/kept/aime": 0.0,
        "reward/domain/logic": 1 / 6,
        "reward/domain/math": 0.75,
        "rollout/kept_domain/logic": 0.5,
        "rollout/kept_domain/math": 1.0,
        "rollout/kept_share": 2 / 3,
        "rollout/groups_kept": 2,
        "rollout/groups_rejected": 1,
        "rollout/response_tokens_mean": 14 / 4,
        "rollout/response_tokens_max": 8,
        "rollout/response_limit": 8,
        "rollout/truncated_share": 0.25,
        "rollout/repetition_share": 0.0,
        "rollout/generated_tokens": 40,
        "rollout/wasted_tokens": 6,
        "rollout/trained_tokens": 14,
        "rollout/stale_share": 0.0,
        "rollout/prompts_passed_over": 3,
        "shaping/dropped_groups": 0,
        # Means over the 14 tokens of the two updates that were made.
        "policy/skipped_updates": 1.0,
        "policy/loss": 2.8 / 14,
        "policy/kl": 0.7 / 14,
        "policy/entropy": 0.5,
        "policy/clip_share_low": 0.0,
        "policy/clip_share_high": 2 / 14,
        "policy/ratio_mean": 20 / 14,
        "policy/grad_norm": 2.0,
        "mismatch/mean_abs": math.log(2) / 14,
        "mismatch/p99": math.log(2),
        "mismatch/token_mult_prob_error": (2 + 13) / 14,
        "mismatch/gen_kl": (2 - 1 - math.log(2)) / 14,
        "mismatch/out_of_bounds_share": 0.0,
        "mismatch/mean_abs/0-127": math.log(2) / 14,
        # First quarter: the four tokens at position 0. Last: positions 4 to 7, counted as 1e-6.
        "mismatch/growth": 1e-6 / (math.log(2) / 4),
    }
    assert set(row) == set(expected)
    for key, value in expected.items():
        # Log-probabilities are float32: log 2 loses its eighth digit in -0.5 + log 2.
        assert row[key] == (pytest.approx(value, rel=1e-6) if isinstance(value, float) else value)


def test_samples_of_an_earlier_policy_are_counted_and_left_out_of_the_mismatch() -> None:
    groups = [group(1, [1, 0], [2, 3]), group(2, [0, 1], [8, 1])]
    groups[0].samples[1].weight_version = 6
    for sample in (*groups[1].samples, groups[0].samples[0]):
        sample.weight_version = 7
    outcome = advantages_of(groups, recipe(), STAGE, cosine=None)
    batch = training_batch(groups, outcome, STAGE.temperature, version=7)
    assert batch.stale == [False, True, False, False]
    batch.old_logprobs = [p.copy() for p in batch.engine_logprobs]
    # The policy has moved by more than the importance window at the old sample's three tokens.
    batch.old_logprobs[1] += 3.0
    batch.old_logprobs[0][0] += 0.5
    record = {"tokens": 14.0, "loss_sum": math.nan, "grad_norm": math.inf, "skipped": 1.0}
    row = train_row(recipe(), 5, STAGE, RolloutBatch(groups), outcome, batch, [record])
    assert row["rollout/stale_share"] == 0.25
    # float32 log-probabilities.
    assert row["mismatch/mean_abs"] == pytest.approx(0.5 / 11, rel=1e-6)
    assert row["mismatch/out_of_bounds_share"] == pytest.approx(3 / 14)
    batch.stale = [True] * 4
    row = train_row(recipe(), 5, STAGE, RolloutBatch(groups), outcome, batch, [record])
    assert [key for key in row if key.startswith("mismatch/")] == ["mismatch/out_of_bounds_share"]


def test_all_updates_skipped() -> None:
    groups = [group(1, [1, 0], [2, 3])]
    outcome = advantages_of(groups, recipe(), STAGE, cosine=None)
    batch = training_batch(groups, outcome, 1.0)
    batch.old_logprobs = batch.engine_logprobs
    record = {"tokens": 5.0, "loss_sum": math.nan, "grad_norm": math.inf, "skipped": 1.0}
    row = train_row(recipe(), 1, STAGE, RolloutBatch(groups), outcome, batch, [record])
    assert [key for key in row if key.startswith("policy/")] == ["policy/skipped_updates"]
    assert row["policy/skipped_updates"] == 1.0


def test_times_and_speeds_by_hand() -> None:
    batch = batch_of(3)  # 12 tokens
    times = {"generate": 4.0, "logprobs": 1.0, "reference": 1.0, "train": 2.0, "step": 9.0}
    row = time_figures(times, RolloutBatch([], generated_tokens=40), batch)
    assert row == {
        "time/generate": 4.0,
        "time/logprobs": 1.0,
        "time/reference": 1.0,
        "time/train": 2.0,
        "time/sync": 0.0,
        "time/checkpoint": 0.0,
        "time/step": 9.0,
        "throughput/generated_tokens_per_second": 10.0,
        "throughput/trained_tokens_per_second": 3.0,
    }
    nothing = time_figures({}, RolloutBatch([]), batch)
    assert not any(key.startswith("throughput/") for key in nothing)


def test_samples_kept_to_read_are_those_of_the_first_groups() -> None:
    groups = [group(i + 1, [1, 0], [2, 3]) for i in range(6)]
    outcome = advantages_of(groups, recipe(), STAGE, cosine=None)
    rows = list(sample_rows(9, RolloutBatch(groups), outcome))
    assert [row["prompt_id"] for row in rows[::2]] == [
        f"reasoning_gym/coin_flip/{i}" for i in (1, 2, 3, 4)
    ]
    assert rows[3] == {
        "step": 9,
        "prompt_id": "reasoning_gym/coin_flip/2",
        "domain": "logic",
        "task": "coin_flip",
        "messages": [{"role": "user", "content": "question 2"}],
        "response": "answer 1",
        "score": 0,
        "shaped": 0.0,
        "advantage": pytest.approx(float(outcome.advantages[3])),
        "tokens": 3,
        "finish_reason": "stop",
        "reason": "graded",
    }


# ---- validation


def test_validation_by_hand() -> None:
    groups = [
        group(1, [1, 0, 0, 0], [1, 2, 3, 4]),
        group(2, [1, 1, 0, 0], [5, 5, 5, 5], cut=(3,)),
        group(3, [0.75, 0.75, 0.75, 0.75], [2, 2, 2, 2], task="chain_sum"),
    ]
    row = validation_row(groups)
    # Prompt means 1/4, 1/2, 3/4: their deviation with N - 1 is 1/4.
    assert row == {
        "kind": "validation",
        "validation/mean": 0.5,
        "validation/stderr": pytest.approx(0.25 / math.sqrt(3), rel=1e-12),
        # A prompt passes with one full score; three quarters are none.
        "validation/pass": 2 / 3,
        "validation/samples": 12,
        "validation/truncated_share": 1 / 12,
        "validation/repetition_share": 0.0,
        "validation/response_tokens_mean": 38 / 12,
        "validation/domain/logic": 0.5,
        "validation/domain_stderr/logic": pytest.approx(0.25 / math.sqrt(3), rel=1e-12),
        "validation/coin_flip": 0.375,
        "validation/pass/coin_flip": 1.0,
        "validation/chain_sum": 0.75,
        "validation/pass/chain_sum": 0.0,
    }


def test_tasks_never_trained_have_figures_of_their_own() -> None:
    trained = [group(1, [1, 0], [1, 2]), group(2, [0, 0], [3, 3], cut=(1,))]
    never = [group(3, [1, 1], [9, 9], task="chain_sum"), group(4, [1, 0], [9, 9], task="chain_sum")]
    row = validation_row(trained + never, frozenset({"chain_sum"}))
    alone = validation_row(trained)
    # Whatever decides something is that of the trained tasks alone.
    assert {key: row[key] for key in alone} == alone
    assert {key: row[key] for key in set(row) - set(alone)} == {
        "validation/never_trained/mean": 0.75,
        "validation/never_trained/stderr": pytest.approx(0.25, rel=1e-12),
        "validation/never_trained/pass": 1.0,
        "validation/chain_sum": 0.75,
        "validation/pass/chain_sum": 1.0,
    }
    with pytest.raises(ValueError, match="no scores"):
        validation_row(never, frozenset({"chain_sum"}))


def test_standard_error_counts_prompts_not_samples() -> None:
    """Samples of a prompt all agree here: more of them are no more evidence."""
    few = [group(i, [float(i % 2)] * 2, [1, 1]) for i in range(10)]
    many = [group(i, [float(i % 2)] * 64, [1] * 64) for i in range(10)]
    assert validation_row(few)["validation/stderr"] == validation_row(many)["validation/stderr"]
    assert validation_row(few)["validation/stderr"] == pytest.approx(
        statistics.stdev([0, 1] * 5) / math.sqrt(10), rel=1e-12
    )


def test_standard_error_against_repeated_experiments() -> None:
    """The error of the mean of n prompts is the spread of that mean over many draws of n."""
    rng = np.random.default_rng(0)
    draws = rng.beta(0.5, 1.5, size=(20_000, 16))
    claimed = np.sqrt(np.mean([standard_error(d.tolist()) ** 2 for d in draws[:500]]))
    # 500 variances of 16 values each are known to about 3 % together, so their root to 1.5 %.
    assert claimed == pytest.approx(draws.mean(axis=1).std(), rel=0.06)
    assert standard_error([0.3]) == 0.0


def test_validation_of_nothing_is_no_score_of_zero() -> None:
    with pytest.raises(ValueError, match="no scores"):
        validation_row([])
