"""What the recipe says about a step: penalty, rates, mix, resets of each stage, own triggers."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from prorl_nemo.algorithms.reward_shaping import CosineLength
from prorl_nemo.data.mixture import PromptStream
from prorl_nemo.errors import RecipeError
from prorl_nemo.recipe import Recipe, parse_recipe
from prorl_nemo.records import Prompt
from prorl_nemo.training.reset_rules import ResetRules, load_trigger
from prorl_nemo.training.stage_rules import StageRules


class EntropyIsGone:
    """A trigger of one's own."""

    name = "entropy"

    def fires(self, figures: Mapping[str, float | None], metrics: Mapping[str, float]) -> bool:
        return metrics.get("policy/entropy", 1.0) < 0.1


class Nameless:
    def fires(self, figures: Any, metrics: Any) -> bool:
        return True


def recipe(stages: list[dict[str, Any]], **more: Any) -> Recipe:
    raw: dict[str, Any] = {
        "name": "small",
        "model": "somewhere",
        "data": {"sources": [{"task": "coin_flip", "weight": 3.0}, {"task": "dice"}]},
        "stages": stages,
    }
    return parse_recipe(raw | more)


def on_steps(rules: StageRules, steps: range) -> list[int]:
    return [step for step in steps if rules.cosine(step) is not None]


def test_penalty_of_the_run_goes_through_stages_and_that_of_a_stage_begins_with_it() -> None:
    own = {"weight": 0.2, "on_steps": 1, "off_steps": 2}
    rules = StageRules(
        recipe(
            [
                {"steps": 4},
                {"steps": 4, "cosine": own},
                {"steps": 2, "cosine": "off"},
                {"steps": 4},
            ],
            shaping={"cosine": {"on_steps": 3, "off_steps": 3}},
        )
    )
    # 1-3 and 13-14 by the run's cycle of six; 5 and 8 by the stage's cycle of three.
    assert on_steps(rules, range(1, 15)) == [1, 2, 3, 5, 8, 13, 14]
    assert rules.cosine(5) == CosineLength(0.2, 0.0, 1.0, True)
    assert rules.cosine(1) == CosineLength(0.1, 0.0, 1.0, True)
    assert rules.has_cosine
    assert not StageRules(recipe([{"steps": 1}], shaping={"cosine": None})).has_cosine
    assert not StageRules(recipe([{"steps": 1, "cosine": "off"}])).has_cosine


def test_rate_is_that_of_the_stage_and_warms_up_after_a_reset() -> None:
    settings = recipe(
        [{"steps": 3}, {"steps": 9, "learning_rate": 1e-6, "reference_reset": {"warmup_steps": 4}}],
        policy={"optimizer": {"learning_rate": 2e-6, "warmup_steps": 2}},
    )
    rules, resets = StageRules(settings), ResetRules(settings)
    assert [rules.learning_rate(step) for step in (1, 2, 3, 4)] == [1e-6, 2e-6, 2e-6, 1e-6]
    assert [resets.warmup(1, step, last_reset=5) for step in range(6, 11)] == [
        0.25,
        0.5,
        0.75,
        1.0,
        1.0,
    ]
    assert resets.warmup(0, 6, last_reset=5) == 1.0  # The first stage's rules know no warm-up.
    assert resets.warmup(1, 6, last_reset=None) == 1.0


def test_a_hard_reset_opens_the_stage_that_asks_for_it() -> None:
    rules = StageRules(recipe([{"steps": 3}, {"steps": 2, "reset_at_start": True}, {"steps": 2}]))
    assert [rules.opening_reset(step) for step in range(1, 8)] == [None, None, 1] + [None] * 4
    with pytest.raises(RecipeError, match=r"stages\.0\.reset_at_start"):
        recipe([{"steps": 3, "reset_at_start": True}])


class Numbers:
    """Prompts 0, 1, 2, ... of a source."""

    size = 1000
    fingerprint = ""

    def __init__(self, task: str) -> None:
        self.task = task

    def prompt(self, slot: int) -> Prompt:
        text = [{"role": "user", "content": f"{self.task} {slot}"}]
        return Prompt(f"{self.task}/{slot}", "logic", self.task, text, [slot], {})


def test_the_mix_is_that_of_the_stage() -> None:
    settings = recipe([{"steps": 2}, {"steps": 2, "weights": {"dice": 1.0}}, {"steps": 2}])
    rules = StageRules(settings)
    stream = PromptStream([Numbers("coin_flip"), Numbers("dice")], [3.0, 1.0], seed=1)
    drawn = []
    for step in range(1, 7):
        rules.mix(stream, step)
        drawn.append("".join(stream.draw()[0].task[0] for _ in range(4)))
    assert [sorted(part) for part in drawn] == [list("cccd")] * 2 + [list("dddd")] * 2 + [
        list("cccd")
    ] * 2
    with pytest.raises(RecipeError, match=r"stages\.0\.weights: maths is not in data\.sources"):
        recipe([{"steps": 2, "weights": {"maths": 1.0}}])
    with pytest.raises(RecipeError, match="above 0"):
        recipe([{"steps": 2, "weights": {"dice": 0.0}}])


def test_a_stage_that_may_end_early_needs_a_rate_without_an_end() -> None:
    early = [{"steps": 5, "ends_when_stalled": 2}]
    recipe(early)
    with pytest.raises(RecipeError, match=r"stages\.0\.ends_when_stalled"):
        recipe(early, policy={"optimizer": {"schedule": "cosine"}})


def test_settings_and_triggers_are_those_of_the_stage() -> None:
    name = f"{__name__}:EntropyIsGone"
    sys.modules.setdefault(__name__, sys.modules[EntropyIsGone.__module__])
    settings = recipe(
        [{"steps": 2}, {"steps": 2, "reference_reset": {"interval": 7, "triggers": [name]}}],
        reference_reset={"interval": 5, "optimizer": "clear"},
    )
    rules = ResetRules(settings)
    assert [(rules.settings(i).interval, rules.settings(i).optimizer) for i in (0, 1)] == [
        (5, "clear"),
        (7, "keep"),
    ]
    assert rules.triggers(0) == ()
    (trigger,) = rules.triggers(1)
    assert trigger.name == "entropy"
    assert trigger.fires({}, {"policy/entropy": 0.05})


@pytest.mark.parametrize(
    "name",
    [
        "no_such_module:Trigger",
        "json:NoSuchClass",
        "json:dumps",
        f"{__name__}:Nameless",
        "half_written:Trigger",
    ],
)
def test_a_trigger_that_cannot_be_used_is_refused_by_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "half_written.py").write_text("class Trigger(\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RecipeError, match=r"reference_reset\.triggers: "):
        load_trigger(name)


@pytest.mark.parametrize("name", ["module", "module:", ":Class", "a b:Class", "module:Class.x"])
def test_a_trigger_must_be_named_as_module_and_class(name: str) -> None:
    with pytest.raises(RecipeError, match="module:Class"):
        recipe([{"steps": 1}], reference_reset={"triggers": [name]})


def test_best_needs_its_checkpoint() -> None:
    with pytest.raises(RecipeError, match=r"checkpoint\.keep_best"):
        recipe([{"steps": 1}], reference_reset={"source": "best"}, checkpoint={"keep_best": False})
    recipe([{"steps": 1}], reference_reset={"source": "best"})
