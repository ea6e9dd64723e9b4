"""`prorl plan`: every layout once, best first, with reasons; refusals name what to change."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from prorl_nemo.cli import app
from prorl_nemo.errors import ModelError, UserError
from prorl_nemo.planning.activations import Row
from prorl_nemo.planning.hardware import GIB, GPUS
from prorl_nemo.planning.layouts import RECOMPUTE, Layout, room
from prorl_nemo.planning.memory import trainer_memory
from prorl_nemo.planning.plan import Assumptions, make_plan, workload
from prorl_nemo.planning.published import RUNS
from prorl_nemo.planning.shapes import model_shape
from prorl_nemo.planning.step_time import StepTime
from prorl_nemo.recipe import Recipe, load_recipe, parse_recipe

ROOT = Path(__file__).parents[2]
R1 = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"


def small(**sections: Any) -> Recipe:
    raw: dict[str, Any] = {
        "name": "small",
        "model": R1,
        "data": {"sources": [{"task": "coin_flip"}], "max_prompt_tokens": 512},
        "rollout": {"max_response_tokens": 4096, "prompts_per_step": 64},
        "stages": [{"steps": 10}, {"steps": 5, "max_response_tokens": 8192}],
    }
    for key, value in sections.items():
        raw[key] = {**raw[key], **value} if key in raw and isinstance(value, dict) else value
    return parse_recipe(raw)


@pytest.mark.parametrize("gpus", [1, 6, 8, 32])
def test_every_layout_is_there_once(gpus: int) -> None:
    plan = make_plan(small(), gpus, "h100")
    found = [
        (p.tensor_parallel, p.pipeline_parallel, p.context_parallel, p.data_parallel)
        for p in (layout.policy for layout in plan.layouts)
    ]
    sizes = range(1, gpus + 1)
    expected = {
        (t, p, c, gpus // (t * p * c))
        for t, p, c in itertools.product(sizes, repeat=3)
        if t * p * c <= gpus and gpus % (t * p * c) == 0
    }
    assert sorted(found) == sorted(expected)


def test_those_that_fit_fit_and_come_first() -> None:
    recipe = small()
    plan = make_plan(recipe, 8, "h100")
    fits = [layout.fits for layout in plan.layouts]
    assert fits == sorted(fits, reverse=True) and fits[0] and not fits[-1]
    left = room(plan.gpu, plan.engine)
    fastest = min(layout.time.total for layout in plan.layouts if layout.fits and layout.time)
    for layout in plan.layouts:
        assert layout.fits == (not layout.reason)
        if layout.fits:
            assert layout.memory and layout.memory.peak <= left
    best = plan.best
    assert best and best.time and best.time.total <= 1.05 * fastest
    # What it says can be put on the command line, and is then the recipe's own.
    path = ROOT / "recipes" / "nemotron_1.5b" / "v2.yaml"
    v2 = make_plan(load_recipe(path), 32, "h100")
    assert v2.chosen
    again = make_plan(load_recipe(path, v2.chosen.overrides(v2.recipe)), 32, "h100")
    assert again.own and again.own.fits and again.gpu_hours == pytest.approx(v2.gpu_hours)


def test_a_layout_that_does_not_fit_ranks_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks a model take 3 % more than four, which counts as equal; that one alone would be
    faster than both changes nothing, as it does not fit."""
    seconds = {1: 10.0, 2: 10.6, 4: 10.3}

    def examined(*others: Any) -> Layout:
        policy = others[-1]
        ranks = policy.ranks // policy.data_parallel
        time = StepTime(seconds[ranks], 0, 0, 0, 0, 0)
        row = Row.largest(policy, 512, 8192)
        return Layout(policy, row, None, time, "memory: too little" if ranks == 1 else "")

    monkeypatch.setattr("prorl_nemo.planning.layouts.examine", examined)
    best = make_plan(small(), 4, "h100").best
    assert best and best.policy.data_parallel == 2


