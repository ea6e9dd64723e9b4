"""What the tests of layouts run on the trainer's ranks, and how they compare what comes back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import independent_policy as independent
import numpy as np
import torch

from prorl_nemo.recipe import Recipe, parse_recipe


@dataclass(frozen=True)
class Layout:
    """One line of the covering set, by the field's short names."""

    family: str
    tied: bool
    tp: int = 1
    pp: int = 1
    dp: int = 1
    cp: int = 1
    vpp: int = 1
    sp: bool = False
    tokens: int = 4096
    shared: bool = False
    recompute: str = "none"

    @property
    def policy(self) -> dict[str, Any]:
        return {
            "tensor_parallel": self.tp,
            "sequence_parallel": self.sp,
            "pipeline_parallel": self.pp,
            "virtual_pipeline": self.vpp,
            "context_parallel": self.cp,
            "data_parallel": self.dp,
            "tokens_per_microbatch": self.tokens,
            "shared_prompts": self.shared,
            "recompute": self.recompute,
        }

    def __str__(self) -> str:
        parts = [self.family, "tied" if self.tied else "untied"]
        parts += [f"{key}{getattr(self, key)}" for key in ("tp", "pp", "dp", "cp", "vpp")
                  if getattr(self, key) > 1]  # fmt: skip
        parts += ["sp"] * self.sp + ["shared"] * self.shared + [f"mb{self.tokens}"]
        return "-".join([*parts, self.recompute] if self.recompute != "none" else parts)


def recipe(layout: Layout, folder: Path) -> Recipe:
    optimizer = {
        "learning_rate": independent.LEARNING_RATE,
        "betas": independent.BETAS,
        "eps": independent.EPS,
        "weight_decay": independent.WEIGHT_DECAY,
        "clip_grad": independent.CLIP_GRAD,
    }
    return parse_recipe(
        {
            "name": "layouts",
            "model": str(folder),
            "policy": {"precision": "fp32", "threads": 1, "optimizer": optimizer, **layout.policy},
            "algorithm": {
                "minibatches": independent.MINIBATCHES,
                "kl": {
                    "coefficient": independent.KL_COEFFICIENT,
                    "input_clamp": independent.KL_CLAMP,
                },
                "importance": {"low": independent.ICEPOP_LOW, "high": independent.ICEPOP_HIGH},
            },
            "rollout": {"prompts_per_step": len(independent.PROMPT_LENGTHS)},
            "data": {"sources": [{"task": "none"}]},
            "stages": [{"steps": 1}],
        }
    )


def compute(
    rank: int, world_size: int, address: str, recipe: Recipe, folder: Path, data: Any
) -> dict[str, Any]:
    """On each rank: everything one layout has to say."""
    from prorl_nemo.megatron.policy_worker import PolicyWorker

    worker = PolicyWorker(recipe, folder, rank, world_size, address)
    batch = training_batch(data)
    loaded = exported(worker)
    logprobs = worker.logprobs(batch)
    reference = worker.logprobs(batch, "reference")
    records = worker.train(batch, step_settings())
    return {
        "loaded": loaded,
        "logprobs": logprobs,
        "reference": reference,
        "records": records,
        "trained": exported(worker),
    }


def training_batch(data: Any) -> Any:
    from prorl_nemo.training.batch import TrainingBatch

    return TrainingBatch(
        data.prompts, data.groups, data.responses, data.engine, data.advantages,
        independent.TEMPERATURE, data.old, data.reference,
    )  # fmt: skip


def step_settings() -> Any:
    from prorl_nemo.training.batch import StepSettings

    return StepSettings(
        independent.LEARNING_RATE, independent.CLIP_LOW, independent.CLIP_HIGH,
        independent.MINIBATCHES,
    )  # fmt: skip


def exported(worker: Any) -> dict[str, np.ndarray]:
    weights = {name: tensor.clone().numpy() for name, tensor in worker.export_weights()}
    return weights if worker.publishes else {}


def union(parts: list[dict[Any, Any]]) -> dict[Any, Any]:
    merged: dict[Any, Any] = {}
    for part in parts:
        assert not merged.keys() & part.keys(), "two ranks report the same thing"
        merged |= part
    return merged


def union_of_weights(answers: list[dict[str, Any]], which: str) -> dict[str, Any]:
    """The weights of all stages. A last stage of its own publishes a tied matrix as well."""
    weights = {name: tensor for answer in answers for name, tensor in answer[which].items()}
    weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
    return weights


def distance(found: Any, wanted: Any) -> float:
    """Largest deviation, relative to the largest wanted value."""
    found, wanted = np.asarray(found), np.asarray(wanted)
    assert found.shape == wanted.shape
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def train_and_save(
    rank: int, world_size: int, address: str, recipe: Recipe, folder: Path, data: Any, to: Path
) -> dict[str, Any]:
    """Train, let the reference become the policy, save, and go on training while it is written."""
    from prorl_nemo.megatron.policy_worker import PolicyWorker

    worker = PolicyWorker(recipe, folder, rank, world_size, address)
    batch = training_batch(data)
    worker.train(batch, step_settings())
    moments = [tensor.clone() for tensor in optimizer_tensors(worker)]
    worker.reset_reference()
    # KL is zero, and the optimizer is what it was, bit for bit.
    assert same(worker.logprobs(batch), worker.logprobs(batch, "reference"))
    assert all(map(torch.equal, moments, optimizer_tensors(worker)))
    worker.train(batch, step_settings())
    worker.begin_save(to)
    answer = next_step(worker, batch)
    worker.finish_save()
    return answer


def load_and_train(
    rank: int, world_size: int, address: str, recipe: Recipe, folder: Path, data: Any, path: Path
) -> dict[str, Any]:
    from prorl_nemo.megatron.policy_worker import PolicyWorker

    worker = PolicyWorker(recipe, folder, rank, world_size, address)
    worker.load(path)
    batch = training_batch(data)
    loaded = worker.logprobs(batch)
    answer = next_step(worker, batch)
    worker.load_reference(path)  # The policy of the checkpoint, not its reference.
    assert same(worker.logprobs(batch, "reference"), loaded)
    return answer


def optimizer_tensors(worker: Any) -> list[torch.Tensor]:
    """Moments and counts of this rank."""
    from prorl_nemo.megatron.checkpoint import parts_of

    return [
        value
        for part in parts_of(worker.optimizer)
        for state in part.optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    ]


def same(one: dict[int, Any], other: dict[int, Any]) -> bool:
    """Whether two passes gave the same log-probs and entropies to the last bit."""
    return one.keys() == other.keys() and all(np.array_equal(one[s], other[s]) for s in one)


def next_step(worker: Any, batch: Any) -> dict[str, Any]:
    return {
        "saved": exported(worker),
        "reference": worker.logprobs(batch, "reference"),
        "grad_norms": [r["grad_norm"] for r in worker.train(batch, step_settings())],
        "trained": exported(worker),
    }
