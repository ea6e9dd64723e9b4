"""What `prorl check` compares, with stand-ins for ranks and engines (all of it: tests/slow)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rollouts import batch_of, recipe

from prorl_nemo.recipe import Recipe
from prorl_nemo.training import check

BATCH = batch_of(2)


def test_the_single_rank_has_a_gpu_alone_and_one_sequence_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A 1.5B model's optimizer and a response of 16K tokens take a whole GPU of 80 GB."""
    happened: list[Any] = []

    @contextmanager
    def session(*_: Any) -> Iterator[None]:
        yield
        happened.append("session ends")

    def lines(*_: Any) -> Any:
        yield from ()
        return BATCH, 2.0

    class OneRank:
        def logprobs(self, batch: Any) -> Any:
            return [np.full(len(r), -1.0) for r in batch.responses], []

        def gradient_norm(self, batch: Any, settings: Any) -> float:
            # The ratio of an update is 1 where its own log-probs are the old ones.
            assert all((old == -1.0).all() for old in batch.old_logprobs)
            return 2.01

    @contextmanager
    def policy(recipe: Recipe, folder: Path) -> Iterator[OneRank]:
        happened.append(recipe)
        yield OneRank()

    monkeypatch.setattr(check, "open_session", session)
    monkeypatch.setattr(check, "_session_lines", lines)
    monkeypatch.setattr(check, "_policy", policy)
    spread = recipe(
        policy={"tensor_parallel": 2, "sequence_parallel": True, "data_parallel": 4},
        rollout={"engines": 8, "weight_transfer": "broadcast", "prompts_per_step": 64},
    )
    (line,) = check._lines(spread, Path(), lambda what: None)
    assert happened[0] == "session ends" and len(happened) == 2
    alone = happened[1]
    assert (alone.policy.ranks, alone.policy.sequence_parallel) == (1, False)
    assert (alone.policy.shared_prompts, alone.policy.tokens_per_microbatch) == (False, 1)
    assert alone.policy.recompute == "full"
    # One GPU is asked for, whatever the run has.
    assert (alone.rollout.engines, alone.rollout.weight_transfer) == (1, "host")
    assert spread.policy.ranks == 8 and spread.rollout.engines == 8
    assert line.ok and line.figure == pytest.approx(0.01 / 2.01)


@pytest.mark.parametrize(
    ("policy", "kind"),
    [({"precision": "fp32"}, "fp32"), ({}, "bf16"), ({"fp8": "blockwise"}, "fp8")],
)
def test_limits_are_those_of_the_arithmetic(policy: dict[str, Any], kind: str) -> None:
    of = recipe(policy=policy)
    limits = check.MISMATCH_LIMIT
    assert limits["fp32"] < limits["bf16"] < limits["fp8"]
    old = [logprobs + 0.9 * np.float32(limits[kind]) for logprobs in BATCH.engine_logprobs]
    line = check._engine_line("now", of, replace(BATCH, old_logprobs=old))
    assert (line.ok, line.limit) == (True, limits[kind])


def test_delayed_scales_move_on_and_other_references_do_not() -> None:
    class Policy:
        """Whose weights stay, while its log-probs move by a twentieth."""

        def logprobs(self, batch: Any, which: str = "policy") -> Any:
            return [old + np.float32(0.05) for old in batch.old_logprobs], []

        def reset_reference(self) -> None: ...

    batch = replace(BATCH, old_logprobs=BATCH.engine_logprobs)
    for delayed in (True, False):
        first, *_ = check._reference_lines(Policy(), batch, delayed)  # type: ignore[arg-type]
        assert (first.name, first.ok) == ("reference unchanged by an update", delayed)
