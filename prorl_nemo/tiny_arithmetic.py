"""A tiny model that answers sums of two digits, sometimes rightly: for smoke runs and kill tests.

A random model never gives an answer that can be graded, so nothing could be learnt from it. This
one is `tiny_model` after some seconds of supervised training on one-digit sums: it knows the
answer's form and guesses its value, so most groups of eight carry signal, and a step of RL takes
about a second on two cores.
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

from filelock import FileLock

from prorl_nemo.errors import ModelError
from prorl_nemo.tiny_model import tiny_model

NAME = "tiny-arithmetic"

_FORMAT = 1  # Raise when the model changes: it names the cached folder.
_STEPS = 240
_BATCH = 16
_LOCK_SECONDS = 300
# Questions of Reasoning Gym's `chain_sum` and `basic_arithmetic`, as a recipe's prompts show them.
_QUESTIONS = (
    "State the final answer to the following arithmetic problem: {} {} {} =",
    "Calculate {} {} {}.",
)
_FORM = "\nGive the final answer between <answer> and </answer>."


def tiny_arithmetic_folder() -> Path:
    """The model's folder in the user's cache; made on first use (about 10 s).

    Raises:
        ModelError: the cache cannot be written.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    cache = (Path(base) if Path(base).is_absolute() else Path.home() / ".cache") / "prorl_nemo"
    folder = cache / f"{NAME}-v{_FORMAT}"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock", timeout=_LOCK_SECONDS):
            if not folder.exists():
                aside = Path(tempfile.mkdtemp(prefix=f"{NAME}.", dir=cache))
                try:
                    write_tiny_arithmetic(aside)
                    aside.chmod(0o755)
                    aside.rename(folder)
                finally:
                    shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        raise ModelError(
            f"{folder}: cannot be written ({error}); set XDG_CACHE_HOME to a writable folder"
        ) from None
    return folder


def write_tiny_arithmetic(folder: Path, steps: int = _STEPS) -> None:
    """Build and train the model into an empty folder; the same on the same kind of machine."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tiny_model(
        "llama", folder, hidden_size=64, intermediate_size=128, layers=2, heads=2, kv_heads=1
    )
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    rng = random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    model.train()
    for _ in range(steps):
        examples = [_example(tokenizer, rng) for _ in range(_BATCH)]
        width = max(len(prompt) + len(answer) for prompt, answer in examples)
        ids = torch.full((_BATCH, width), tokenizer.pad_token_id)
        labels = torch.full((_BATCH, width), -100)
        for row, (prompt, answer) in enumerate(examples):
            end = len(prompt) + len(answer)
            ids[row, :end] = torch.tensor([*prompt, *answer])
            labels[row, len(prompt) : end] = torch.tensor(answer)
        # Padding is at the end, where a causal model does not see it.
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.save_pretrained(folder)


def _example(tokenizer: Any, rng: random.Random) -> tuple[list[int], list[int]]:
    """Token ids of a question and of its answer, end of turn included."""
    a, b, sign = rng.randint(0, 9), rng.randint(0, 9), rng.choice("+-")
    question = rng.choice(_QUESTIONS).format(a, sign, b) + _FORM
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )
    value = a + b if sign == "+" else a - b
    answer = f"<answer>{value}</answer>{tokenizer.eos_token}"
    return (
        tokenizer(prompt, add_special_tokens=False)["input_ids"],
        tokenizer(answer, add_special_tokens=False)["input_ids"],
    )
