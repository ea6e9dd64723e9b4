"""No layout changes a number: a covering set against an independent single process.

For each layout, with tiny fp32 models on gloo: per-token log-probs and entropy, the loss and
the global gradient norm of three updates, the weights they end in, and the bit-exact way of
the weights from the Hugging Face folder through Megatron and back.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import independent_policy as independent
import numpy as np
import pytest
from independent_policy import Expected
from ranks import run_ranks

from prorl_nemo.recipe import Recipe, parse_recipe

# fp32 has 1.2e-7 relative rounding; summing some hundred products in another order, through
# eight layers, gives a few 1e-6. A layout that is wrong is off by 1e-3 or more.
RELATIVE = 1e-5


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


TIED, UNTIED = True, False
# Budgets: 4096 tokens hold the whole batch in one row, 30 make rows of different lengths and
# numbers on each rank, 20 is exceeded by some sequences.
LAYOUTS = [
    Layout("llama", UNTIED),
    Layout("llama", TIED, tokens=20, shared=True),
    Layout("qwen2", UNTIED, shared=True),
    Layout("qwen3", TIED, tokens=30, recompute="full"),
    # tensor parallel, without and with the tokens shared too
    Layout("llama", UNTIED, tp=2, shared=True),
    Layout("qwen2", TIED, tp=2, tokens=20, recompute="selective"),
    Layout("qwen3", UNTIED, tp=4),
    Layout("llama", TIED, tp=2, sp=True, tokens=30),
    Layout("qwen2", UNTIED, tp=2, sp=True, shared=True),
    Layout("qwen3", TIED, tp=4, sp=True, tokens=20, recompute="full"),
    # pipeline, plain and interleaved
    Layout("llama", TIED, pp=2, tokens=30),
    Layout("qwen2", UNTIED, pp=2, shared=True),
    Layout("qwen3", TIED, pp=4, tokens=20, shared=True),
    Layout("llama", TIED, pp=2, vpp=2, tokens=20),
    Layout("llama", UNTIED, pp=2, vpp=4, tokens=30, shared=True),
    Layout("qwen2", TIED, pp=2, vpp=2),
    Layout("qwen3", UNTIED, pp=2, vpp=2, tokens=30, recompute="full"),
    Layout("llama", TIED, pp=4, vpp=2, tokens=20),
    # data parallel
    Layout("llama", TIED, dp=2, tokens=30),
    Layout("qwen2", UNTIED, dp=4),
    Layout("qwen3", UNTIED, dp=2, tokens=20, shared=True),
    # context parallel
    Layout("llama", UNTIED, cp=2),
    Layout("qwen2", TIED, cp=2, tokens=20),
    Layout("qwen3", UNTIED, cp=4, tokens=30, recompute="selective"),
    # together
    Layout("llama", UNTIED, tp=2, pp=2, tokens=30, shared=True),
    Layout("qwen2", TIED, tp=2, pp=2, sp=True),
    Layout("qwen3", TIED, tp=2, dp=2, tokens=30),
    Layout("qwen2", TIED, pp=2, dp=2, tokens=20, shared=True, recompute="full"),
    Layout("llama", TIED, tp=2, cp=2, sp=True, tokens=30),
    Layout("qwen2", UNTIED, cp=2, dp=2, tokens=20),
    Layout("qwen3", TIED, pp=2, cp=2, tokens=30),
    Layout("llama", TIED, pp=2, vpp=2, cp=2, tokens=20),
    Layout("llama", TIED, tp=2, pp=2, dp=2, sp=True, tokens=30),
    Layout("qwen3", UNTIED, tp=2, pp=2, dp=2),
    Layout("qwen2", TIED, tp=2, pp=2, dp=2, vpp=2, sp=True, tokens=20, shared=True),
    Layout("llama", TIED, tp=2, pp=2, cp=2, vpp=4, sp=True, tokens=30, recompute="full"),
    Layout("qwen3", UNTIED, tp=2, cp=2, dp=2, sp=True, tokens=20),
    Layout("qwen2", UNTIED, pp=2, vpp=2, cp=2, dp=2, recompute="selective"),
]


def table_row(layout: Layout) -> str:
    """The layout's line in docs/layouts.md."""
    counts = [layout.pp, layout.vpp, layout.cp, layout.dp, layout.tokens]
    cells = [
        layout.family,
        "tied" if layout.tied else "untied",
        str(layout.tp),
        "yes" if layout.sp else "",
        *map(str, counts),
        "yes" if layout.shared else "",
        layout.recompute if layout.recompute != "none" else "",
    ]
    return "| " + " | ".join(cells) + " |"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """models(family, tied) -> (folder, Expected), each computed once."""
    made: dict[tuple[str, bool], tuple[Path, Expected]] = {}

    def model(family: str, tied: bool) -> tuple[Path, Expected]:
        if (family, tied) not in made:
            folder = tmp_path_factory.mktemp(f"{family}-{tied}")
            made[family, tied] = folder, independent.expected(family, tied, folder)
        return made[family, tied]

    return model


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
    weights = {name: tensor.numpy() for name, tensor in worker.export_weights()}
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


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_layout_gives_the_numbers_of_one_process(layout: Layout, models: Any) -> None:
    folder, wanted = models(layout.family, layout.tied)
    settings = recipe(layout, folder)
    answers = run_ranks(compute, settings.policy.ranks, settings, folder, wanted.data)

    loaded = union_of_weights(answers, "loaded")
    assert set(loaded) == set(wanted.weights)
    for name, tensor in loaded.items():
        assert np.array_equal(tensor, wanted.weights[name].numpy()), name

    for which in ("logprobs", "reference"):
        found = union([answer[which] for answer in answers])
        for sample, logprobs in enumerate(wanted.logprobs):
            assert distance(found[sample][0], logprobs) < RELATIVE
            assert distance(found[sample][1], wanted.entropy[sample]) < RELATIVE

    for update, (loss, norm) in enumerate(zip(wanted.losses, wanted.grad_norms, strict=True)):
        records = [answer["records"][update] for answer in answers]
        assert distance(sum(r.get("loss_sum", 0.0) for r in records), loss) < RELATIVE
        assert all(distance(r["grad_norm"], norm) < RELATIVE for r in records)

    for name, tensor in union_of_weights(answers, "trained").items():
        assert distance(tensor, wanted.trained[name].numpy()) < RELATIVE, name


