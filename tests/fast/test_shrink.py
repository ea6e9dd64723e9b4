"""`prorl check --tiny`: recipes become such that two cores can run (all: `make check-recipes`)."""

from __future__ import annotations

from pathlib import Path

import pytest

from prorl_nemo.data.chat import load_tokenizer
from prorl_nemo.data.prompts import load_prompts
from prorl_nemo.megatron.layout import check_layout, read_model_spec
from prorl_nemo.planning.shapes import model_shape
from prorl_nemo.recipe import load_recipe, parse_recipe
from prorl_nemo.rewards.gold import gold_response
from prorl_nemo.rewards.registry import grade
from prorl_nemo.shrink import shrink, write_small_data

ROOT = Path(__file__).parents[2]
RECIPES = [
    ROOT / "recipes" / name
    for name in (
        "nemotron_1.5b/v1.yaml",
        "nemotron_1.5b/v2.yaml",
        "nemotron_1.5b/v2_from_base.yaml",
        "nemotron_1.5b/v2_8gpus.yaml",
        "nemotron_1.5b/v2_b200.yaml",
        "qwen3_4b/v2.yaml",
        "dapo_math/qwen2.5_math_1.5b.yaml",
        "smoke/domains.yaml",
    )
]


def test_an_engine_that_is_split_stays_split(tmp_path: Path) -> None:
    recipe = load_recipe(RECIPES[0], ["rollout.tensor_parallel=4"])
    assert shrink(recipe, tmp_path)[0].rollout.tensor_parallel == 2


def test_key_value_heads_that_do_not_divide_stay_so(tmp_path: Path) -> None:
    """SmolLM2's three are split in two by filling them up: one head could not be split."""
    recipe = load_recipe(ROOT / "recipes/quickstart.yaml", ["policy.tensor_parallel=2"])
    check_layout(recipe.policy, model_shape(recipe.model))
    small, _ = shrink(recipe, tmp_path)
    spec = read_model_spec(Path(small.model))
    check_layout(small.policy, spec)
    assert small.policy.tensor_parallel == 2 and spec.groups == 3


def test_stages_of_unlike_lengths_keep_their_overlong_penalty(tmp_path: Path) -> None:
    raw = {
        "name": "lengths",
        "model": "tiny-arithmetic",
        "data": {"sources": [{"task": "coin_flip"}]},
        "shaping": {"cosine": None, "overlong": {"buffer_tokens": 400}},
        "stages": [
            {"steps": 1, "max_response_tokens": 512},
            {"steps": 1, "max_response_tokens": 8192},
        ],
    }
    small, _ = shrink(parse_recipe(raw), tmp_path)
    assert [stage.max_response_tokens for stage in small.stages] == [4, 24]
    assert small.shaping.overlong and small.shaping.overlong.buffer_tokens == 1


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_recipes_shrink(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    small, left_out = shrink(recipe, tmp_path)
    spec, whole = read_model_spec(Path(small.model)), model_shape(recipe.model)
    assert (spec.family, spec.tied, spec.qkv_bias, spec.qk_norm) == (
        whole.family,
        whole.tied,
        whole.qkv_bias,
        whole.qk_norm,
    )
    check_layout(small.policy, spec)
    assert small.policy.ranks <= 4 and small.rollout.engines == 1
    # An axis that is used is still used.
    for axis in ("tensor_parallel", "pipeline_parallel", "context_parallel"):
        assert (getattr(small.policy, axis) > 1) == (getattr(recipe.policy, axis) > 1)
    assert small.rollout.tensor_parallel == recipe.rollout.tensor_parallel == 1
    assert small.data.max_prompt_tokens + small.longest_response <= spec.max_positions
    # What the check is about stays the recipe's.
    assert small.algorithm.kl == recipe.algorithm.kl
    assert small.algorithm.advantage == recipe.algorithm.advantage
    assert small.shaping.cosine == recipe.shaping.cosine
    assert small.policy.precision == recipe.policy.precision
    assert small.reference_reset == recipe.reference_reset
    assert [s.name for s in small.stages] == [s.name for s in recipe.stages]
    assert bool(left_out) == bool(recipe.policy.fp8 or recipe.policy.attention == "flex")
    assert [s.label for s in small.data.sources] == [s.label for s in recipe.data.sources]


def test_small_data_of_all_domains(tmp_path: Path) -> None:
    """Read as built data is, with gradings that graders take and gold answers that they pass."""
    recipe, _ = shrink(load_recipe(ROOT / "recipes/nemotron_1.5b/v2.yaml"), tmp_path)
    prompts = load_prompts(recipe, load_tokenizer(Path(recipe.model)))
    assert {p.domain for p in prompts.validation} == {
        "math", "code", "stem", "logic", "instructions",
    }  # fmt: skip
    drawn = [prompts.stream.draw()[0] for _ in range(20)]
    assert len({p.prompt_id for p in drawn}) == 20
    for prompt in prompts.validation:
        gold = gold_response(prompt.grading)
        if prompt.domain in ("math", "stem", "logic"):
            assert gold and grade(prompt.grading, gold).score == 1.0


def test_tasks_of_a_domain_stay_apart(tmp_path: Path) -> None:
    """A task of built data, the rest of its domain, and a stage that weighs one of the two."""
    raw = {
        "name": "tasks",
        "model": "tiny-arithmetic",
        "data": {
            "sources": [
                {"kind": "built", "domain": "math", "folder": "d"},
                {"kind": "built", "domain": "math", "task": "deepscaler", "folder": "d"},
            ]
        },
        "stages": [{"steps": 5}, {"steps": 5, "weights": {"deepscaler": 1.0}}],
    }
    small, _ = shrink(parse_recipe(raw), tmp_path)
    prompts = load_prompts(small, load_tokenizer(Path(small.model)))
    assert {prompt.task for prompt in prompts.validation} == {"small_math", "deepscaler"}
    assert {prompts.stream.draw()[0].task for _ in range(4)} == {"small_math", "deepscaler"}


def test_data_folder_must_be_new(tmp_path: Path) -> None:
    write_small_data(tmp_path / "data", {"math": ["small_math"]})
    with pytest.raises(FileExistsError):
        write_small_data(tmp_path / "data", {"math": ["small_math"]})
