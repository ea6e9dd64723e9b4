"""A build as a source of prompts: its shares, its order, what is held out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from builds import deepscaler, eurus, recipe, run, write_lines

from prorl_nemo.data.built_source import BuiltData, BuiltSource
from prorl_nemo.data.chat import ChatRenderer, load_tokenizer
from prorl_nemo.data.prompts import load_prompts
from prorl_nemo.errors import RecipeError
from prorl_nemo.recipe import Recipe, parse_recipe
from prorl_nemo.tiny_model import tiny_model


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"kind": "built"}, "needs one"),
        ({"kind": "built", "domain": "math", "size": 4}, "size: not for kind built"),
        ({"kind": "reasoning_gym", "task": "lcm", "domain": "logic"}, "domain: not for kind"),
        ({"kind": "built", "domain": "math"}, "needs folder, or data.build"),
        ({"domain": "math"}, "task: an entry of kind reasoning_gym needs one"),
    ],
)
def test_wrong_entries_of_the_mixture(entry: dict[str, Any], message: str) -> None:
    raw = {"name": "x", "model": "m", "stages": [{"steps": 1}], "data": {"sources": [entry]}}
    with pytest.raises(RecipeError, match=message):
        parse_recipe(raw)


@pytest.fixture(scope="module")
def renderer(tmp_path_factory: pytest.TempPathFactory) -> ChatRenderer:
    folder = tiny_model("llama", tmp_path_factory.mktemp("model") / "m", layers=1)
    return ChatRenderer(load_tokenizer(folder), 1000)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("built")
    write_lines(folder / "math" / "deepscaler.jsonl", deepscaler(60))
    code = [eurus(i, {"inputs": [str(i)], "outputs": [str(i)]}) for i in range(30)]
    code += [eurus(100 + i, {"inputs": ["1"], "outputs": ["1"]}, data_source="apps")
             for i in range(30)]  # fmt: skip
    write_lines(folder / "code" / "train.jsonl", code)
    sources = [
        {"source": "deepscaler", "path": str(folder / "math")},
        {"source": "eurus_code", "path": str(folder / "code")},
    ]
    settings = recipe(folder / "out", sources, held_out=3)
    run(settings)
    return settings


def test_prompts_of_a_build(built: Recipe, renderer: ChatRenderer) -> None:
    tokenizer = renderer._tokenizer
    stream, validation, _ = load_prompts(built, tokenizer)
    drawn = [stream.draw() for _ in range(114)]
    assert stream.drawn == {"math": 57, "code": 57}
    problems = [p.messages[-1]["content"] for p, _ in drawn]
    assert {epoch for _, epoch in drawn[:108]} == {0}
    assert len(set(problems[:108])) == 108  # No prompt twice in an epoch.
    exam = [p.messages[-1]["content"] for p in validation]
    assert not set(exam) & set(problems)
    assert [p.task for p in validation] == ["deepscaler"] * 2 + ["eurus_apps"] * 2 + [
        "eurus_taco"
    ] * 2
    prompt = drawn[0][0]
    assert prompt.token_ids == renderer.render(prompt.messages)
    # Resumed in the middle, with prompts put back.
    other = load_prompts(built, tokenizer).stream
    for _ in range(50):
        other.draw()
    other.put_back(drawn[45:50])
    resumed = load_prompts(built, tokenizer).stream
    resumed.load_state_dict(json.loads(json.dumps(other.state_dict())))
    assert [resumed.draw() for _ in range(40)] == drawn[45:85]


def test_another_seed_is_another_order(built: Recipe, renderer: ChatRenderer) -> None:
    orders = []
    for seed in (1, 2):
        stream = load_prompts(built.model_copy(update={"seed": seed}), renderer._tokenizer).stream
        orders.append([stream.draw()[0].messages[-1]["content"] for _ in range(20)])
    assert orders[0] != orders[1]


def test_a_task_of_its_own_leaves_its_domain(built: Recipe, renderer: ChatRenderer) -> None:
    raw = built.model_dump(mode="json", exclude_unset=True)
    raw["data"]["sources"] = [
        {"kind": "built", "domain": "code"},
        {"kind": "built", "domain": "code", "task": "eurus_apps", "weight": 3},
    ]
    stream = load_prompts(parse_recipe(raw), renderer._tokenizer).stream
    tasks = [stream.draw()[0].task for _ in range(40)]
    assert tasks.count("eurus_apps") == 30 and tasks.count("eurus_taco") == 10
    raw["data"]["sources"][1]["task"] = "eurus_aps"
    with pytest.raises(RecipeError, match=r"sources\.1\.task: .* it has eurus_apps, eurus_taco"):
        load_prompts(parse_recipe(raw), renderer._tokenizer)
    raw["data"]["sources"] = [{"kind": "built", "domain": "stem"}]
    with pytest.raises(RecipeError, match="no stem is left"):
        load_prompts(parse_recipe(raw), renderer._tokenizer)


def test_more_held_out_prompts_than_were_set_aside(built: Recipe, renderer: ChatRenderer) -> None:
    data = BuiltData(Path(built.data.build.folder), "key") if built.data.build else None
    assert data is not None
    source = BuiltSource(data, "math", "math", {"deepscaler"}, seed=1, renderer=renderer)
    assert len(source.held_out(3)) == 3
    with pytest.raises(RecipeError, match="math has 3 held-out prompts"):
        source.held_out(4)