def train_and_save(
    rank: int, world_size: int, address: str, recipe: Recipe, folder: Path, data: Any, to: Path
) -> dict[str, Any]:
    """Train, let the reference become the policy, save, and go on training."""
    from prorl_nemo.megatron.policy_worker import PolicyWorker

    worker = PolicyWorker(recipe, folder, rank, world_size, address)
    batch = training_batch(data)
    worker.train(batch, step_settings())
    worker.reset_reference()
    worker.train(batch, step_settings())
    worker.save(to)
    return next_step(worker, batch)


def load_and_train(
    rank: int, world_size: int, address: str, recipe: Recipe, folder: Path, data: Any, path: Path
) -> dict[str, Any]:
    from prorl_nemo.megatron.policy_worker import PolicyWorker

    worker = PolicyWorker(recipe, folder, rank, world_size, address)
    worker.load(path)
    return next_step(worker, training_batch(data))


def next_step(worker: Any, batch: Any) -> dict[str, Any]:
    return {
        "saved": exported(worker),
        "reference": worker.logprobs(batch, "reference"),
        "grad_norms": [r["grad_norm"] for r in worker.train(batch, step_settings())],
        "trained": exported(worker),
    }


# Written in the first layout, read in all: every kind of split, from one to many and back.
CHECKPOINTS = {
    "llama": [
        Layout("llama", TIED, tokens=40),
        Layout("llama", TIED, tp=2, pp=2, tokens=40),
        Layout("llama", TIED, dp=2, tokens=40),
        Layout("llama", TIED, pp=2, vpp=4, cp=2, tokens=40),
        Layout("llama", TIED, tp=4, dp=2, sp=True, tokens=40),
    ],
    "qwen2": [
        Layout("qwen2", UNTIED, tp=2, pp=2, dp=2, tokens=40),
        Layout("qwen2", UNTIED, tokens=40),
        Layout("qwen2", UNTIED, pp=2, dp=2, tokens=40),
    ],
    "qwen3": [
        Layout("qwen3", TIED, pp=2, vpp=2, cp=2, tokens=40),
        Layout("qwen3", TIED, tp=2, pp=2, tokens=40),
        Layout("qwen3", TIED, tp=4, dp=2, tokens=40),
    ],
}


@pytest.mark.parametrize("family", CHECKPOINTS)
def test_checkpoint_goes_on_in_another_layout(family: str, models: Any, tmp_path: Path) -> None:
    layouts = CHECKPOINTS[family]
    folder, known = models(family, layouts[0].tied)
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    settings = recipe(layouts[0], folder)
    wanted = run_ranks(
        train_and_save, settings.policy.ranks, settings, folder, known.data, checkpoint
    )
    for layout in layouts:
        settings = recipe(layout, folder)
        found = run_ranks(
            load_and_train, settings.policy.ranks, settings, folder, known.data, checkpoint
        )
        saved = union_of_weights(wanted, "saved")
        for name, tensor in union_of_weights(found, "saved").items():
            assert np.array_equal(tensor, saved[name]), name
        reference = union([answer["reference"] for answer in wanted])
        for sample, logprobs in union([answer["reference"] for answer in found]).items():
            assert distance(logprobs, reference[sample]) < RELATIVE
        for answer in found:
            assert distance(answer["grad_norms"], wanted[0]["grad_norms"]) < RELATIVE
        trained = union_of_weights(wanted, "trained")
        for name, tensor in union_of_weights(found, "trained").items():
            assert distance(tensor, trained[name]) < RELATIVE, (str(layout), name)


# Contexts of 8 and 12 positions, which the sequences of the batch exceed.
ROPE_SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 2.5},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 12,
    },
}


@pytest.mark.parametrize("kind", ROPE_SCALINGS)
def test_scaled_rotary_positions(kind: str, models: Any, tmp_path: Path) -> None:
    scaling = ROPE_SCALINGS[kind] | {"rope_theta": 10000.0}
    model = independent.make_model("llama", TIED, tmp_path, rope_parameters=scaling)
    data, logprobs, _ = independent.make_data(model)
    (answer,) = run_ranks(compute, 1, recipe(Layout("llama", TIED), tmp_path), tmp_path, data)
    plain = models("llama", TIED)[1].logprobs
    for sample, wanted in enumerate(logprobs):
        assert distance(answer["logprobs"][sample][0], wanted) < RELATIVE
    # The scaling matters: the same weights without it give other numbers.
    assert max(distance(*pair) for pair in zip(logprobs, plain, strict=True)) > 1e-2


def test_the_table_in_the_docs_is_this_set() -> None:
    text = (Path(__file__).parents[2] / "docs" / "layouts.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith(("| llama", "| qwen"))]
    assert rows == [table_row(layout) for layout in LAYOUTS]
