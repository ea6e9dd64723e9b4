"""No layout changes a number: a covering set against an independent single process.

For each layout, with tiny fp32 models on gloo: per-token log-probs and entropy, the loss and
the global gradient norm of three updates, the weights they end in, and the bit-exact way of
the weights from the Hugging Face folder through Megatron and back.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import independent_policy as independent
import numpy as np
import pytest
from independent_policy import Expected
from layout_runs import (
    Layout,
    compute,
    distance,
    load_and_train,
    recipe,
    train_and_save,
    union,
    union_of_weights,
)
from ranks import run_ranks

# fp32 has 1.2e-7 relative rounding; summing some hundred products in another order, through
# eight layers, gives a few 1e-6. A layout that is wrong is off by 1e-3 or more.
RELATIVE = 1e-5


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
    Layout("llama-3kv", TIED, tp=2, sp=True, tokens=30),
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


# Written in the first layout, read in the others: every kind of split, from one to many and back.
# (Reading in the layout that wrote is what test_moments_in_bf16 and test_resume.py do.)
CHECKPOINTS = {
    "llama": [
        Layout("llama", TIED, tokens=40),
        Layout("llama", TIED, tp=2, pp=2, tokens=40),
        Layout("llama", TIED, dp=2, tokens=40),
        Layout("llama", TIED, pp=2, vpp=4, cp=2, tokens=40),
    ],
    "qwen2": [
        Layout("qwen2", UNTIED, tp=2, pp=2, dp=2, tokens=40),
        Layout("qwen2", UNTIED, tokens=40),
    ],
    "qwen3": [
        Layout("qwen3", TIED, pp=2, vpp=2, cp=2, tokens=40),
        Layout("qwen3", TIED, tp=4, dp=2, sp=True, tokens=40),
    ],
    # An added key/value head is in the checkpoint, and is not in the model that reads it ...
    "added head": [
        Layout("llama-3kv", TIED, tp=2, tokens=40),
        Layout("llama-3kv", TIED, dp=2, tokens=40),
    ],
    # ... and the other way round.
    "head to add": [
        Layout("llama-3kv", TIED, tokens=40),
        Layout("llama-3kv", TIED, tp=2, tokens=40),
    ],
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_checkpoint_goes_on_in_another_layout(case: str, models: Any, tmp_path: Path) -> None:
    layouts = CHECKPOINTS[case]
    family = layouts[0].family
    folder, known = models(family, layouts[0].tied)
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    settings = recipe(layouts[0], folder)
    wanted = run_ranks(
        train_and_save, settings.policy.ranks, settings, folder, known.data, checkpoint
    )
    for layout in layouts[1:]:
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


def test_moments_in_bf16(models: Any, tmp_path: Path) -> None:
    """Nearly the weights of fp32 moments, and exactly the same ones after a resume."""
    layout = Layout("llama", TIED, tp=2, dp=2, tokens=40)
    folder, known = models(layout.family, layout.tied)
    settings = recipe(layout, folder)
    settings.policy.optimizer.moments = "bf16"
    ranks = settings.policy.ranks
    once = union_of_weights(run_ranks(compute, ranks, settings, folder, known.data), "trained")
    for name, wanted in known.trained.items():
        moved = np.abs((wanted - known.weights[name]).numpy()).mean()
        # The first of three updates is exact, the others have moments rounded by 0.4 % or so.
        assert np.abs(once[name] - wanted.numpy()).mean() < 0.01 * moved, name

    saved = run_ranks(train_and_save, ranks, settings, folder, known.data, tmp_path)
    resumed = run_ranks(load_and_train, ranks, settings, folder, known.data, tmp_path)
    wanted_weights = union_of_weights(saved, "trained")
    for name, tensor in union_of_weights(resumed, "trained").items():
        assert np.array_equal(tensor, wanted_weights[name]), name


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
    text = text[: text.index("tools.check_table")]  # Below it is a table of another check.
    families = tuple(f"| {family} |" for family in independent.SHAPES)
    rows = [line for line in text.splitlines() if line.startswith(families)]
    assert rows == [table_row(layout) for layout in LAYOUTS]
