"""Recipes as people get them wrong: each mistake is refused by name, none is guessed away."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from prorl_nemo.errors import RecipeError
from prorl_nemo.recipe import Recipe, load_recipe, parse_recipe
from prorl_nemo.settings_file import Section, changed_keys, section_of
from prorl_nemo.strict_yaml import YAMLError, dump_yaml, load_yaml

MINIMAL: dict[str, Any] = {
    "name": "small",
    "model": "somewhere",
    "data": {"sources": [{"task": "chain_sum"}, {"task": "coin_flip"}]},
    "rollout": {"prompts_per_step": 8, "samples_per_prompt": 4, "max_response_tokens": 32},
    "stages": [{"steps": 2}, {"steps": 3, "max_response_tokens": 16}],
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_yaml(MINIMAL))
    return path


def test_committed_recipes_are_valid() -> None:
    found = sorted(Path(__file__).parents[2].glob("recipes/**/*.yaml"))
    # These two are recipes of other commands, checked in test_pretraining and test_study_plan.
    others = {"study/pretrain.yaml", "study/study.yaml"}
    found = [path for path in found if f"{path.parent.name}/{path.name}" not in others]
    assert found
    for path in found:
        load_recipe(path)


def test_the_longest_response_is_a_stage_s_or_the_rollout_s() -> None:
    raw = {**MINIMAL, "rollout": {"max_response_tokens": 64}, "shaping": {"overlong": None}}
    for limits, longest in (([None, 16], 64), ([96, None], 96), ([8, 16], 16)):
        stages = [{"steps": 1, "max_response_tokens": limit} for limit in limits]
        assert parse_recipe({**raw, "stages": stages}).longest_response == longest


def test_what_the_recipe_says_and_what_it_leaves_out(file: Path) -> None:
    recipe = load_recipe(file)
    assert recipe.total_steps == 5
    assert recipe.run_dir == Path("runs/small")
    assert recipe.rollout.prompts_per_step == 8
    # Published values of ProRL v2 that a recipe need not repeat.
    assert recipe.algorithm.clip_high == 0.28
    assert recipe.algorithm.kl.coefficient == 1e-4
    assert recipe.shaping.cosine is not None
    assert (recipe.shaping.cosine.on_steps, recipe.shaping.cosine.off_steps) == (100, 500)
    assert recipe.reference_reset.interval == 300


def test_overrides(file: Path) -> None:
    recipe = load_recipe(
        file,
        [
            "policy.optimizer.learning_rate=1e-5",
            "policy.optimizer.betas=[0.9, 0.95]",
            "data.sources.1.weight=2",
            "stages.0.steps=7",
            "shaping.cosine.start_with=off",
            "shaping.overlong={buffer_tokens: 8}",
            "stages.0.steps=9",
            "runs_dir=~/elsewhere",
        ],
    )
    assert recipe.policy.optimizer.learning_rate == 1e-5
    assert recipe.policy.optimizer.betas == (0.9, 0.95)
    assert recipe.data.sources[1].weight == 2.0
    assert recipe.stages[0].steps == 9  # The later of two wins, as on any command line.
    assert recipe.shaping.cosine is not None
    assert recipe.shaping.cosine.start_with == "off"
    assert recipe.shaping.overlong is not None
    assert recipe.shaping.overlong.weight == 1.0
    assert recipe.run_dir == Path.home() / "elsewhere" / "small"


def test_resolved_recipe_reads_back(file: Path, tmp_path: Path) -> None:
    # Strings that one version of YAML or another takes for something else.
    odd = ["data.system_prompt='1e5'", "data.sources.0.config={a: 'on', b: '0x1', c: ['~', '']}"]
    recipe = load_recipe(file, odd)
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(dump_yaml(recipe.model_dump(mode="json")))
    again = load_recipe(resolved)
    assert again == recipe
    assert again.fingerprint == recipe.fingerprint
    assert load_recipe(file).fingerprint != recipe.fingerprint


@pytest.mark.parametrize(
    ("override", "message"),
    [
        # Unknown keys, with the one that was meant.
        ("policy.optimizer.lerning_rate=1e-6", "did you mean learning_rate?"),
        ("policy.learning_rate=1e-6", "did you mean policy.optimizer.learning_rate or stages.0"),
        ("data.sources.0.wieght=2", "data.sources.0.wieght: unknown key; did you mean weight?"),
        ("stages.1.rewards=2", "stages.1.rewards: unknown key; known keys: clip_high, clip_low"),
        # Wrong types. Nothing is coerced.
        ("rollout.prompts_per_step=true", "must be a whole number (found true)"),
        ("rollout.prompts_per_step='8'", "must be a whole number (found '8')"),
        ("rollout.prompts_per_step=8.0", "must be a whole number (found 8.0)"),
        ("rollout.temperature=warm", "rollout.temperature: must be a number (found 'warm')"),
        ("shaping.cosine.correct_only=yes", "must be true or false (found 'yes')"),
        ("name=2024", "name: must be a text; put it in quotes (found 2024)"),
        ("name=", "name: must be a text; put it in quotes (found nothing)"),
        ("policy=null", "policy: must be a mapping of keys, or left out for its defaults"),
        ("policy=[]", "policy: must be a mapping of keys"),
        ("policy=fp32", "policy: must be a mapping of keys"),
        ("stages={steps: 3}", "stages: must be a list, each entry after a dash"),
        ("stages=[3]", "stages.0: must be a mapping of keys"),
        ("stages=[{}]", "stages.0.steps: required, but missing"),
        ("data={}", "data.sources: required, but missing"),
        ("policy.optimizer.betas=0.9", "policy.optimizer.betas: must be a list"),
        ("policy.optimizer.betas=[0.9, '0.9']", "policy.optimizer.betas.1: must be a number"),
        ("stages.0.cosine=on", "yaml:\n  stages.0.cosine: must be a mapping of keys"),
        ("stages.0.cosine={wieght: 1}", "yaml:\n  stages.0.cosine.wieght: unknown key; did you"),
        # Out of range.
        ("stages.0.cosine={weight: -1}", "yaml:\n  stages.0.cosine.weight: must be greater"),
        ("stages=[]", "stages: must have at least 1 item"),
        ("data.sources=[]", "data.sources: must have at least 1 item"),
        ("rollout.temperature=.nan", "rollout.temperature: must be a finite number (found nan)"),
        ("algorithm.clip_high=.inf", "algorithm.clip_high: must be a finite number"),
        ("rollout.prompts_per_step=0", "must be greater than or equal to 1 (found 0)"),
        ("rollout.prompts_per_step=" + "9" * 30, "must be less than or equal to 65536"),
        ("stages.0.steps=" + "9" * 30, "stages.0.steps: must be less than or equal to"),
        ("rollout.engine_threads=100000", "must be less than or equal to 1024"),
        ("seed=-1", "seed: must be greater than or equal to 0"),
        ("policy.optimizer.betas=[0.9, 1.0]", "policy.optimizer.betas.1: must be less than 1"),
        ("policy.precision=fp16", "policy.precision: must be 'bf16' or 'fp32' (found 'fp16')"),
        ("name=../elsewhere", "name: must match pattern"),
        ("name=größe", "name: must match pattern"),
        ("name=" + "a" * 101, "name: must have at most 100 characters"),
        ("model=''", "model: must have at least 1 character"),
        ('model="\\ud800"', "model: must be a valid string"),
        ('runs_dir="a\\0b"', "runs_dir: a text must not hold NUL characters"),
        ("runs_dir=~nobody-of-that-name/x", "runs_dir: Could not determine home directory"),
        ("data.sources.0.config={a: .nan}", "data.sources.0.config: numbers, strings, lists"),
        # Right one by one, wrong together.
        ("algorithm.minibatches=3", "algorithm.minibatches: 3 does not divide"),
        ("checkpoint={interval: 20, keep_every: 50}", "keep_every: 50 is no multiple of"),
        ("policy.data_parallel=3", "leaves some of the 3 data-parallel ranks without work"),
        ("algorithm.importance={low: 2, high: 1}", "algorithm.importance.low must be below"),
        ("algorithm.kl.estimator=k1", "algorithm.kl.estimator: the gradient of k1 is zero"),
        ("data.sources.1.task=chain_sum", "data.sources: chain_sum is listed twice"),
        ("shaping.overlong={buffer_tokens: 17}", "17 exceeds the shortest response limit (16)"),
        ("shaping.cosine={eta_min: 2}", "shaping.cosine: eta_min must not exceed eta_max"),
        (
            "policy.optimizer={schedule: cosine, min_learning_rate: 1e-5}",
            "policy.optimizer.min_learning_rate: 1e-05 is above the lowest peak rate",
        ),
        # Overrides that are none.
        ("policy", "override 'policy': write it as section.key=value"),
        ("=3", "override '=3': write it as section.key=value"),
        ("policy..fp8=3", "override 'policy..fp8=3': write it as section.key=value"),
        ("policy.=3", "override 'policy.=3': write it as section.key=value"),
        ("policy={a: 1", "not valid YAML: line 1, column 6"),
        ("policy={fp8: null, fp8: delayed}", "the key 'fp8' is given twice"),
        ("stages.2.steps=3", "the list has entries 0 to 1, not '2'"),
        ("stages.-1.steps=3", "the list has entries 0 to 1, not '-1'"),
        ("stages.²=3", "the list has entries 0 to 1, not '²'"),
        ("stages.0.steps.x=3", "steps is a value, it has no keys below it"),
    ],
)
def test_refused(file: Path, override: str, message: str) -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe(file, [override])
    assert message in str(error.value)


@pytest.mark.parametrize(
    "override",
    [
        "algorithm.kl={estimator: k1, coefficient: 0}",
        "policy={data_parallel: 3, shared_prompts: false}",
        "policy.data_parallel=2",
        "policy.optimizer={schedule: constant, min_learning_rate: 1e-5}",
        "policy.optimizer={schedule: cosine, min_learning_rate: 2e-6}",
        "shaping.cosine=null",
        "shaping.overlong={buffer_tokens: 16}",
    ],
)
def test_just_allowed(file: Path, override: str) -> None:
    load_recipe(file, [override])


def test_every_mistake_is_named_at_once() -> None:
    raw = copy.deepcopy(MINIMAL)
    raw |= {"sed": 1, "stages": [{"steps": 0}]}
    raw["rollout"]["temperature"] = -1
    del raw["model"]
    with pytest.raises(RecipeError) as error:
        parse_recipe(raw, "my.yaml")
    lines = str(error.value).split("\n  ")
    assert lines[0] == "my.yaml:"
    assert sorted(line.partition(":")[0] for line in lines[1:]) == [
        "model",
        "rollout.temperature",
        "sed",
        "stages.0.steps",
    ]
    raw = copy.deepcopy(MINIMAL)
    raw["algorithm"] = {"minibatches": 3, "kl": {"estimator": "k1"}}
    with pytest.raises(RecipeError, match=r"(?s)minibatches: 3 does not.*estimator: the gradient"):
        parse_recipe(raw)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must be a mapping of keys, found nothing"),
        (b"- a\n- b", "must be a mapping of keys, found ['a', 'b']"),
        (b"name: [", "not valid YAML: line 1, column 8"),
        (b"name: a\nname: b", "not valid YAML: line 2, column 1: the key 'name' is given twice"),
        (b"data: {sources: [], sources: []}", "the key 'sources' is given twice"),
        (b"name: &x a\nmodel: *x", "line 2, column 8: alias *x: write the value out"),
        (b"1: x", "a key must be a word; put it in quotes"),
        (b"name: !!python/name:os.system x", "could not determine a constructor"),
        (b"name: a\n---\nname: b", "expected a single document"),
        (b"[" * 5000, "not valid YAML: nested too deeply"),
        (b"seed: " + b"9" * 5000, "no integer: 999"),
        (b"name: \xff", "not a text file in UTF-8"),
        (b"name: a\0", "not valid YAML: character 8"),
        (b"#" * (1 << 20) + b"\n", "larger than 1 MiB; is it the right file?"),
    ],
)
def test_files_that_are_no_recipe(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError) as error:
        load_recipe(path)
    assert str(path) in str(error.value)
    assert message in str(error.value)


def test_a_laughing_recipe_costs_nothing(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    lines = ["l0: &l0 lol"] + [f"l{i}: &l{i} [{f'*l{i - 1},' * 10}]" for i in range(1, 30)]
    path.write_text("\n".join(lines))
    with pytest.raises(RecipeError, match="alias"):
        load_recipe(path)


def test_no_file_or_none_that_can_be_read(tmp_path: Path) -> None:
    for path, message in (
        (tmp_path, "is a folder"),
        (tmp_path / "absent.yaml", "there is no such file"),
        (tmp_path / ("a" * 300), "cannot be read"),
        (Path("/dev/zero"), "larger than 1 MiB"),
    ):
        with pytest.raises(RecipeError, match=message):
            load_recipe(path)


def test_scalars_are_those_of_yaml_1_2() -> None:
    # PyYAML's 1.1 makes True, 90, '1e-5', 8 and a date of the first five.
    text = "[on, 1:30, 1e-5, 010, 2024-01-02, 0x1F, 0o17, +.5, -1., .inf, ~, TRUE, 1_000]"
    expected = ["on", "1:30", 1e-5, 10, "2024-01-02", 31, 15, 0.5, -1.0, float("inf"), None, True]
    assert load_yaml(text) == [*expected, "1_000"]
    with pytest.raises(YAMLError, match="no integer"):
        load_yaml("!!int x")
    with pytest.raises(YAMLError, match="no number"):
        load_yaml("!!float x")


texts = st.text(st.characters(codec="utf-8"), max_size=8) | st.sampled_from(
    [
        "on",
        "No",
        "1e5",
        "1:30",
        "0x1",
        "0o7",
        "~",
        "",
        "null",
        ".nan",
        "1_0",
        "<<",
        "=",
        "2024-01-02",
    ]
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


@given(values)
@settings(deadline=None)
def test_what_is_dumped_reads_back_in_both_versions_of_yaml(value: Any) -> None:
    text = dump_yaml([value, value])  # Twice, since PyYAML would write the second as an alias.
    assert load_yaml(text) == [value, value]
    assert yaml.safe_load(text) == [value, value]


def test_every_key_is_described() -> None:
    def check(section: type[Section]) -> None:
        assert section.__doc__
        for name, field in section.model_fields.items():
            inner = section_of(field.annotation)
            assert field.description or inner, f"{section.__name__}.{name}"
            if inner:
                check(inner)

    check(Recipe)


def test_changed_keys_by_hand() -> None:
    before = {"a": 1, "b": {"c": [1, 2], "d": None}, "e": {"f": 1}, "gone": 0}
    now = {"a": 1, "b": {"c": [1, 3], "d": {"x": 1}}, "e": {"f": 1}, "new": 5}
    assert changed_keys(before, now) == {
        "b.c": [[1, 2], [1, 3]],
        "b.d": [None, {"x": 1}],
        "gone": [0, None],
        "new": [None, 5],
    }
