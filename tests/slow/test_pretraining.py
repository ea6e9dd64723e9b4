"""`prorl pretrain` as a user runs it: a stop in the middle, a model that transformers loads."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from prorl_nemo.model_source import check_model_folder

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


def prorl(folder: Path, name: str) -> list[str]:
    arguments = ["pretrain", str(folder / "recipe.yaml"), f"runs_dir={folder}", f"name={name}"]
    return [sys.executable, "-m", "prorl_nemo.cli", *arguments]


def rows(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def test_stopped_and_resumed_is_the_same_model(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    subprocess.run(prorl(tmp_path, "whole"), check=True, timeout=200, capture_output=True)

    process = subprocess.Popen(
        prorl(tmp_path, "parts"), start_new_session=True, stdout=subprocess.DEVNULL
    )
    metrics, deadline = parts / "metrics.jsonl", time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        if metrics.exists() and len(rows(parts, "train")) >= 3:
            os.kill(process.pid, signal.SIGTERM)
            break
        time.sleep(0.02)
    assert process.wait(100) == 0
    assert not (parts / "model").exists() and len(rows(parts, "train")) < 30
    subprocess.run(prorl(tmp_path, "parts"), check=True, timeout=200, capture_output=True)

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
