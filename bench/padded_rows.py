"""Packed rows against padded ones: training tokens per second on the same sequences.

Lengths are log-normal with a mean of a third of the limit, cut at the limit: responses of a
reasoning run. Padded means that every response is as long as the longest of the batch and all of
it is computed, output head included, as trainers without packing do. A second padded baseline
leaves the head out where there is padding, as no trainer that we know does. All go through the
same trainer with the same token budget; what differs is the padding alone.
"""

from __future__ import annotations

import math
import multiprocessing
import random
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prorl_nemo.recipe import Recipe
from prorl_nemo.training.batch import StepSettings, TrainingBatch

LIMIT, PROMPT, SEQUENCES, SPREAD = 512, 32, 24, 0.8
PACKED, PADDED, WITHOUT_HEAD = "packed", "padded", "padded, head on real tokens only"


def measure(recipe: Recipe, model: Path) -> dict[str, Any]:
    """Figures of all three, each in a process of its own."""
    names = (PACKED, PADDED, WITHOUT_HEAD)
    seconds = {name: _in_own_process(name, recipe, model) for name in names}
    lengths = response_lengths()
    tokens = sum(lengths) + PROMPT * SEQUENCES
    return {
        "sequences": SEQUENCES,
        "limit_tokens": LIMIT,
        "mean_response_tokens": sum(lengths) / SEQUENCES,
        "tokens": tokens,
        "padded_tokens": (max(lengths) + PROMPT) * SEQUENCES,
        "seconds": seconds,
        "tokens_per_second": {name: tokens / taken for name, taken in seconds.items()},
        "speedup": {name: seconds[name] / seconds[PACKED] for name in names[1:]},
    }


def response_lengths(seed: int = 0) -> list[int]:
    draw = random.Random(seed)
    location = math.log(LIMIT / 3) - SPREAD**2 / 2
    drawn = (round(draw.lognormvariate(location, SPREAD)) for _ in range(SEQUENCES))
    return [min(LIMIT, max(1, length)) for length in drawn]


def _in_own_process(name: str, recipe: Recipe, model: Path) -> float:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_measure, args=(theirs, name, recipe, model))
    process.start()
    theirs.close()
    try:
        return float(ours.recv())
    except EOFError:
        raise RuntimeError(f"{name} rows ended without a result (memory?)") from None
    finally:
        process.join()


def _measure(connection: Any, name: str, recipe: Recipe, model: Path) -> None:
    from prorl_nemo.megatron.policy_worker import PolicyWorker

    class WithoutHead(PolicyWorker):
        def _rows(self, batch: TrainingBatch, groups: range) -> list[Any]:
            return _rows_without_head(batch, groups, recipe.policy.tokens_per_microbatch)

    kind = WithoutHead if name == WITHOUT_HEAD else PolicyWorker
    lengths = response_lengths()
    if name == PADDED:
        lengths = [max(lengths)] * SEQUENCES
    with tempfile.TemporaryDirectory() as folder:
        worker = kind(recipe, model, 0, 1, f"file://{folder}/rendezvous")
        batch = _batch(lengths)
        settings = StepSettings(0.0, 0.2, 0.28, minibatches=1)
        shortest = int(np.argmin(lengths))
        # Kernels are chosen and threads started.
        worker.gradient(batch, range(shortest, shortest + 1), settings)
        started = time.perf_counter()
        worker.gradient(batch, range(SEQUENCES), settings)
        connection.send(time.perf_counter() - started)


def _batch(lengths: list[int]) -> TrainingBatch:
    """Random tokens: what they are does not matter to the time."""
    draw = np.random.default_rng(0)
    responses = [draw.integers(0, 10_000, n) for n in lengths]
    figures = [np.full(len(r), -1.0, dtype=np.float32) for r in responses]
    return TrainingBatch(
        prompts=[draw.integers(0, 10_000, PROMPT).tolist() for _ in responses],
        groups=[[i] for i in range(SEQUENCES)],
        responses=responses,
        engine_logprobs=figures,
        advantages=[1.0] * SEQUENCES,
        temperature=1.0,
        old_logprobs=figures,
        reference_logprobs=figures,
    )


def _rows_without_head(batch: TrainingBatch, groups: range, budget: int) -> list[Any]:
    """Rows of sequences of one length, in the batch's order, whose padding is no target."""
    from prorl_nemo.megatron.packing import build_row

    items = batch.items(groups, shared_prompts=False)
    longest = max(item.tokens for item in items)
    per_row = max(1, budget // longest)
    rows = []
    for start in range(0, len(items), per_row):
        part = items[start : start + per_row]
        lengths = tuple(len(item.responses[0]) for item in part)
        whole = [len(item.responses[0]) + longest - item.tokens for item in part]
        padded = [
            replace(item, responses=[np.pad(item.responses[0], (0, n - len(item.responses[0])))])
            for item, n in zip(part, whole, strict=True)
        ]
        row = build_row(padded, batch.temperature)
        real = torch.cat([torch.arange(n) < k for n, k in zip(whole, lengths, strict=True)])
        rows.append(
            replace(
                row,
                hidden_index=row.hidden_index[real],
                targets=row.targets[real],
                target_index=torch.arange(sum(lengths)),
                sample_lengths=lengths,
            )
        )
    return rows
