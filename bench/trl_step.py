"""Run by `bench peers` in TRL's own environment: steps of `GRPOTrainer` on prompts from a file.

    python trl_step.py WORK.json RESULT.json

Imports nothing of this project. One step is one generation and its optimizer updates, with the
settings of the recipe that mean something to TRL. No vLLM: TRL serves it from a GPU only.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer


class Clock(TrainerCallback):  # type: ignore[misc]
    """Seconds of each rollout step: a generation and `updates` optimizer steps."""

    def __init__(self, updates: int) -> None:
        self.updates = updates
        self.seconds: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self.updates == 0:
            self.started = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self.updates == 0:
            self.seconds.append(time.monotonic() - self.started)
            print(f"TRL: step of {self.seconds[-1]:.0f} s", flush=True)


def main(work_file: Path, result_file: Path) -> None:
    work = json.loads(work_file.read_text())
    torch.set_num_threads(work["threads"])
    prompts, samples, updates = work["prompts"], work["samples"], work["updates"]
    tokenizer = AutoTokenizer.from_pretrained(work["model"])
    lengths = [
        len(tokenizer.apply_chat_template(p, add_generation_prompt=True)["input_ids"])
        for p in prompts
    ]
    rewarded: list[int] = []

    def reward(completions: list[Any], **_: Any) -> list[float]:
        """Alternating, so that every sample has an advantage; grading is not what is timed."""
        rewarded.extend(
            len(tokenizer(c[0]["content"], add_special_tokens=False).input_ids) for c in completions
        )
        return [float(i % 2) for i in range(len(completions))]

    clock = Clock(updates)
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=True,
            per_device_train_batch_size=len(prompts) * samples // updates,
            steps_per_generation=updates,
            gradient_accumulation_steps=1,
            num_generations=samples,
            max_completion_length=work["max_tokens"],
            temperature=work["temperature"],
            top_p=1.0,
            top_k=0,
            beta=work["beta"],
            learning_rate=work["learning_rate"],
            lr_scheduler_type="constant",
            max_steps=updates * (1 + work["steps"]),
            gradient_checkpointing=False,
            shuffle_dataset=False,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(work["model"], dtype=torch.bfloat16),
            reward_funcs=reward,
            args=config,
            train_dataset=Dataset.from_list([{"prompt": p} for p in prompts]),
            processing_class=tokenizer,
            callbacks=[clock],
        ).train()
    per_step = len(prompts) * samples
    result = {
        "version": trl.__version__,
        "seconds": clock.seconds[1:],
        # Without the end-of-turn token, which the text does not show.
        "response_tokens": [
            sum(rewarded[i : i + per_step]) for i in range(per_step, len(rewarded), per_step)
        ],
        "prompt_tokens": lengths,
    }
    result_file.write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
