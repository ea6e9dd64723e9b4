"""Pretraining with real ranks: a stop in the middle, a model that transformers loads."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from prorl_nemo.model_source import check_model_folder
from prorl_nemo.pretraining.run import pretrain
from prorl_nemo.recipe_pretrain import load_pretraining

RECIPE = """
name: tiny
shape: {hidden_size: 32, intermediate_size: 64, layers: 2, heads: 2, kv_heads: 1, vocab_size: 320}
policy: {precision: fp32, optimizer: {learning_rate: 1.0e-2, warmup_steps: 2}}
tasks: [{task: chain_sum, problems: 200, config: {max_terms: 2, max_digits: 1}}]
steps: 30
problems_per_step: 16
exam: {interval: 15, problems_per_task: 16}
checkpoint: {interval: 100}
"""


def rows(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def stop_after(steps: int, metrics: Path) -> None:
    """SIGTERM to this process, as Slurm sends it, once so many steps are done."""
    while not metrics.exists() or len(metrics.read_text().splitlines()) < steps:
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGTERM)


def test_stopped_and_resumed_is_the_same_model(tmp_path: Path, one_ray: None) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    settings = {
        name: load_pretraining(tmp_path / "recipe.yaml", [f"runs_dir={tmp_path}", f"name={name}"])
        for name in ("whole", "parts")
    }
    console = Console()
    assert pretrain(settings["whole"], console) == whole / "model"

    stopper = threading.Thread(target=stop_after, args=(3, parts / "metrics.jsonl"))
    stopper.start()
    assert pretrain(settings["parts"], console) is None
    stopper.join()
    assert not (parts / "model").exists() and 3 <= len(rows(parts, "train")) < 30
    assert pretrain(settings["parts"], console) == parts / "model"

    losses = [[row["policy/loss"] for row in rows(f, "train")] for f in (whole, parts)]
    # fp32 on the same cores: what is saved is all there is, so not a bit differs.
    assert losses[0] == losses[1] and len(losses[0]) == 30
    # It starts from ignorance, ln(vocabulary), and learns the answers' form in 30 steps.
    assert losses[0][0] == pytest.approx(5.7, abs=0.3) and losses[0][-1] < 2.5
    assert [row["step"] for row in rows(whole, "validation")] == [15, 30]

    models = [folder / "model" for folder in (whole, parts)]
    for model in models:
        check_model_folder(model)
    weights = [(model / "model.safetensors").read_bytes() for model in models]
    assert weights[0] == weights[1]

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(models[0])
    tokenizer: Any = AutoTokenizer.from_pretrained(models[0])
    # An independent cross-entropy of held-out problems: as the exam says, by problem.
    problems = (whole / "problems.jsonl").read_text().splitlines()[1:]
    chances = []
    for problem in map(json.loads, problems):
        if problem["split"] != "held_out":
            continue
        question = problem["question"] + "\nGive the final answer between <answer> and </answer>."
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        start = len(tokenizer(prompt)["input_ids"])
        ids = torch.tensor(tokenizer(prompt + problem["response"] + "<|im_end|>")["input_ids"])
        with torch.no_grad():
            logprobs = model(ids[None]).logits[0].log_softmax(-1)
        chances.append(float(logprobs[range(start - 1, len(ids) - 1), ids[start:]].sum().exp()))
    mean = rows(whole, "validation")[-1]["validation/mean"]
    # Two implementations in fp32.
    assert mean == pytest.approx(sum(chances) / len(chances), rel=1e-3)