@pytest.mark.parametrize(
    ("sections", "gpus", "gpu", "reason"),
    [
        ({}, 8, "h100", "policy.tensor_parallel: 4 does not divide the model's 2 key/value heads"),
        ({}, 8, "h100", "policy.pipeline_parallel: 8 does not divide the model's 28 layers"),
        ({}, 64, "h100", "would span nodes of 8 GPUs"),
        ({}, 64, "h100", "algorithm.minibatches: 16 pieces of work in a minibatch"),
        ({"policy": {"fp8": "blockwise"}}, 8, "a100", "policy.fp8: blockwise needs a GPU"),
        ({"policy": {"fp8": "mxfp8"}}, 8, "h200", "policy.fp8: mxfp8 needs a GPU"),
        ({"policy": {"attention": "flex"}}, 8, "h100", "policy.attention: flex computes whole"),
        ({"rollout": {"gpu_memory_share": 0.85}}, 1, "h100", "memory: the trainer needs"),
    ],
)
def test_reasons(sections: dict[str, Any], gpus: int, gpu: str, reason: str) -> None:
    plan = make_plan(small(**sections), gpus, gpu)
    reasons = [layout.reason for layout in plan.layouts]
    assert any(reason in each for each in reasons), sorted(set(reasons))


@pytest.mark.parametrize(
    ("sections", "arguments", "message"),
    [
        ({}, (8, "h999"), "--gpu: 'h999' is not known; choose from a100, h100"),
        ({}, (0, "h100"), "--gpus: give a number from 1 to 4096, not 0"),
        ({}, (5000, "h100"), "--gpus: give a number from 1 to 4096"),
        ({}, (12, "h100"), "--gpus: 12 is more than a node and no whole number of nodes"),
        ({}, (8, "h100", Assumptions(mean_response=0.0)), "--mean-response"),
        ({}, (8, "h100", Assumptions(keep_rate=1.5)), "--keep-rate"),
        ({}, (8, "h100", Assumptions(keep_rate=float("nan"))), "--keep-rate"),
        ({}, (8, "h100", Assumptions(prompt=513.0)), "--mean-prompt"),
        ({"model": "no/such-model"}, (8, "h100"), "the shape of 'no/such-model' is not known"),
        ({"model": "Qwen/Qwen3-4B", "stages": [{"steps": 1, "max_response_tokens": 41000}]},
         (8, "h100"), "exceed the model's 40960 positions"),
        ({"rollout": {"gpu_memory_share": 0.05}}, (8, "h100"), "rollout.gpu_memory_share: one"),
        ({"rollout": {"kv_cache_mib": 1}}, (8, "h100"), "rollout.kv_cache_mib: one sequence"),
        ({"rollout": {"kv_cache_mib": 100_000}}, (8, "h100"), "the engine takes"),
    ],
)  # fmt: skip
def test_refusals(sections: dict[str, Any], arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(UserError) as caught:
        make_plan(small(**sections), *arguments)
    assert message in str(caught.value)


def test_shapes_come_from_folders_too(tmp_path: Path) -> None:
    """A config.json is enough: weights and tokenizer are not looked at."""
    config = tmp_path / "config.json"
    names = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 300, "rms_norm_eps": 1e-6}
    names |= {"num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 512}
    config.write_text(json.dumps({"model_type": "qwen3", "head_dim": 16, **names}))
    found = model_shape(str(tmp_path))
    assert (found.layers, found.qk_norm, found.groups) == (3, True, 4)
    config.write_text('{"model_type": "mamba"}')
    with pytest.raises(ModelError, match="mapped families"):
        model_shape(str(tmp_path))


def test_hours_are_the_sum_over_stages() -> None:
    plan = make_plan(small(), 8, "h100")
    seconds = [stage.time.total for stage in plan.stages]
    assert [stage.limit for stage in plan.stages] == [4096, 8192]
    assert seconds[1] > seconds[0]
    assert plan.gpu_hours == pytest.approx((10 * seconds[0] + 5 * seconds[1]) * 8 / 3600)
    low, high = plan.gpu_hours_range
    ratios = [run.ratio() for run in RUNS]
    assert (low, high) == (plan.gpu_hours * min(ratios), plan.gpu_hours * max(ratios))


def test_without_dynamic_sampling_nothing_is_drawn_again() -> None:
    """64 prompts of a step: 64 / 0.4 are drawn to keep 64, or 64 to keep a share of 0.4."""
    for dynamic, drawn, kept in ((True, 160, 64), (False, 64, 26)):
        recipe = small(rollout={"dynamic_sampling": dynamic})
        found = workload(recipe, recipe.stages[0], Assumptions(keep_rate=0.4))
        assert (found.generation.prompts, found.groups) == (pytest.approx(drawn), kept)


@pytest.mark.parametrize(("less", "more"), [("h100", "h200"), ("h200", "b200"), ("a100", "h200")])
def test_a_better_gpu_is_no_slower_and_fits_no_less(less: str, more: str) -> None:
    plans = [make_plan(small(), 8, gpu) for gpu in (less, more)]
    fitting = [sum(layout.fits for layout in plan.layouts) for plan in plans]
    assert fitting[0] <= fitting[1]
    assert plans[0].gpu_hours > plans[1].gpu_hours


@pytest.mark.parametrize(
    "path", sorted((ROOT / "recipes" / "nemotron_1.5b").glob("*.yaml")), ids=lambda p: p.stem
)
@pytest.mark.parametrize(("gpus", "gpu"), [(8, "h100"), (32, "h100"), (32, "b200"), (64, "h100")])
def test_the_recipes_of_the_real_run_can_be_planned(path: Path, gpus: int, gpu: str) -> None:
    recipe = load_recipe(path)
    plan = make_plan(recipe, gpus, "b200" if recipe.policy.fp8 == "mxfp8" else gpu)
    assert plan.chosen and 100 < plan.gpu_hours < 50_000


@pytest.mark.parametrize(
    ("recipe", "gpus", "gpu"),
    [
        ("nemotron_1.5b/v1", 32, "h100"),
        ("nemotron_1.5b/v2", 32, "h100"),
        ("nemotron_1.5b/v2_from_base", 32, "h100"),
        ("nemotron_1.5b/v2_8gpus", 8, "h100"),
        ("nemotron_1.5b/v2_b200", 8, "b200"),
        ("qwen3_4b/v2", 32, "h100"),
        ("dapo_math/qwen2.5_math_1.5b", 8, "h100"),
        ("smoke/h100", 1, "h100"),
    ],
)
def test_recipes_fit_on_their_gpus_as_they_are(recipe: str, gpus: int, gpu: str) -> None:
    loaded = load_recipe(ROOT / "recipes" / f"{recipe}.yaml")
    plan = make_plan(loaded, gpus, gpu)
    assert plan.own and plan.own.fits, plan.own and plan.own.reason
    assert loaded.rollout.engines == gpus
    # Nothing on the list is much better than what the recipe says.
    assert plan.best and plan.best.time and plan.own.time
    assert plan.own.time.total < 1.1 * plan.best.time.total


def test_engines_over_several_gpus_are_fewer_and_hold_less() -> None:
    whole, split = (
        make_plan(small(rollout={"tensor_parallel": ways}), 8, "h100") for ways in (1, 4)
    )
    assert split.engine.weights == whole.engine.weights // 4
    assert split.chosen and "rollout.engines=2" in split.chosen.overrides(split.recipe)
    for ways, message in (
        (5, "cannot split 12 heads, 2 key/value heads .* over 5; possible: 1, 2, 4"),
        (4, "engines of 4 GPUs do not fill nodes of 6"),
    ):
        with pytest.raises(UserError, match=f"rollout.tensor_parallel: .*{message}"):
            make_plan(small(rollout={"tensor_parallel": ways}), 6, "h100")


def test_a_sleeping_engine_leaves_its_memory() -> None:
    """By hand: 79 GiB less 5 % and 2 GiB of runtime, less 1.5 GiB that a sleeping engine keeps."""
    recipe = small(rollout={"sleep_in_updates": True, "gpu_memory_share": 0.6})
    plan = make_plan(recipe, 8, "h100")
    assert room(plan.gpu, plan.engine) == int(79 * GIB * 0.95) - 2 * GIB - 3 * GIB // 2
    awake = make_plan(small(rollout={"gpu_memory_share": 0.6}), 8, "h100")
    fits = [sum(layout.fits for layout in p.layouts) for p in (awake, plan)]
    assert fits[0] <= fits[1]
    # While the engine works, what stays of the trainer must still have room beside it.
    full = make_plan(small(rollout={"sleep_in_updates": True, "gpu_memory_share": 0.9}), 1, "h100")
    assert "stay while the engine works" in full.layouts[0].reason


def test_a_larger_model_on_two_tensor_parallel_ranks() -> None:
    plan = make_plan(small(model="Qwen/Qwen3-4B"), 8, "h100")
    two = [x for x in plan.layouts if x.policy.tensor_parallel == 2 and x.policy.ranks == 8]
    assert any(layout.fits for layout in two)


def test_the_command() -> None:
    recipe = ROOT / "recipes" / "nemotron_1.5b" / "v2.yaml"
    result = CliRunner().invoke(app, ["plan", str(recipe), "--gpus", "32", "--gpu", "h100"])
    assert result.exit_code == 0, result.output
    for part in ("weights", "gradients", "distributed optimizer", "KV cache", "layouts fit",
                 "does not divide", "GPU-hours", "generation"):  # fmt: skip
        assert part in result.output


def test_the_command_writes_json_and_fails_where_nothing_fits(tmp_path: Path) -> None:
    recipe = str(ROOT / "recipes" / "nemotron_1.5b" / "v2.yaml")
    out = tmp_path / "plan.json"
    arguments = ["plan", recipe, "--gpus", "8", "--gpu", "B200", "--json", str(out)]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    found = json.loads(out.read_text())
    assert found["gpus"] == 8 and found["gpu"]["memory"] == GPUS["b200"].memory
    assert found["own"] is None and found["layouts"][0]["fits"]
    assert set(found["layouts"][0]["step_seconds"]) >= {"generation", "updates", "total"}
    greedy = ["plan", recipe, "rollout.gpu_memory_share=0.95", "--gpus", "1"]
    result = CliRunner().invoke(app, greedy)
    assert result.exit_code == 1 and "no layout fits" in result.output
    unknown = CliRunner().invoke(app, ["plan", recipe, "--gpu", "tpu"])
    assert unknown.exit_code == 2


def test_the_page_has_the_figures_of_the_real_recipes() -> None:
    page = (ROOT / "docs" / "planning.md").read_text(encoding="utf-8")
    for name in ("v1", "v2"):
        plan = make_plan(
            load_recipe(ROOT / "recipes" / "nemotron_1.5b" / f"{name}.yaml"), 32, "h100"
        )
        low, high = plan.gpu_hours_range
        assert f"| `{name}.yaml` | {plan.gpu_hours:,.0f} | {low:,.0f} to {high:,.0f} |" in page
    policy = plan.recipe.policy
    row = Row.largest(policy, plan.recipe.data.max_prompt_tokens, plan.recipe.longest_response)
    peaks = [
        trainer_memory(plan.spec, policy.model_copy(update={"recompute": recompute}), row).peak
        for recompute in RECOMPUTE
    ]
    figures = " | ".join(f"{peak / GIB:.1f}" for peak in peaks)
    assert f"| trainer at its peak | {figures} |" in page
    left = f"{room(plan.gpu, plan.engine) / GIB:.1f}"
    assert f"| room beside an engine of half the GPU | {left} | {left} | {left} |" in page
