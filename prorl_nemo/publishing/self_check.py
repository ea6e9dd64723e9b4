"""Is an exported folder the model that was trained? Asked of everybody who will load it.

Weights are compared with the checkpoint bit by bit. Then transformers writes greedily in fp32, and
vLLM and the trainer, with the same weights, must write the same tokens. The trainer computes
log-probs and no text: at a temperature near zero a token with more than half of the probability is
the one it would choose.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from safetensors import safe_open

from prorl_nemo.cluster.policy_group import PolicyGroup
from prorl_nemo.data.chat import ChatRenderer, load_tokenizer
from prorl_nemo.megatron.layout import read_model_spec
from prorl_nemo.megatron.stored_weights import stored_weights
from prorl_nemo.model_source import resolve_model
from prorl_nemo.publishing.folder import about
from prorl_nemo.recipe import Recipe, load_recipe
from prorl_nemo.rollout.engine_settings import EngineSettings
from prorl_nemo.rollout.fleet import Fleet
from prorl_nemo.rollout.protocol import GenerationRequest
from prorl_nemo.training.batch import TrainingBatch
from prorl_nemo.training.session import start_ray

_QUESTIONS = ("What is 7 times 8?", "Name three colours.", "Write a short sentence about the sea.")
_NEW_TOKENS = 24
# So cold that a logit 0.001 above the next one takes more than half of the probability.
_COLD = 0.001
_CPU_CACHE = 256 << 20
_WAIT_SECONDS = 600.0


@dataclass(frozen=True)
class Greedy:
    """Prompts and what transformers writes after them, as token ids."""

    prompts: list[list[int]]
    answers: list[list[int]]


def check_export(folder: Path, run_dir: Path, console: Console) -> bool:
    """Run the checks, one line each. Returns whether all hold.

    Raises:
        UserError: no export, or one that transformers, vLLM or the trainer cannot load.
    """
    recipe = load_recipe(run_dir / "recipe.yaml")
    step = int(about(folder)["step"])
    whole = True

    def line(ok: bool, what: str) -> None:
        nonlocal whole
        whole &= ok
        console.print(f"[{'green' if ok else 'red'}]{'ok' if ok else 'FAILED':>6}[/]  {what}")

    different, count = compare_weights(
        folder, run_dir / "checkpoints" / f"step_{step:06d}" / "policy", recipe
    )
    line(not different, f"weights: {count - different} of {count} tensors equal the checkpoint's")
    greedy = transformers_greedy(folder)
    line(True, f"transformers loads it: {sum(map(len, greedy.answers))} tokens, written greedily")
    with _ray():
        theirs = vllm_greedy(folder, greedy)
        same = sum(a == b for a, b in zip(greedy.answers, theirs, strict=True))
        line(same == len(theirs), f"vLLM: {same} of {len(theirs)} greedy texts are the same")
        agreed, tokens = trainer_greedy(folder, recipe, greedy)
        line(agreed == tokens, f"trainer: {agreed} of {tokens} tokens are its greedy choice too")
    return whole


def compare_weights(folder: Path, policy: Path, recipe: Recipe) -> tuple[int, int]:
    """(tensors that differ or are missing, tensors of the checkpoint)."""
    where: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            where |= dict.fromkeys(tensors.keys(), file)
    spec = read_model_spec(resolve_model(recipe.model))
    different = count = 0
    for name, tensor in stored_weights(policy, spec):
        count += 1
        if name not in where:
            different += 1
            continue
        with safe_open(where[name], "pt") as tensors:
            different += not torch.equal(tensors.get_tensor(name), tensor)
    return different, count


@torch.no_grad()
def transformers_greedy(folder: Path) -> Greedy:
    """What transformers writes in fp32."""
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    renderer = ChatRenderer(tokenizer, 1 << 20)
    prompts = [renderer.render([{"role": "user", "content": q}]) for q in _QUESTIONS]
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        written = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=_NEW_TOKENS,
            # What the folder's settings say about sampling or repetition is not greedy.
            repetition_penalty=1.0,
        )
        answers.append(written[0, len(prompt) :].tolist())
    return Greedy(prompts, answers)


def vllm_greedy(folder: Path, greedy: Greedy) -> list[list[int]]:
    """What an engine writes after the same prompts, in fp32."""
    longest = max(map(len, greedy.prompts)) + _NEW_TOKENS
    gpu = torch.cuda.is_available()
    settings = EngineSettings(
        model=str(folder),
        dtype="float32",
        max_model_len=longest,
        max_sequences=len(greedy.prompts),
        kv_cache_bytes=None if gpu else _CPU_CACHE,
    )
    fleet = Fleet(settings, 1, actor_options=[{"num_cpus": 0, "num_gpus": int(gpu)}])
    try:
        fleet.submit(
            [
                GenerationRequest(str(i), prompt, seed=0, temperature=0.0, max_tokens=_NEW_TOKENS)
                for i, prompt in enumerate(greedy.prompts)
            ]
        )
        found: dict[str, list[int]] = {}
        while len(found) < len(greedy.prompts):
            found |= {r.request_id: list(r.token_ids) for r in fleet.poll(_WAIT_SECONDS)}
    finally:
        fleet.shutdown()
    return [found[str(i)] for i in range(len(greedy.prompts))]


def trainer_greedy(folder: Path, recipe: Recipe, greedy: Greedy) -> tuple[int, int]:
    """(tokens that the trainer would choose, all tokens), on one rank in fp32."""
    policy = recipe.policy.on_one_rank().model_copy(update={"precision": "fp32", "fp8": None})
    alone = recipe.model_copy(update={"policy": policy})
    answers = [np.asarray(answer, dtype=np.int64) for answer in greedy.answers]
    nothing = [np.zeros(len(answer), dtype=np.float32) for answer in answers]
    batch = TrainingBatch(
        greedy.prompts,
        [[i] for i in range(len(answers))],
        answers,
        nothing,
        [0.0] * len(answers),
        _COLD,
    )
    group = PolicyGroup(alone, folder)
    try:
        logprobs, _ = group.logprobs(batch)
    finally:
        group.shutdown()
    every = np.concatenate(logprobs)
    return int((every > -math.log(2)).sum()), len(every)


@contextmanager
def _ray() -> Iterator[None]:
    import ray

    if ray.is_initialized():
        yield
        return
    start_ray()
    try:
        yield
    finally:
        ray.shutdown()
