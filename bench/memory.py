"""The planner's memory model against a real trainer rank: peak resident memory of its process.

Each configuration trains once, in a process of its own, on a batch that fills one row with the
longest responses, which is what the planner counts. Compared is what the process gains over
having its libraries loaded: the standing part after the rank is built, and the peak of an update.
On CPU the reference lies in the same memory; it is added. The goal: peaks within 15 %.
"""

from __future__ import annotations

import json
import multiprocessing
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from prorl_nemo.megatron.layout import read_model_spec
from prorl_nemo.planning.activations import Row
from prorl_nemo.planning.memory import trainer_memory
from prorl_nemo.recipe import Recipe, parse_recipe
from prorl_nemo.training.batch import StepSettings, TrainingBatch

GOAL = 0.15
MIB = 1 << 20
# Family, layers, hidden, feed-forward, heads, key/value heads, head width, vocabulary, tied.
Shape = tuple[str, int, int, int, int, int, int, int, bool]
SMOLLM2_135M: Shape = ("llama", 30, 576, 1536, 9, 3, 64, 49_152, True)
QWEN2_WIDE_HEAD: Shape = ("qwen2", 6, 512, 2048, 8, 2, 64, 100_000, False)
QWEN3_SMALL: Shape = ("qwen3", 12, 512, 1536, 8, 4, 64, 32_000, True)


@dataclass(frozen=True)
class Case:
    """A configuration; prompt, response and tokens of the row in tokens."""

    name: str
    shape: Shape
    precision: str
    recompute: str
    tokens: int
    prompt: int
    response: int
    shared: bool = True
    moments: str = "fp32"

    def recipe(self, model: Path) -> Recipe:
        return parse_recipe(
            {
                "name": "memory",
                "model": str(model),
                "policy": {
                    "precision": self.precision,
                    "recompute": self.recompute,
                    "tokens_per_microbatch": self.tokens,
                    "shared_prompts": self.shared,
                    "optimizer": {"moments": self.moments},
                },
                "rollout": {"prompts_per_step": 1},
                "algorithm": {"minibatches": 1},
                "data": {"sources": [{"task": "none"}]},
                "stages": [{"steps": 1}],
            }
        )


CASES = (
    Case("135M, bf16", SMOLLM2_135M, "bf16", "none", 1024, 256, 256),
    Case("135M, bf16", SMOLLM2_135M, "bf16", "selective", 1024, 256, 256),
    Case("135M, bf16", SMOLLM2_135M, "bf16", "full", 2048, 256, 896),
    Case("135M, fp32", SMOLLM2_135M, "fp32", "none", 512, 128, 192),
    Case("135M, bf16 moments", SMOLLM2_135M, "bf16", "none", 1024, 256, 256, moments="bf16"),
    Case("qwen3 60M, bf16", QWEN3_SMALL, "bf16", "none", 2048, 24, 1000, shared=False),
    Case("qwen3 60M, long", QWEN3_SMALL, "bf16", "full", 4096, 96, 4000),
    Case("qwen2 130M, wide head", QWEN2_WIDE_HEAD, "bf16", "none", 2048, 48, 1000),
)


def main(json_path: Path | None) -> None:
    """Run the bench, print its table and write the figures to `json_path` as they come."""
    table = Table(title="one trainer rank on CPU, MiB beyond its libraries")
    for name in ("model", "recompute", "row", "standing", "predicted", "peak", "predicted", "off"):
        table.add_column(name, justify="left" if name in ("model", "recompute") else "right")
    rows = []
    for case in CASES:
        row = _in_own_process(case)
        rows.append(row)
        if json_path:
            json_path.parent.mkdir(parents=True, exist_ok=True)
            json_path.write_text(json.dumps({"goal": GOAL, "rows": rows}, indent=1) + "\n")
        table.add_row(
            case.name,
            case.recompute,
            f"{case.tokens:,}",
            *(f"{row[k]:,.0f}" for k in ("standing", "predicted_standing", "peak")),
            f"{row['predicted_peak']:,.0f}",
            f"{row['predicted_peak'] / row['peak'] - 1:+.1%}",
        )
    Console(width=110).print(table)


def _in_own_process(case: Case) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_measure, args=(case, theirs))
    process.start()
    theirs.close()
    row: dict[str, Any] = ours.recv()
    process.join()
    return row


def _measure(case: Case, connection: Any) -> None:
    from prorl_nemo.megatron.policy_worker import PolicyWorker

    with tempfile.TemporaryDirectory() as folder:
        model = _random_model(case.shape, case.precision, Path(folder) / "model")
        recipe = case.recipe(model)
        batch = _full_row(case)
        before = psutil.Process().memory_info().rss
        worker = PolicyWorker(recipe, model, 0, 1, f"file://{folder}/rendezvous")
        standing = psutil.Process().memory_info().rss - before
        settings = StepSettings(1e-6, 0.2, 0.28, minibatches=1)
        _forget_peak()
        worker.train(batch, settings)
        peak = _peak() - before
        spec = read_model_spec(model)
        row = Row.largest(recipe.policy, case.prompt, case.response)
        memory = trainer_memory(spec, recipe.policy, row)
        connection.send(
            {
                "case": asdict(case),
                "parameters": spec.parameters,
                "standing": standing / MIB,
                "peak": peak / MIB,
                # On CPU the reference, which a GPU leaves to the host, is in the same memory.
                "predicted_standing": (memory.standing + memory.host) / MIB,
                "predicted_peak": (memory.peak + memory.host) / MIB,
            }
        )


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    """Most resident bytes since `_forget_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    raise OSError("/proc/self/status tells no peak")


def _full_row(case: Case) -> TrainingBatch:
    """One group, or single sequences, that fill a row with responses of the greatest length."""
    draw = np.random.default_rng(0)
    each = case.response + (0 if case.shared else case.prompt)
    count = (case.tokens - (case.prompt if case.shared else 0)) // each
    figures = [np.full(case.response, -1.0, dtype=np.float32)] * count
    vocab = case.shape[7]
    return TrainingBatch(
        prompts=[draw.integers(3, vocab, case.prompt).tolist()],
        groups=[list(range(count))],
        responses=[draw.integers(3, vocab, case.response) for _ in range(count)],
        engine_logprobs=figures,
        advantages=[1.0 if i % 2 else -0.5 for i in range(count)],
        temperature=1.0,
        old_logprobs=figures,
        reference_logprobs=figures,
    )


def _random_model(shape: Shape, precision: str, folder: Path) -> Path:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    family, layers, hidden, ffn, heads, groups, width, vocab, tied = shape
    config = AutoConfig.for_model(
        family,
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=width,
        vocab_size=vocab,
        tie_word_embeddings=tied,
        max_position_embeddings=16_384,
    )
    model = AutoModelForCausalLM.from_config(config)
    model.to(torch.bfloat16 if precision == "bf16" else torch.float32).save_pretrained(folder)
    return folder
